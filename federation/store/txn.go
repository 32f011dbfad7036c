package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

const (
	// maxOps is how many changes one transaction holds. etcd's limit is 128, and
	// each transaction has a few puts of its own besides.
	maxOps = 120
	// maxTxnBytes keeps a transaction below etcd's limit of 1.5 MiB a request.
	maxTxnBytes = 1 << 20
	// readTimeout and writeTimeout bound one call to etcd. They are times of the
	// machine, as all of etcd's are, not of the injected clock.
	readTimeout  = 5 * time.Second
	writeTimeout = 10 * time.Second
	// maxSends is how often a transaction is sent whose outcome stays unknown.
	maxSends = 4
	// maxRaces is how often a method decides anew after another writer was faster.
	maxRaces = 32
)

// errRaced says that a transaction's compares failed: what it was decided on
// has changed.
var errRaced = errors.New("compare failed")

// snapshot is what some keys held at one revision; meta and head always are
// among them.
type snapshot struct {
	revision int64
	entries  map[string]entry
	meta     *federationv1.Meta
}

// compare holds while key is as the snapshot has it, absence included.
func (sn *snapshot) compare(keys ...string) []guard {
	out := make([]guard, 0, len(keys))
	for _, k := range keys {
		out = append(out, guard{key: k, modified: sn.entries[k].modified})
	}
	return out
}

// catalog is the revision of the catalog at the snapshot.
func (sn *snapshot) catalog() federation.Revision {
	return federation.Revision{Incarnation: sn.meta.GetIncarnation(), Number: sn.entries[keyHead].modified}
}

// record decodes a catalog key; nil where it is absent.
func (sn *snapshot) record(key string) (*federationv1.Record, error) {
	e := sn.entries[key]
	if !e.exists() {
		return nil, nil
	}
	return decodeRecord(key, e.value, e.created)
}

// state decodes a key of the store's own; nil where it is absent.
func (sn *snapshot) state(key string) (*federationv1.State, error) {
	e := sn.entries[key]
	if !e.exists() {
		return nil, nil
	}
	return decodeState(key, e.value)
}

// member decodes cluster/C; ErrNotFound where there is none, not even a
// tombstone.
func (sn *snapshot) member(c federation.ClusterID) (*federationv1.Member, error) {
	r, err := sn.record(clusterKey(c))
	if err != nil {
		return nil, err
	}
	if r == nil {
		return nil, fmt.Errorf("cluster %q: %w", c, ErrNotFound)
	}
	return r.GetMember(), nil
}

// read gets keys, meta and head at one revision, linearizably.
func (s *Store) read(ctx context.Context, keys ...string) (*snapshot, error) {
	for {
		before := s.newest.Load()
		sn, cluster, err := s.readOnce(ctx, keys)
		if err != nil {
			return nil, err
		}
		switch {
		case sn.meta.GetEtcdClusterId() != cluster:
			err = s.adopt(ctx)
		case before != nil && before.incarnation == sn.meta.GetIncarnation() && sn.revision < before.revision:
			// A linearizable read is behind an earlier one: etcd went back.
			err = s.wentBack(ctx, before.incarnation)
		default:
			s.newest.Store(&reached{incarnation: sn.meta.GetIncarnation(), revision: sn.revision})
			return sn, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// reached is a state of etcd that has been seen.
type reached struct {
	incarnation string
	revision    int64
}

func (s *Store) readOnce(ctx context.Context, keys []string) (_ *snapshot, cluster uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	defer s.metrics.request("read", s.clock.Now(), &err)
	all := append([]string{keyMeta, keyHead}, keys...)
	ops := make([]clientv3.Op, len(all))
	for i, k := range all {
		ops[i] = clientv3.OpGet(s.prefix + k)
	}
	resp, err := s.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, 0, s.explain("read", err)
	}
	sn := &snapshot{revision: resp.Header.Revision, entries: make(map[string]entry, len(all))}
	for i, k := range all {
		if kvs := resp.Responses[i].GetResponseRange().Kvs; len(kvs) == 1 {
			sn.entries[k] = entryOf(kvs[0])
		}
	}
	st, err := sn.state(keyMeta)
	if err != nil {
		return nil, 0, err
	}
	sn.meta = st.GetMeta()
	return sn, resp.Header.ClusterId, nil
}

// guard is one compare: key was last modified at this revision, or is absent
// where that is 0. created guards hold while the key lives on, changed or not.
type guard struct {
	key      string
	modified int64
	created  int64 // where not 0, CreateRevision is compared instead
}

func (g guard) cmp(prefix string) clientv3.Cmp {
	if g.created != 0 {
		return clientv3.Compare(clientv3.CreateRevision(prefix+g.key), "=", g.created)
	}
	return clientv3.Compare(clientv3.ModRevision(prefix+g.key), "=", g.modified)
}

// change is one put, or a delete where value is nil.
type change struct {
	key   string
	value []byte
	lease clientv3.LeaseID
	keep  bool // put under the lease that the key has
	dir   bool // delete everything below key
}

func (c change) op(prefix string) clientv3.Op {
	switch {
	case c.value == nil && c.dir:
		return clientv3.OpDelete(prefix+c.key, clientv3.WithPrefix())
	case c.value == nil:
		return clientv3.OpDelete(prefix + c.key)
	case c.keep:
		return clientv3.OpPut(prefix+c.key, string(c.value), clientv3.WithIgnoreLease())
	case c.lease != 0:
		return clientv3.OpPut(prefix+c.key, string(c.value), clientv3.WithLease(c.lease))
	default:
		return clientv3.OpPut(prefix+c.key, string(c.value))
	}
}

// txn is one transaction in the making. At least one of its compares must be on
// the modification of a key that it changes: that makes sending it twice safe.
type txn struct {
	name      string // of the method, for metrics and errors
	operation uint64
	meta      []byte // value of meta that it was decided under
	base      int64  // a revision before its first sending
	guards    []guard
	changes   []change
	// witness is the key whose State names this transaction: head, or a key of
	// the store's own that the transaction puts.
	witness string
	err     error // first error in making it
}

func (s *Store) begin(name string, sn *snapshot) *txn {
	return &txn{
		name: name, operation: s.operations.Add(1), meta: sn.entries[keyMeta].value, base: sn.revision,
	}
}

func (t *txn) require(g ...guard) { t.guards = append(t.guards, g...) }

func (t *txn) putRecord(r *federationv1.Record) {
	v, err := encodeRecord(r)
	t.put(change{key: r.GetKey(), value: v}, err)
}

// putState puts a value of the store's own, signed as s's operation.
func (t *txn) putState(s *Store, key string, st *federationv1.State, lease clientv3.LeaseID) {
	v, err := s.sign(t, key, st)
	t.put(change{key: key, value: v, lease: lease}, err)
}

// putStateKeeping is putState under the lease that the key has already.
func (t *txn) putStateKeeping(s *Store, key string, st *federationv1.State) {
	v, err := s.sign(t, key, st)
	t.put(change{key: key, value: v, keep: true}, err)
}

func (s *Store) sign(t *txn, key string, st *federationv1.State) ([]byte, error) {
	st.Writer, st.Operation = s.writer, t.operation
	if t.witness == "" {
		t.witness = key
	}
	return encodeState(key, st)
}

func (t *txn) put(c change, err error) {
	if err != nil {
		if t.err == nil {
			t.err = err
		}
		return
	}
	t.changes = append(t.changes, c)
}

func (t *txn) delete(keys ...string) {
	for _, k := range keys {
		t.changes = append(t.changes, change{key: k})
	}
}

func (t *txn) deleteBelow(dir string) {
	t.changes = append(t.changes, change{key: dir, dir: true})
}

func (t *txn) catalogChanging() bool {
	for _, c := range t.changes {
		if isCatalog(c.key) {
			return true
		}
	}
	return false
}

// commit sends t until its outcome is known. It returns the store's revision
// that t made; errRaced where a compare failed; ErrUnknown where etcd stayed
// away or ctx ended after the first sending.
func (s *Store) commit(ctx context.Context, t *txn) (_ int64, err error) {
	if t.err != nil {
		return 0, t.err
	}
	start := s.clock.Now()
	defer func() { s.metrics.transaction(t.name, start, err) }()
	if t.catalogChanging() {
		t.witness = keyHead
		v, err := s.sign(t, keyHead, &federationv1.State{})
		if err != nil {
			return 0, err
		}
		t.changes = append(t.changes, change{key: keyHead, value: v})
	}
	var cmps []clientv3.Cmp
	if t.meta != nil { // else the transaction makes it
		cmps = append(cmps, clientv3.Compare(clientv3.Value(s.prefix+keyMeta), "=", string(t.meta)))
	}
	for _, g := range t.guards {
		cmps = append(cmps, g.cmp(s.prefix))
	}
	ops := make([]clientv3.Op, len(t.changes))
	for i, c := range t.changes {
		ops[i] = c.op(s.prefix)
	}
	doubt := false // an earlier sending may have succeeded
	for sent := 1; ; sent++ {
		resp, err := s.send(ctx, cmps, ops)
		switch {
		case err == nil && resp.Succeeded:
			return resp.Header.Revision, nil
		case err == nil && !doubt:
			return 0, errRaced
		case err == nil:
			rev, err := s.findOwn(ctx, t)
			if err == nil && rev == 0 {
				err = errRaced
			}
			return rev, err
		case !mayHaveHappened(err):
			return 0, s.explain(t.name, err)
		}
		doubt = true
		s.metrics.unknown.Inc()
		s.log.WarnContext(ctx, "etcd did not answer a write; looking for it",
			"transaction", t.name, "operation", t.operation, "sent", sent, "error", err)
		rev, ferr := s.findOwn(ctx, t)
		if ferr == nil && rev != 0 {
			return rev, nil
		}
		if ferr == nil && errors.Is(err, rpctypes.ErrNoSpace) {
			return 0, s.explain(t.name, err)
		}
		if ctx.Err() != nil || sent == maxSends {
			return 0, fmt.Errorf("%s: %w: %w", t.name, ErrUnknown, errors.Join(err, ctx.Err()))
		}
	}
}

func (s *Store) send(ctx context.Context, cmps []clientv3.Cmp, ops []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	return s.client.Txn(ctx).If(cmps...).Then(ops...).Commit()
}

// findOwn looks for t in the history of its witness, newest first, down to the
// revision before its first sending. It returns the revision that t made, or 0
// where t has not happened so far.
func (s *Store) findOwn(ctx context.Context, t *txn) (int64, error) {
	key := s.prefix + t.witness
	for rev := int64(0); ; {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		resp, err := s.client.Get(ctx, key, clientv3.WithRev(rev))
		cancel()
		switch {
		case errors.Is(err, rpctypes.ErrCompacted):
			// The history is gone. Sending again is safe still; where that fails,
			// the method decides anew, as if it were called a second time.
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("%s: %w: %w", t.name, ErrUnknown, err)
		}
		if len(resp.Kvs) == 0 || resp.Kvs[0].ModRevision <= t.base {
			return 0, nil
		}
		st, err := decodeState(t.witness, resp.Kvs[0].Value)
		if err != nil {
			return 0, err
		}
		if st.GetWriter() == s.writer && st.GetOperation() == t.operation {
			return resp.Kvs[0].ModRevision, nil
		}
		rev = resp.Kvs[0].ModRevision - 1
	}
}

// mayHaveHappened reports whether a write that got err can have been applied
// all the same, or can be still.
func mayHaveHappened(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return true
	}
	code := status.Code(err)
	if ee, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = ee.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown, codes.Internal, codes.Aborted:
		return true
	case codes.ResourceExhausted:
		// etcd may apply a write and still report that it is out of space.
		return errors.Is(err, rpctypes.ErrNoSpace)
	}
	return false
}

// explain puts an error of etcd into the store's words.
func (s *Store) explain(what string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%s: %w: %w", what, ErrFull, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: etcd at %s did not answer in time: %w", what, s.where, err)
	default:
		return fmt.Errorf("%s: etcd at %s: %w", what, s.where, err)
	}
}

// revision is the catalog's revision that a transaction made.
func (sn *snapshot) at(number int64) federation.Revision {
	return federation.Revision{Incarnation: sn.meta.GetIncarnation(), Number: number}
}

// retry runs decide until its transaction is not raced by another writer's.
func retry(ctx context.Context, what string, decide func() error) error {
	for range maxRaces {
		err := decide()
		if !errors.Is(err, errRaced) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
	}
	return fmt.Errorf("%s: %d other writers were faster: %w", what, maxRaces, ErrConflict)
}
