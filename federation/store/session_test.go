package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func session(t testing.TB, s *Store, cluster string) *Session {
	t.Helper()
	ss, err := s.OpenSession(timeout(t), SessionRequest{Cluster: federation.ClusterID(cluster), Controller: "ctl", Instance: "agent-0"})
	if err != nil {
		t.Fatal(err)
	}
	return ss
}

func export(cluster, name string, port uint32) *federationv1.Record {
	return &federationv1.Record{Key: "export/" + cluster + "/shop/" + name, Body: &federationv1.Record_Export{Export: &federationv1.Export{
		Cluster: cluster, Namespace: "shop", Name: name, Ports: []*federationv1.Port{{Number: port, Protocol: "TCP"}},
	}}}
}

func ready(cluster, name string, n int32) *federationv1.Record {
	return &federationv1.Record{Key: "ready/" + cluster + "/shop/" + name, Body: &federationv1.Record_Readiness{Readiness: &federationv1.Readiness{Ready: n, Total: n}}}
}

func finding(cluster, subject string) *federationv1.Record {
	return &federationv1.Record{Key: "finding/" + cluster + "/WEFT1001/cluster/" + subject, Body: &federationv1.Record_Finding{Finding: &federationv1.Finding{Code: "WEFT1001", Subject: "cluster " + subject}}}
}

// fresh lists all records as a reader without a watch would see them.
func fresh(t testing.TB, s *Store) map[string]*federationv1.Record {
	t.Helper()
	kvs, _, err := s.listAll(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]*federationv1.Record)
	for k, e := range kvs {
		if !isRecord(k) {
			continue
		}
		r, err := decodeRecord(k, e.value, e.created)
		if err != nil {
			t.Fatal(err)
		}
		out[k] = r
	}
	return out
}

func keysBelow(m map[string]*federationv1.Record, dir string) (n int) {
	for k := range m {
		if strings.HasPrefix(k, dir) {
			n++
		}
	}
	return n
}

func TestReport(t *testing.T) {
	t.Parallel()
	forEachEtcd(t, func(t *testing.T, s *Store) {
		ctx := timeout(t)
		join(t, s, "eu-1")
		ss := session(t, s, "eu-1")
		if ss.Epoch() != 1 || ss.Generation() != 1 {
			t.Errorf("epoch %d, generation %d", ss.Epoch(), ss.Generation())
		}
		full := []*federationv1.Record{export("eu-1", "pay", 80), ready("eu-1", "pay", 2), export("eu-1", "cart", 80)}
		w1, err := ss.ReportFull(ctx, full)
		if err != nil || w1.Puts != 3 || w1.Deletes != 0 {
			t.Fatalf("%+v, %v", w1, err)
		}
		pay := fresh(t, s)["export/eu-1/shop/pay"].GetExport()
		if pay.GetAccepted() != w1.Revision.Number {
			t.Errorf("accepted at %d, reported at %v", pay.GetAccepted(), w1.Revision)
		}

		before := etcdRevision(t, s)
		w2, err := ss.ReportFull(ctx, full)
		if err != nil || w2 != (Written{Revision: w1.Revision}) {
			t.Errorf("the same again: %+v, %v", w2, err)
		}
		if w3, err := ss.Report(ctx, full[:1], []string{"export/eu-1/shop/gone"}); err != nil || w3 != (Written{Revision: w1.Revision}) {
			t.Errorf("a delta that changes nothing: %+v, %v", w3, err)
		}
		if after := etcdRevision(t, s); after != before {
			t.Errorf("unchanged reports took etcd from revision %d to %d", before, after)
		}

		w4, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 8080), ready("eu-1", "pay", 3)}, []string{"export/eu-1/shop/cart"})
		if err != nil || w4.Puts != 2 || w4.Deletes != 1 || w4.Revision.Number <= w1.Revision.Number {
			t.Errorf("a delta: %+v, %v", w4, err)
		}
		now := fresh(t, s)
		if got := now["export/eu-1/shop/pay"].GetExport(); got.GetAccepted() != pay.GetAccepted() || got.GetPorts()[0].GetNumber() != 8080 {
			t.Errorf("a changed export: %v, first accepted at %d", got, pay.GetAccepted())
		}
		if now["export/eu-1/shop/cart"] != nil {
			t.Error("a deleted export is still there")
		}

		// Findings are stored, and are not part of the catalog.
		w5, err := ss.Report(ctx, []*federationv1.Record{finding("eu-1", "eu-1")}, nil)
		if err != nil || w5.Puts != 1 || w5.Revision != w4.Revision {
			t.Errorf("a finding: %+v, %v; it must not move the catalog's revision", w5, err)
		}
		stored, err := ss.Stored()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range stored {
			if d := cmp.Diff(fresh(t, s)[r.GetKey()], r, protocmp.Transform()); d != "" {
				t.Errorf("the session's view of %s: %s", r.GetKey(), d)
			}
		}
		if len(stored) != 3 {
			t.Errorf("the session knows %d records, want 3", len(stored))
		}
	})
}

func TestLargeReportIsChunked(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	const n = 300
	var all []*federationv1.Record
	for i := range n {
		all = append(all, export("eu-1", fmt.Sprintf("svc-%03d", i), 80))
	}
	before := etcdRevision(t, s)
	if w, err := ss.ReportFull(ctx, all); err != nil || w.Puts != n {
		t.Fatalf("%+v, %v", w, err)
	}
	if got := etcdRevision(t, s) - before; got != 3 {
		t.Errorf("%d puts took %d transactions, want 3 of at most %d", n, got, maxOps)
	}
	// 40 others, each large: bounded by bytes, not by count; everything old goes,
	// after everything new came.
	big := strings.Repeat("x", 100<<10)
	var large []*federationv1.Record
	for i := range 40 {
		r := export("eu-1", fmt.Sprintf("big-%02d", i), 80)
		r.GetExport().Network = big
		large = append(large, r)
	}
	w := s.Watch()
	defer w.Close()
	seen := records{}
	seen.next(t, w)
	if w, err := ss.ReportFull(ctx, large); err != nil || w.Puts != 40 || w.Deletes != n {
		t.Fatalf("%+v, %v", w, err)
	}
	for keysBelow(seen, "export/") != 40 {
		if b := seen.next(t, w); len(b.Deletes) > 0 && keysBelow(seen, "export/eu-1/shop/big") != 40 {
			t.Fatal("something was deleted before everything was put")
		}
	}
	r := export("eu-1", "huge", 80)
	r.GetExport().Network = strings.Repeat("x", MaxRecordBytes)
	if _, err := ss.Report(ctx, []*federationv1.Record{r}, nil); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a record of more than %d bytes got %v", MaxRecordBytes, err)
	}
}

func TestSessionWritesItsOwnKeysOnly(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	join(t, s, "eu-2")
	ss := session(t, s, "eu-1")
	mismatch := export("eu-2", "pay", 80)
	mismatch.Key = "export/eu-1/shop/pay"
	wrongBody := ready("eu-1", "pay", 1)
	wrongBody.Key = "export/eu-1/shop/pay"
	for name, r := range map[string]*federationv1.Record{
		"another cluster's export": export("eu-2", "pay", 80),
		"a cluster of a like name": export("eu-10", "pay", 80),
		"a foreign body":           mismatch,
		"a body of another kind":   wrongBody,
		"its registration":         memberRecord(member("eu-1")),
		"a controller's policy":    policyRecord("p", "pay", 0),
		"no body":                  {Key: "export/eu-1/shop/pay"},
		"a deeper key":             {Key: "ready/eu-1/shop/pay/x", Body: &federationv1.Record_Readiness{Readiness: &federationv1.Readiness{}}},
		"an empty part":            {Key: "ready/eu-1//pay", Body: &federationv1.Record_Readiness{Readiness: &federationv1.Readiness{}}},
	} {
		before := etcdRevision(t, s)
		if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "ok", 80), r}, nil); !errors.Is(err, ErrForbidden) {
			t.Errorf("%s: %v, want ErrForbidden", name, err)
		}
		if after := etcdRevision(t, s); after != before {
			t.Errorf("%s: something was written", name)
		}
	}
	for _, k := range []string{"head", "meta", "cluster/eu-1", "session/eu-1", "export/eu-2/shop/pay", "vip/eu-1/shop/pay", ""} {
		if _, err := ss.Report(ctx, nil, []string{k}); !errors.Is(err, ErrForbidden) {
			t.Errorf("deleting %q: %v, want ErrForbidden", k, err)
		}
	}
}

func TestStaleSessionChangesNothing(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(context.Context, *testing.T, *Store){
		"taken over": func(_ context.Context, t *testing.T, s *Store) { session(t, s, "eu-1") },
		"taken over by another controller": func(_ context.Context, t *testing.T, s *Store) {
			session(t, open(t, sameEtcd(s)), "eu-1")
		},
		"quarantined": func(ctx context.Context, t *testing.T, s *Store) {
			if _, err := s.Quarantine(ctx, "eu-1", "stolen"); err != nil {
				t.Fatal(err)
			}
		},
		"deregistered": func(ctx context.Context, t *testing.T, s *Store) {
			if _, err := s.Deregister(ctx, "eu-1", "gone"); err != nil {
				t.Fatal(err)
			}
		},
		"enrolled anew": func(ctx context.Context, t *testing.T, s *Store) {
			if err := s.CreateToken(ctx, "eu-1", token("again")); err != nil {
				t.Fatal(err)
			}
			if e, err := s.Enrol(ctx, "again", []byte("new key")); err != nil || e.Member.GetGeneration() != 2 {
				t.Fatal(e, err)
			}
		},
		"restored": func(ctx context.Context, t *testing.T, s *Store) {
			if err := s.BeginIncarnation(ctx); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEtcd(t, 1)
			s := open(t, e.config())
			ctx := timeout(t)
			join(t, s, "eu-1")
			old := session(t, s, "eu-1")
			if _, err := old.ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80), export("eu-1", "cart", 80)}); err != nil {
				t.Fatal(err)
			}
			end(ctx, t, s)
			before := fresh(t, s)
			for range 2 {
				if _, err := old.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 81)}, []string{"export/eu-1/shop/cart"}); !errors.Is(err, ErrStale) {
					t.Errorf("a delta of the stale session got %v", err)
				}
				if _, err := old.ReportFull(ctx, nil); !errors.Is(err, ErrStale) {
					t.Errorf("a full report of the stale session got %v", err)
				}
			}
			if d := cmp.Diff(before, fresh(t, s), protocmp.Transform()); d != "" {
				t.Errorf("the stale session changed: %s", d)
			}
			select {
			case <-old.Done():
			case <-ctx.Done():
				t.Error("nobody told the stale session")
			}
		})
	}
}

// sameEtcd is the config of another process on the same external etcd.
func sameEtcd(s *Store) Config {
	cfg := s.cfg
	cfg.dialOptions, cfg.Metrics = nil, nil
	return cfg
}

func TestRegistrationChangesDuringSession(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}); err != nil {
		t.Fatal(err)
	}
	edit := func(f func(m *federationv1.Member)) {
		t.Helper()
		if _, _, err := s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error { f(m); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	edit(func(m *federationv1.Member) { m.Zone = "eu-b" })
	if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 81)}, nil); err != nil {
		t.Errorf("after a change that allows no more and no less: %v", err)
	}
	edit(func(m *federationv1.Member) { m.Grants = []string{"other/*"} })
	delta := []*federationv1.Record{export("eu-1", "pay", 82)}
	if _, err := ss.Report(ctx, delta, nil); !errors.Is(err, ErrConflict) {
		t.Errorf("a report that was checked against other grants got %v, want ErrConflict", err)
	}
	if got := ss.Member().GetGrants(); len(got) != 1 || got[0] != "other/*" {
		t.Errorf("the session's registration grants %v", got)
	}
	if _, err := ss.Report(ctx, delta, nil); err != nil {
		t.Errorf("checked against the new grants: %v", err)
	}
	// The end of a recovery changes meta, which every write compares.
	if err := s.BeginIncarnation(ctx); err != nil {
		t.Fatal(err)
	}
	ss = session(t, s, "eu-1")
	if err := s.EndRecovery(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := ss.ReportFull(ctx, delta); err != nil {
		t.Errorf("after the end of the recovery: %v", err)
	}
}

func TestNothingIsRemovedBeforeTheFullSetIsIn(t *testing.T) {
	t.Parallel()
	// The controller dies after the first of several transactions of a full
	// report; the agent comes back at another one.
	var f fault
	e := newEtcd(t, 1)
	cfg := e.config()
	cfg.dialOptions = append(cfg.dialOptions, f.option())
	dying, other := open(t, cfg), open(t, e.config())
	ctx := timeout(t)
	join(t, other, "eu-1")
	old, want := []*federationv1.Record{}, []*federationv1.Record{}
	for i := range 150 {
		old = append(old, export("eu-1", fmt.Sprintf("old-%03d", i), 80))
		want = append(want, export("eu-1", fmt.Sprintf("new-%03d", i), 80))
	}
	if _, err := session(t, dying, "eu-1").ReportFull(ctx, old); err != nil {
		t.Fatal(err)
	}
	ss := session(t, dying, "eu-1")
	f.set(func(n int, _ *pb.TxnRequest) verdict {
		if n == 0 {
			return pass
		}
		return refuse
	})
	if _, err := ss.ReportFull(ctx, want); !errors.Is(err, ErrUnknown) {
		t.Fatalf("the dying controller got %v", err)
	}
	if n := keysBelow(fresh(t, other), "export/eu-1/shop/old"); n != len(old) {
		t.Errorf("%d of %d old exports are left, though the full set is not in", n, len(old))
	}
	after := session(t, other, "eu-1")
	// A delta before the full set removes nothing else either.
	if _, err := after.Report(ctx, want[149:], nil); err != nil {
		t.Fatal(err)
	}
	if n := keysBelow(fresh(t, other), "export/eu-1/shop/old"); n != len(old) {
		t.Errorf("%d of %d old exports are left after a delta", n, len(old))
	}
	eventually(t, func() bool { r := other.Reports()["eu-1"]; return r.GetEpoch() == after.Epoch() && !r.GetFull() })
	if w, err := after.ReportFull(ctx, want); err != nil || w.Deletes != len(old) {
		t.Fatalf("%+v, %v", w, err)
	}
	eventually(t, func() bool { r := other.Reports()["eu-1"]; return r.GetEpoch() == after.Epoch() && r.GetFull() })
	if got := keysBelow(fresh(t, other), "export/"); got != len(want) {
		t.Errorf("%d exports, want %d", got, len(want))
	}
	// The dead controller wakes up.
	f.set(nil)
	if _, err := ss.ReportFull(ctx, old); !errors.Is(err, ErrStale) {
		t.Errorf("the woken controller got %v", err)
	}
}

func TestRestartLosesNothing(t *testing.T) {
	t.Parallel()
	cfg := embeddedConfig(t)
	s := open(t, cfg)
	ctx := timeout(t)
	join(t, s, "eu-1")
	if _, err := session(t, s, "eu-1").ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}); err != nil {
		t.Fatal(err)
	}
	before := fresh(t, s)
	s.Close()
	s = open(t, cfg)
	if d := cmp.Diff(before, fresh(t, s), protocmp.Transform()); d != "" {
		t.Errorf("the restart changed: %s", d)
	}
	ss := session(t, s, "eu-1")
	if ss.Epoch() != 2 {
		t.Errorf("epoch %d after the restart, want 2", ss.Epoch())
	}
	// No per-service key hangs on a lease.
	resp, err := raw(t, s).Get(ctx, s.prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		if kv.Lease != 0 && dirOf(strings.TrimPrefix(string(kv.Key), s.prefix)) != dirToken {
			t.Errorf("%s hangs on a lease", kv.Key)
		}
	}
}
