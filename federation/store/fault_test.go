package store

import (
	"context"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// fault stands between client and etcd, and decides about each writing
// transaction: whether it reaches etcd, and whether its reply comes back.
type fault struct {
	mu     sync.Mutex
	decide func(n int, req *pb.TxnRequest) verdict // nil lets everything pass
	writes int
	after  func()           // runs after the commit of a write whose reply is lost
	held   []*pb.TxnRequest // requests that were lost, to be delivered late
}

type verdict int

const (
	pass        verdict = iota
	loseRequest         // etcd never sees it (or much later)
	loseReply           // etcd has committed it, the client does not hear of it
	refuse              // the process is dead: nothing reaches etcd, no reply comes
)

var errCut = status.Error(codes.Unavailable, "connection cut by the test")

func (f *fault) option() grpc.DialOption {
	return grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		txn, ok := req.(*pb.TxnRequest)
		if !ok || !writes(txn) {
			return invoke(ctx, method, req, reply, cc, opts...)
		}
		f.mu.Lock()
		v := pass
		if f.decide != nil {
			v = f.decide(f.writes, txn)
			f.writes++
		}
		if v == loseRequest {
			f.held = append(f.held, proto.CloneOf(txn))
		}
		f.mu.Unlock()
		switch v {
		case loseRequest, refuse:
			return errCut
		case loseReply:
			if err := invoke(ctx, method, req, reply, cc, opts...); err != nil {
				return err
			}
			if f.after != nil {
				f.after()
			}
			return errCut
		}
		return invoke(ctx, method, req, reply, cc, opts...)
	})
}

// set begins anew with a rule.
func (f *fault) set(decide func(n int, req *pb.TxnRequest) verdict) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide, f.writes, f.held = decide, 0, nil
}

// first applies v to the first write after set, and lets the others pass.
func first(v verdict) func(int, *pb.TxnRequest) verdict {
	return func(n int, _ *pb.TxnRequest) verdict {
		if n == 0 {
			return v
		}
		return pass
	}
}

func writes(txn *pb.TxnRequest) bool {
	for _, op := range txn.GetSuccess() {
		if op.GetRequestPut() != nil || op.GetRequestDeleteRange() != nil {
			return true
		}
	}
	return false
}

// deliver sends the lost requests at last.
func (f *fault) deliver(t testing.TB, s *Store) {
	t.Helper()
	f.mu.Lock()
	held := f.held
	f.mu.Unlock()
	kv := pb.NewKVClient(raw(t, s).ActiveConnection())
	for _, req := range held {
		if _, err := kv.Txn(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
}
