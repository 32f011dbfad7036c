package store

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/testing/protocmp"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Restored to an earlier state, by a copy of the data directory: the same etcd
// cluster id, a lower revision.
func TestRestoreToLowerRevision(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	s := open(t, e.config())
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "old", 80), export("eu-1", "same", 80)}); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateToken(ctx, "eu-1", token("unused")); err != nil {
		t.Fatal(err)
	}
	e.stop()
	backup := filepath.Join(testDir(t), "backup")
	if err := os.CopyFS(backup, os.DirFS(e.configs[0].Dir)); err != nil {
		t.Fatal(err)
	}
	e.start()
	if _, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", "new", 80), export("eu-1", "same", 81)}, []string{"export/eu-1/shop/old"}); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if _, err := ss.Report(timeout(t), []*federationv1.Record{ready("eu-1", "same", int32(i))}, nil); err != nil {
			t.Fatal(err)
		}
	}
	w := s.Watch()
	defer w.Close()
	seen := records{}
	last := seen.until(t, w, fresh(t, s))
	before := last[len(last)-1].Revision

	e.stop()
	e.configs[0].Dir = backup
	e.start()
	afterRestore(t, s, w, seen, before.Incarnation, ss)
}

// A process that writes right after a restore finds out by its own reads and
// writes, before its watch does.
func TestWriterNoticesRestore(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	s := open(t, e.config())
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "old", 80)}); err != nil {
		t.Fatal(err)
	}
	e.stop()
	backup := filepath.Join(testDir(t), "backup")
	if err := os.CopyFS(backup, os.DirFS(e.configs[0].Dir)); err != nil {
		t.Fatal(err)
	}
	e.start()
	w, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", "new", 80)}, nil)
	for i := range 10 {
		if err == nil {
			w, err = ss.Report(timeout(t), []*federationv1.Record{ready("eu-1", "new", int32(i))}, nil)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if m, err := s.Member(timeout(t), "eu-1"); err != nil || m == nil {
		t.Fatal(err)
	}
	e.stop()
	e.configs[0].Dir = backup
	e.start()
	p, err := s.PutPolicy(timeout(t), policyRecord("p", "pay", 1).GetPolicy())
	if err != nil || p.Revision.Incarnation == w.Revision.Incarnation {
		t.Errorf("a write after the restore: %+v, %v; before it the catalog was at %v", p, err, w.Revision)
	}
	if _, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", "newer", 80)}, nil); !errors.Is(err, ErrStale) {
		t.Errorf("a session from before the restore: %v, want ErrStale", err)
	}
	// A session of the new incarnation stays, though the watch is behind.
	fresh := session(t, s, "eu-1")
	eventually(t, func() bool { _, _, now := s.view.at(); return now == p.Revision.Incarnation })
	select {
	case <-fresh.Done():
		t.Error("the new session was ended")
	default:
	}
	if _, err := fresh.ReportFull(timeout(t), []*federationv1.Record{export("eu-1", "newer", 80)}); err != nil {
		t.Error(err)
	}
}

// Restored into another etcd cluster: another cluster id, with revisions of
// its own.
func TestRestoreIntoAnotherCluster(t *testing.T) {
	t.Parallel()
	for _, higher := range []bool{false, true} {
		t.Run(fmt.Sprintf("at a higher revision: %v", higher), func(t *testing.T) {
			e := newEtcd(t, 1)
			s := open(t, e.config())
			ctx := timeout(t)
			join(t, s, "eu-1")
			ss := session(t, s, "eu-1")
			if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "old", 80), export("eu-1", "same", 80)}); err != nil {
				t.Fatal(err)
			}
			if err := s.CreateToken(ctx, "eu-1", token("unused")); err != nil {
				t.Fatal(err)
			}
			kvs, err := raw(t, s).Get(ctx, "", clientv3.WithPrefix())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "new", 80), export("eu-1", "same", 81)}, []string{"export/eu-1/shop/old"}); err != nil {
				t.Fatal(err)
			}
			for i := range 20 {
				if _, err := ss.Report(ctx, []*federationv1.Record{ready("eu-1", "same", int32(i))}, nil); err != nil {
					t.Fatal(err)
				}
			}
			w := s.Watch()
			defer w.Close()
			seen := records{}
			last := seen.until(t, w, fresh(t, s))
			before := last[len(last)-1].Revision

			e.stop()
			other := *e.configs[0]
			other.Dir = filepath.Join(testDir(t), "etcd")
			other.InitialClusterToken = "another"
			// It must not serve before it holds the backup.
			public := other.ListenClientUrls
			other.ListenClientUrls = []url.URL{{Scheme: "http", Host: loopback() + ":2379"}}
			e.configs[0] = &other
			e.start()
			fill(t, other.ListenClientUrls[0].String(), kvs, higher)
			e.stop()
			other.ListenClientUrls = public
			e.start()
			afterRestore(t, s, w, seen, before.Incarnation, ss)
		})
	}
}

// fill writes what was backed up.
func fill(t *testing.T, endpoint string, kvs *clientv3.GetResponse, higher bool) {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := timeout(t)
	for _, kv := range kvs.Kvs {
		if strings.Contains(string(kv.Key), "/"+dirPresence) {
			continue
		}
		if _, err := c.Put(ctx, string(kv.Key), string(kv.Value)); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; higher && i < 200; i++ {
		if _, err := c.Put(ctx, "/elsewhere", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
}

// afterRestore checks that a running process notices the restore: everything is
// listed anew in a new, recovering incarnation, tokens are gone, and a session
// from before writes nothing.
func afterRestore(t *testing.T, s *Store, w *Watch, seen records, incarnation string, old *Session) {
	t.Helper()
	var b Batch
	for b = seen.next(t, w); !b.Full; b = seen.next(t, w) {
	}
	if b.Revision.Incarnation == incarnation || !b.Recovering {
		t.Errorf("after the restore: revision %v, recovering %v; the incarnation was %s", b.Revision, b.Recovering, incarnation)
	}
	if !slices.Contains(b.Deletes, "export/eu-1/shop/new") {
		t.Errorf("what the backup does not have is not told: %v", b.Deletes)
	}
	if seen["export/eu-1/shop/old"] == nil || seen["export/eu-1/shop/same"].GetExport().GetPorts()[0].GetNumber() != 80 {
		t.Error("what the backup has is not there")
	}
	restored := fresh(t, s)
	if d := cmp.Diff(restored, map[string]*federationv1.Record(seen), protocmp.Transform()); d != "" {
		t.Error(d)
	}
	if _, err := old.Report(timeout(t), []*federationv1.Record{export("eu-1", "stale", 80)}, nil); !errors.Is(err, ErrStale) {
		t.Errorf("a session from before the restore: %v, want ErrStale", err)
	}
	if _, err := s.Enrol(timeout(t), "unused", []byte("key")); !errors.Is(err, ErrToken) {
		t.Errorf("a token of the backup: %v", err)
	}
	select {
	case <-old.Done():
	case <-timeout(t).Done():
		t.Error("nobody told the session from before")
	}
	ss := session(t, s, "eu-1")
	if _, err := ss.ReportFull(timeout(t), []*federationv1.Record{export("eu-1", "new", 80)}); err != nil {
		t.Fatal(err)
	}
	seen.until(t, w, fresh(t, s))
	if err := s.EndRecovery(timeout(t)); err != nil {
		t.Fatal(err)
	}
	for b = seen.next(t, w); b.Recovering; b = seen.next(t, w) {
	}
	if b.Full {
		t.Error("the end of the recovery repeats everything")
	}
}
