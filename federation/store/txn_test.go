package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// method is one writing method in a world in which it writes something.
type method struct {
	name string
	// prepare makes that world; what it returns calls the method.
	prepare func(*testing.T, *Store) func(context.Context) error
	// again is what a second call says after the first has succeeded.
	again error
}

func methods() []method {
	joined := func(f func(ctx context.Context, s *Store) error) func(*testing.T, *Store) func(context.Context) error {
		return func(t *testing.T, s *Store) func(context.Context) error {
			join(t, s, "eu-1")
			return func(ctx context.Context) error { return f(ctx, s) }
		}
	}
	inSession := func(f func(ctx context.Context, ss *Session) error) func(*testing.T, *Store) func(context.Context) error {
		return func(t *testing.T, s *Store) func(context.Context) error {
			join(t, s, "eu-1")
			ss := session(t, s, "eu-1")
			if _, err := ss.ReportFull(t.Context(), []*federationv1.Record{export("eu-1", "cart", 80)}); err != nil {
				t.Fatal(err)
			}
			return func(ctx context.Context) error { return f(ctx, ss) }
		}
	}
	inTerm := func(f func(ctx context.Context, term *Term) error) func(*testing.T, *Store) func(context.Context) error {
		return func(t *testing.T, s *Store) func(context.Context) error {
			terms := make(chan *Term)
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.Elect(ctx, "leader", "a", func(ctx context.Context, term *Term) error {
					terms <- term
					<-ctx.Done()
					return nil
				})
			}()
			t.Cleanup(func() { cancel(); <-done })
			term := <-terms
			return func(ctx context.Context) error { return f(ctx, term) }
		}
	}
	return []method{
		{"register", func(_ *testing.T, s *Store) func(context.Context) error {
			return func(ctx context.Context) error {
				_, _, err := s.Register(ctx, member("eu-1"), token("aa"))
				return err
			}
		}, nil},
		{"create token", joined(func(ctx context.Context, s *Store) error { return s.CreateToken(ctx, "eu-1", token("bb")) }), ErrExists},
		{"enrol", func(t *testing.T, s *Store) func(context.Context) error {
			if _, _, err := s.Register(t.Context(), member("eu-1"), token("aa")); err != nil {
				t.Fatal(err)
			}
			return func(ctx context.Context) error {
				_, err := s.Enrol(ctx, "aa", []byte("key"))
				return err
			}
		}, nil},
		{"update member", joined(func(ctx context.Context, s *Store) error {
			_, _, err := s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error { m.Zone = "eu-z"; return nil })
			return err
		}), nil},
		{"open session", joined(func(ctx context.Context, s *Store) error {
			_, err := s.OpenSession(ctx, SessionRequest{Cluster: "eu-1", Controller: "c", Instance: "i"})
			return err
		}), nil},
		{"report", inSession(func(ctx context.Context, ss *Session) error {
			_, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}, []string{"export/eu-1/shop/cart"})
			return err
		}), nil},
		{"report full", inSession(func(ctx context.Context, ss *Session) error {
			_, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)})
			return err
		}), nil},
		{"deregister", joined(func(ctx context.Context, s *Store) error {
			_, err := s.Deregister(ctx, "eu-1", "gone")
			return err
		}), nil},
		{"quarantine", joined(func(ctx context.Context, s *Store) error {
			_, err := s.Quarantine(ctx, "eu-1", "stolen")
			return err
		}), nil},
		{"deny", joined(func(ctx context.Context, s *Store) error {
			_, err := s.Deny(ctx, denial("eu-7", 1, time.Unix(1e9, 0)))
			return err
		}), nil},
		{"put policy", joined(func(ctx context.Context, s *Store) error {
			_, err := s.PutPolicy(ctx, policyRecord("p", "pay", 1).GetPolicy())
			return err
		}), nil},
		{"delete policy", func(t *testing.T, s *Store) func(context.Context) error {
			if _, err := s.PutPolicy(t.Context(), policyRecord("p", "pay", 1).GetPolicy()); err != nil {
				t.Fatal(err)
			}
			return func(ctx context.Context) error { _, err := s.DeletePolicy(ctx, "shop", "p"); return err }
		}, ErrNotFound},
		{"swap", joined(func(ctx context.Context, s *Store) error {
			_, err := s.Swap(ctx, Swap{Key: "drain/eu-1", New: drain("eu-1", 1)})
			return err
		}), nil},
		{"term swap", inTerm(func(ctx context.Context, term *Term) error {
			_, err := term.Swap(ctx, Swap{Key: "vip/eu-1/shop/pay", New: vip("eu-1", "pay", "241.0.0.1")})
			return err
		}), nil},
		{"create authorities", joined(func(ctx context.Context, s *Store) error {
			_, err := s.CreateAuthorities(ctx, &federationv1.Bundle{Sequence: 1}, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("x")})
			return err
		}), nil},
		{"journal", func(t *testing.T, s *Store) func(context.Context) error {
			join(t, s, "eu-1")
			if _, err := s.CreateAuthorities(t.Context(), nil, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("x")}); err != nil {
				t.Fatal(err)
			}
			list, err := s.Authorities(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return func(ctx context.Context) error { return s.Journal(ctx, issuance("01", "eu-1", 1), list[0].Revision) }
		}, nil},
		{"put operator", joined(func(ctx context.Context, s *Store) error { return s.PutOperator(ctx, "ada", "admin") }), nil},
		{"begin incarnation", joined(func(ctx context.Context, s *Store) error { return s.BeginIncarnation(ctx) }), nil},
	}
}

// dump is every key but head with value and number of changes: what a lost
// reply, or a transaction that comes late, must not alter.
func dump(t testing.TB, s *Store) map[string]string {
	t.Helper()
	resp, err := s.client.Get(t.Context(), s.prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	for _, kv := range resp.Kvs {
		if key := strings.TrimPrefix(string(kv.Key), s.prefix); key != keyHead {
			out[key] = fmt.Sprintf("%d changes: %x", kv.Version, kv.Value)
		}
	}
	return out
}

// unreliable is a trust domain of its own on e, behind a fault.
func unreliable(t *testing.T, e *testEtcd, f *fault, name string) *Store {
	cfg := e.config()
	cfg.TrustDomain = federationTestDomain(strings.ReplaceAll(name, " ", "-"))
	cfg.dialOptions = append(cfg.dialOptions, f.option())
	return open(t, cfg)
}

// A write whose reply is lost is found, and not made twice.
func TestReplyIsLostAfterTheCommit(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	for _, m := range methods() {
		t.Run(m.name, func(t *testing.T) {
			var f fault
			s := unreliable(t, e, &f, m.name)
			call := m.prepare(t, s)
			f.set(first(loseReply))
			if err := call(timeout(t)); err != nil {
				t.Fatalf("the caller is told %v", err)
			}
			if f.writes != 1 {
				t.Errorf("the transaction was sent %d times, want once", f.writes)
			}
		})
	}
}

// A write that never arrived is sent again; when the first sending arrives at
// last, it changes nothing.
func TestRequestIsDelayed(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	for _, m := range methods() {
		t.Run(m.name, func(t *testing.T) {
			var f fault
			s := unreliable(t, e, &f, m.name)
			call := m.prepare(t, s)
			f.set(first(loseRequest))
			if err := call(timeout(t)); err != nil {
				t.Fatalf("the caller is told %v", err)
			}
			before := dump(t, s)
			f.deliver(t, s)
			if d := cmp.Diff(before, dump(t, s)); d != "" {
				t.Errorf("the late sending changed: %s", d)
			}
		})
	}
}

// Replies stay lost until the store gives up: the write has happened, the
// caller is told that nobody knows, and calling again is safe.
func TestOutcomeStaysUnknown(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	for _, m := range methods() {
		t.Run(m.name, func(t *testing.T) {
			var f fault
			s := unreliable(t, e, &f, m.name)
			call := m.prepare(t, s)
			// Nothing arrives, so that there is nothing to be found, until the store
			// has given up; then the sendings arrive.
			f.set(func(int, *pb.TxnRequest) verdict { return loseRequest })
			if err := call(timeout(t)); !errors.Is(err, ErrUnknown) {
				t.Fatalf("the caller is told %v, want ErrUnknown", err)
			}
			if f.writes != maxSends {
				t.Errorf("it was sent %d times, want %d", f.writes, maxSends)
			}
			f.deliver(t, s)
			once := dump(t, s)
			f.set(nil)
			err := call(timeout(t))
			if m.again == nil && err != nil && !errors.Is(err, ErrConflict) || m.again != nil && !errors.Is(err, m.again) {
				t.Errorf("the second call got %v, want %v", err, m.again)
			}
			switch m.name {
			case "begin incarnation", "open session":
				return // these count on, as documented
			}
			if d := cmp.Diff(once, dump(t, s)); d != "" {
				t.Errorf("the second call changed: %s", d)
			}
		})
	}
}

// Between a lost request and its second sending, somebody else changes the
// target: the second sending must fail, and the method decide anew.
func TestAnotherWriterIsFasterThanTheSecondSending(t *testing.T) {
	t.Parallel()
	var f fault
	s := unreliable(t, newEtcd(t, 1), &f, "race")
	ctx := timeout(t)
	join(t, s, "eu-1")
	f.set(func(n int, _ *pb.TxnRequest) verdict {
		if n > 0 {
			return pass
		}
		c := raw(t, s)
		sn, err := s.read(ctx, clusterKey("eu-1"))
		if err != nil {
			t.Error(err)
			return pass
		}
		m, err := sn.member("eu-1")
		if err != nil {
			t.Error(err)
			return pass
		}
		m.Grants = append(m.Grants, "theirs/*")
		v, err := encodeRecord(memberRecord(m))
		if err != nil {
			t.Error(err)
		}
		if _, err := c.Put(ctx, s.prefix+clusterKey("eu-1"), string(v)); err != nil {
			t.Error(err)
		}
		return loseRequest
	})
	m, _, err := s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error {
		m.Grants = append(m.Grants, "ours/*")
		return nil
	})
	if err != nil || cmp.Diff([]string{"shop/*", "theirs/*", "ours/*"}, m.GetGrants()) != "" {
		t.Errorf("%v, %v", m.GetGrants(), err)
	}
}

// Own writes are found in the history, below those of others.
func TestOwnWriteIsFoundBelowOthers(t *testing.T) {
	t.Parallel()
	var f fault
	e := newEtcd(t, 1)
	s := unreliable(t, e, &f, "history")
	other := open(t, func() Config { c := e.config(); c.TrustDomain = s.cfg.TrustDomain; return c }())
	ctx := timeout(t)
	join(t, s, "eu-1")
	var committed federation.Revision
	f.set(func(n int, _ *pb.TxnRequest) verdict {
		if n == 0 {
			return loseReply
		}
		return pass
	})
	f.after = func() {
		sn, err := other.read(ctx)
		if err != nil {
			t.Error(err)
			return
		}
		committed = sn.catalog()
		for i := range 10 {
			if _, err := other.PutPolicy(ctx, policyRecord(fmt.Sprintf("p%d", i), "pay", 1).GetPolicy()); err != nil {
				t.Error(err)
			}
		}
	}
	rev, err := s.Quarantine(ctx, "eu-1", "x")
	if err != nil || rev != committed {
		t.Errorf("found at %v, %v; it was made at %v", rev, err, committed)
	}
}

// A context that ends while etcd is away says so at once.
func TestContextEnds(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	s := open(t, e.config())
	e.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Member(ctx, "eu-1"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("a read: %v", err)
	}
	sn := &snapshot{entries: map[string]entry{keyMeta: {value: []byte("x")}}}
	tx := s.begin("test", sn)
	tx.putState(s, operatorKey("ada"), &federationv1.State{}, 0)
	ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.commit(ctx, tx); !errors.Is(err, ErrUnknown) {
		t.Errorf("a write: %v", err)
	}
}
