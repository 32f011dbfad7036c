package store

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// steppedClock is the machine's clock, moved by hand.
type steppedClock struct {
	clock.Clock
	ahead atomic.Int64
}

func newSteppedClock() *steppedClock { return &steppedClock{Clock: clock.Real()} }

func (c *steppedClock) Now() time.Time          { return c.Clock.Now().Add(time.Duration(c.ahead.Load())) }
func (c *steppedClock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

func denial(cluster string, generation int64, at time.Time) *federationv1.Denial {
	return &federationv1.Denial{Cluster: cluster, Generation: generation, IssuedBefore: timestamppb.New(at)}
}

func TestDeregister(t *testing.T) {
	t.Parallel()
	forEachEtcd(t, func(t *testing.T, s *Store) {
		ctx := timeout(t)
		join(t, s, "eu-1")
		join(t, s, "eu-10")
		other := []*federationv1.Record{export("eu-10", "pay", 80)}
		if _, err := session(t, s, "eu-10").ReportFull(ctx, other); err != nil {
			t.Fatal(err)
		}
		var all []*federationv1.Record
		for i := range 130 {
			name := fmt.Sprintf("svc-%03d", i)
			all = append(all, export("eu-1", name, 80), ready("eu-1", name, 1))
		}
		all = append(all, finding("eu-1", "x"), &federationv1.Record{Key: "policy/eu-1/shop/p", Body: &federationv1.Record_Policy{
			Policy: &federationv1.Policy{Origin: "eu-1", Namespace: "shop", Name: "p"},
		}})
		if _, err := session(t, s, "eu-1").ReportFull(ctx, all); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Swap(ctx, Swap{Key: "drain/eu-1", New: drain("eu-1", 500)}); err != nil {
			t.Fatal(err)
		}
		lead(t, s, "leader", func(term *Term) {
			if _, err := term.Swap(ctx, Swap{Key: "vip/eu-1/shop/svc-000", New: vip("eu-1", "svc-000", "241.0.0.1")}); err != nil {
				t.Fatal(err)
			}
		})

		out, err := s.Deregister(ctx, "eu-1", "decommissioned")
		if err != nil || out.Removed != 130 {
			t.Fatalf("%+v, %v", out, err)
		}
		now := fresh(t, s)
		if st := now["cluster/eu-1"].GetMember().GetState(); st != federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
			t.Errorf("the tombstone says %v", st)
		}
		if d := now["deny/eu-1/1"].GetDenial(); d.GetReason() != "decommissioned" || d.GetIssuedBefore() == nil {
			t.Errorf("the denial is %v", d)
		}
		kvs, _, err := s.listAll(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		for k := range kvs {
			for _, dir := range memberDirs("eu-1") {
				if len(k) > len(dir) && k[:len(dir)] == dir {
					t.Errorf("%s is left", k)
				}
			}
			switch k {
			case "session/eu-1", "report/eu-1", "clusterkey/eu-1", "drain/eu-1":
				t.Errorf("%s is left", k)
			}
		}
		if now["export/eu-10/shop/pay"] == nil {
			t.Error("the export of a cluster of a like name is gone")
		}
		if again, err := s.Deregister(ctx, "eu-1", "again"); err != nil || again.Removed != 0 {
			t.Errorf("again: %+v, %v", again, err)
		}
		if _, err := s.Deregister(ctx, "nobody", ""); !errors.Is(err, ErrNotFound) {
			t.Errorf("an unknown cluster: %v", err)
		}
		if _, err := s.Quarantine(ctx, "eu-1", ""); !errors.Is(err, ErrNotFound) {
			t.Errorf("quarantine of a deregistered cluster: %v", err)
		}
		if err := s.CreateToken(ctx, "eu-1", token("zz")); !errors.Is(err, ErrNotFound) {
			t.Errorf("a token for a deregistered cluster: %v", err)
		}
		// The token of the old registration is worth nothing now, to its old key
		// either.
		if _, err := s.Enrol(ctx, "token-eu-1", []byte("key of eu-1")); !errors.Is(err, ErrToken) {
			t.Errorf("the old token: %v", err)
		}
	})
}

func TestCrashInTheMiddleOfDeregister(t *testing.T) {
	t.Parallel()
	for died := 1; died <= 3; died++ {
		t.Run(fmt.Sprintf("before transaction %d", died), func(t *testing.T) {
			var f fault
			e := newEtcd(t, 1)
			cfg := e.config()
			cfg.dialOptions = append(cfg.dialOptions, f.option())
			dying, other := open(t, cfg), open(t, e.config())
			ctx := timeout(t)
			join(t, other, "eu-1")
			ss := session(t, other, "eu-1")
			var all []*federationv1.Record
			for i := range 200 {
				all = append(all, export("eu-1", fmt.Sprintf("svc-%03d", i), 80))
			}
			if _, err := ss.ReportFull(ctx, all); err != nil {
				t.Fatal(err)
			}
			f.set(func(n int, _ *pb.TxnRequest) verdict {
				if n >= died {
					return refuse
				}
				return pass
			})
			if _, err := dying.Deregister(ctx, "eu-1", "gone"); !errors.Is(err, ErrUnknown) && died < 3 {
				t.Fatalf("the dying controller got %v", err)
			}
			// From the first transaction on, the cluster is out.
			if m, err := other.Member(ctx, "eu-1"); err != nil || m.GetState() != federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
				t.Fatalf("%v, %v", m, err)
			}
			if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "new", 80)}, nil); !errors.Is(err, ErrStale) {
				t.Errorf("the old agent's report got %v", err)
			}
			left := keysBelow(fresh(t, other), "export/eu-1/")
			if want := []int{0, 200, 80, 0}[died]; left != want {
				t.Errorf("%d exports are left, want %d", left, want)
			}
			if n, err := other.SweepDeregistered(ctx); err != nil || n != left {
				t.Errorf("the next leader swept %d, %v; want %d", n, err, left)
			}
			if n := keysBelow(fresh(t, other), "export/"); n != 0 {
				t.Errorf("%d exports are left after the sweep", n)
			}
		})
	}
}

func TestNameIsUsedAgainOnlyAfterTheOldLeavesExpired(t *testing.T) {
	t.Parallel()
	c := newSteppedClock()
	cfg := embeddedConfig(t)
	cfg.Clock = c
	s := open(t, cfg)
	ctx := timeout(t)
	join(t, s, "eu-1")
	if _, err := session(t, s, "eu-1").ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Deregister(ctx, "eu-1", "gone"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Register(ctx, member("eu-1"), token("bb")); !errors.Is(err, ErrTooSoon) {
		t.Errorf("at once: %v, want ErrTooSoon", err)
	}
	c.advance(DefaultReuseAfter + time.Minute)
	m, _, err := s.Register(ctx, member("eu-1"), token("bb"))
	if err != nil || m.GetGeneration() != 2 || m.GetState() != federationv1.MemberState_MEMBER_STATE_PENDING {
		t.Fatalf("later: %v, %v", m, err)
	}
	e, err := s.Enrol(ctx, "bb", []byte("other key"))
	if err != nil || e.Member.GetGeneration() != 2 {
		t.Errorf("%+v, %v", e, err)
	}
	if fresh(t, s)["deny/eu-1/1"] == nil {
		t.Error("the old generation's denial is gone")
	}
}

func TestQuarantine(t *testing.T) {
	t.Parallel()
	c := newSteppedClock()
	cfg := embeddedConfig(t)
	cfg.Clock = c
	s := open(t, cfg)
	ctx := timeout(t)
	join(t, s, "eu-1")
	if _, err := session(t, s, "eu-1").ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}); err != nil {
		t.Fatal(err)
	}
	rev, err := s.Quarantine(ctx, "eu-1", "stolen")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.Quarantine(ctx, "eu-1", "stolen"); err != nil || again != rev {
		t.Errorf("again: %v at %v, want %v", err, again, rev)
	}
	now := fresh(t, s)
	if now["export/eu-1/shop/pay"] == nil || now["deny/eu-1/1"] == nil {
		t.Error("quarantine keeps exports, and denies identities")
	}
	if _, err := s.OpenSession(ctx, SessionRequest{Cluster: "eu-1", Controller: "c", Instance: "i"}); !errors.Is(err, ErrStale) {
		t.Errorf("a session of a quarantined cluster: %v", err)
	}
	if _, err := s.Enrol(ctx, "token-eu-1", []byte("key of eu-1")); !errors.Is(err, ErrToken) {
		t.Errorf("its old token and key: %v", err)
	}
	if err := s.CreateToken(ctx, "eu-1", token("bb")); !errors.Is(err, ErrTooSoon) {
		t.Errorf("a new token at once: %v, want ErrTooSoon", err)
	}
	c.advance(DefaultReuseAfter + time.Minute)
	if err := s.CreateToken(ctx, "eu-1", token("bb")); err != nil {
		t.Fatal(err)
	}
	e, err := s.Enrol(ctx, "bb", []byte("new key"))
	if err != nil || e.Member.GetGeneration() != 2 || e.Member.GetState() != federationv1.MemberState_MEMBER_STATE_ACTIVE {
		t.Errorf("%+v, %v", e, err)
	}
	ss := session(t, s, "eu-1")
	if stored, err := ss.Stored(); err != nil || len(stored) != 1 {
		t.Errorf("its exports were kept: %v, %v", stored, err)
	}
}

func TestDenialsAreSticky(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	if _, err := s.Deny(ctx, denial("eu-1", 1, noon), denial("eu-2", 7, noon), denial("eu-1", 1, noon.Add(time.Hour))); err != nil {
		t.Fatal(err)
	}
	before := etcdRevision(t, s)
	if _, err := s.Deny(ctx, denial("eu-1", 1, noon.Add(-time.Hour)), denial("eu-2", 7, noon)); err != nil {
		t.Fatal(err)
	}
	if etcdRevision(t, s) != before {
		t.Error("older denials wrote something")
	}
	if got := fresh(t, s)["deny/eu-1/1"].GetDenial().GetIssuedBefore().AsTime(); !got.Equal(noon.Add(time.Hour)) {
		t.Errorf("the denial is of %v, want the latest", got)
	}
	var many []*federationv1.Denial
	for i := range 300 {
		many = append(many, denial("eu-3", int64(i), noon))
	}
	if _, err := s.Deny(ctx, many...); err != nil || keysBelow(fresh(t, s), "deny/eu-3/") != 300 {
		t.Errorf("300 denials: %v", err)
	}
}
