package store

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// lead runs f as the leader.
func lead(t testing.TB, s *Store, candidate string, f func(*Term)) {
	t.Helper()
	ctx, cancel := context.WithCancel(timeout(t))
	led := false
	err := s.Elect(ctx, "leader", candidate, func(_ context.Context, term *Term) error {
		led = true
		defer cancel()
		f(term)
		return nil
	})
	if !led {
		t.Fatalf("it never led: %v", err)
	}
}

// liveness writes what a leader writes.
func liveness(ctx context.Context, term *Term, cluster string) error {
	key := "liveness/" + cluster
	_, err := term.Swap(ctx, Swap{Key: key, New: &federationv1.Record{Key: key, Body: &federationv1.Record_Silence{Silence: &federationv1.Silence{}}}})
	return err
}

func TestPausedLeaderChangesNothing(t *testing.T) {
	t.Parallel()
	cfg := newEtcd(t, 1).config()
	cfg.ElectionTTL = time.Second
	a, b := open(t, cfg), open(t, cfg)
	ctx, cancel := context.WithCancel(timeout(t))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	terms, resume := make(chan *Term), make(chan struct{})
	ended := make(chan struct{})
	wg.Go(func() {
		a.Elect(ctx, "leader", "a", func(ctx context.Context, term *Term) error {
			select {
			case terms <- term:
			case <-ctx.Done():
				return nil
			}
			<-ctx.Done()
			select {
			case <-ended:
			default:
				close(ended)
			}
			<-resume // it is slow to notice
			return nil
		})
	})
	old := <-terms
	if err := liveness(ctx, old, "eu-1"); err != nil {
		t.Fatalf("the leader cannot write: %v", err)
	}
	if name, err := a.Leader(ctx, "leader"); err != nil || name != "a" {
		t.Errorf("the leader is %q, %v", name, err)
	}
	wg.Go(func() {
		b.Elect(ctx, "leader", "b", func(ctx context.Context, term *Term) error {
			select {
			case terms <- term:
			case <-ctx.Done():
			}
			<-ctx.Done()
			return nil
		})
	})
	// The process stands still beyond its lease: etcd lets the lease go.
	client := raw(t, a)
	resp, err := client.Get(ctx, a.prefix+old.key)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatal(resp, err)
	}
	if _, err := client.Revoke(ctx, clientv3.LeaseID(resp.Kvs[0].Lease)); err != nil {
		t.Fatal(err)
	}
	next := <-terms // b leads
	if err := liveness(ctx, next, "eu-2"); err != nil {
		t.Errorf("the new leader cannot write: %v", err)
	}
	before := etcdRevision(t, a)
	bundle := Swap{Key: keyBundle, New: &federationv1.Record{Body: &federationv1.Record_Bundle{Bundle: &federationv1.Bundle{}}}}
	_, swapErr := old.Swap(ctx, bundle)
	_, authorityErr := old.PutAuthorities(ctx, nil, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("x")})
	_, pruneErr := old.PruneIssued(ctx, time.Now())
	for what, err := range map[string]error{
		"liveness": liveness(ctx, old, "eu-3"), "bundle": swapErr, "authority": authorityErr, "confirm": old.Confirm(ctx),
	} {
		if !errors.Is(err, ErrNotLeader) {
			t.Errorf("%s: the ex-leader got %v, want ErrNotLeader", what, err)
		}
	}
	if pruneErr != nil {
		t.Errorf("pruning an empty journal: %v", pruneErr)
	}
	if after := etcdRevision(t, a); after != before {
		t.Error("the ex-leader wrote something")
	}
	select {
	case <-ended:
	case <-ctx.Done():
		t.Error("the ex-leader's context did not end")
	}
	close(resume)
}

// The compare itself must hold, not only the read before it: the term ends
// between the two.
func TestTermEndsBetweenReadAndWrite(t *testing.T) {
	t.Parallel()
	var f fault
	e := newEtcd(t, 1)
	cfg := e.config()
	cfg.dialOptions = append(cfg.dialOptions, f.option())
	s := open(t, cfg)
	ctx := timeout(t)
	client := raw(t, s)
	lead(t, s, "a", func(term *Term) {
		f.set(func(n int, _ *pb.TxnRequest) verdict {
			if n == 0 {
				if _, err := client.Delete(ctx, s.prefix+term.key); err != nil {
					t.Error(err)
				}
			}
			return pass
		})
		if err := liveness(ctx, term, "eu-1"); !errors.Is(err, ErrNotLeader) {
			t.Errorf("got %v, want ErrNotLeader", err)
		}
		f.set(nil)
		if fresh(t, s)["liveness/eu-1"] != nil {
			t.Error("the write happened")
		}
	})
}

func TestLeadershipPassesOn(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	ctx := timeout(t)
	led := make(chan string)
	var wg sync.WaitGroup
	defer wg.Wait()
	run := func(name string) (stop func()) {
		s := open(t, e.config())
		ctx, cancel := context.WithCancel(ctx)
		wg.Go(func() {
			s.Elect(ctx, "leader", name, func(ctx context.Context, _ *Term) error {
				select {
				case led <- name:
				case <-ctx.Done():
				}
				<-ctx.Done()
				return nil
			})
		})
		return cancel
	}
	stopA := run("a")
	if got := <-led; got != "a" {
		t.Fatalf("%s leads", got)
	}
	stopB := run("b")
	began := time.Now()
	stopA() // it resigns, so that b need not wait for the lease (15 s)
	if got := <-led; got != "b" {
		t.Fatalf("%s leads", got)
	}
	if waited := time.Since(began); waited > DefaultElectionTTL/2 {
		t.Errorf("the next leader waited for the lease: %v", waited)
	}
	stopB()
	// A leader whose work fails gives the office up, and can get it again.
	s := open(t, e.config())
	n := 0
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.Elect(ctx, "leader", "c", func(context.Context, *Term) error {
		if n++; n == 2 {
			cancel()
		}
		return errors.New("work failed")
	})
	if n != 2 {
		t.Errorf("it led %d times, want 2", n)
	}
}

// A candidate that waited longer than its own key lived must not believe that
// it leads.
func TestCandidateOutlivesItsKey(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	a, b := open(t, e.config()), open(t, e.config())
	ctx, cancel := context.WithCancel(timeout(t))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	aLeads, stopA := make(chan struct{}), make(chan struct{})
	wg.Go(func() {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		a.Elect(ctx, "leader", "a", func(context.Context, *Term) error {
			close(aLeads)
			<-stopA
			cancel()
			return nil
		})
	})
	<-aLeads
	confirmed := make(chan error, 1)
	wg.Go(func() {
		b.Elect(ctx, "leader", "b", func(ctx context.Context, term *Term) error {
			select {
			case confirmed <- term.Confirm(ctx):
			default:
			}
			<-ctx.Done()
			return nil
		})
	})
	client := raw(t, a)
	candidates := func() []string {
		resp, err := client.Get(ctx, a.prefix+dirElection, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend))
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		for _, kv := range resp.Kvs {
			keys = append(keys, string(kv.Key))
		}
		return keys
	}
	eventually(t, func() bool { return len(candidates()) == 2 })
	if _, err := client.Delete(ctx, candidates()[1]); err != nil {
		t.Fatal(err)
	}
	close(stopA)
	select {
	case err := <-confirmed:
		if err != nil {
			t.Errorf("it led without a key: %v", err)
		}
	case <-ctx.Done():
		t.Error("nobody leads")
	}
}
