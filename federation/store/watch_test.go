package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/testing/protocmp"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// records is what a consumer knows: the sum of its batches.
type records map[string]*federationv1.Record

// next takes one batch in.
func (r records) next(t testing.TB, w *Watch) Batch {
	t.Helper()
	b, err := w.Next(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	r.take(b)
	return b
}

func (r records) take(b Batch) {
	if b.Full {
		clear(r)
	}
	for _, k := range b.Deletes {
		delete(r, k)
	}
	for _, p := range b.Puts {
		r[p.GetKey()] = p
	}
}

// until takes batches in until the consumer is at what etcd has.
func (r records) until(t testing.TB, w *Watch, want map[string]*federationv1.Record) (batches []Batch) {
	t.Helper()
	for !same(r, want) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		b, err := w.Next(ctx)
		cancel()
		if err != nil {
			t.Fatalf("%v; the watch and a fresh list differ: %s", err, cmp.Diff(want, map[string]*federationv1.Record(r), protocmp.Transform()))
		}
		r.take(b)
		batches = append(batches, b)
	}
	return batches
}

func same(a, b map[string]*federationv1.Record) bool {
	return maps.EqualFunc(a, b, func(x, y *federationv1.Record) bool {
		return cmp.Equal(x, y, protocmp.Transform())
	})
}

func TestWatchFollowsTransactions(t *testing.T) {
	t.Parallel()
	forEachEtcd(t, func(t *testing.T, s *Store) {
		ctx := timeout(t)
		if err := s.Synced(ctx); err != nil {
			t.Fatal(err)
		}
		w := s.Watch()
		defer w.Close()
		seen := records{}
		if b := seen.next(t, w); !b.Full || len(b.Puts) != 0 || b.Revision.Incarnation == "" {
			t.Errorf("the first batch: %+v", b)
		}
		join(t, s, "eu-1")
		ss := session(t, s, "eu-1")
		// One transaction is one batch, at the revision that the writer was told.
		written, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80), ready("eu-1", "pay", 2), export("eu-1", "cart", 80)})
		if err != nil {
			t.Fatal(err)
		}
		var b Batch
		for b = seen.next(t, w); b.Revision != written.Revision; b = seen.next(t, w) {
			if b.Full || len(b.Puts) != 1 {
				t.Errorf("registration and enrolment put one record each: %+v", b)
			}
		}
		if len(b.Puts) != 3 || b.Puts[0].GetExport().GetAccepted() != written.Revision.Number {
			t.Errorf("the report's batch: %+v", b)
		}
		swap, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 81)}, []string{"export/eu-1/shop/cart"})
		if err != nil {
			t.Fatal(err)
		}
		b = seen.next(t, w)
		if b.Revision != swap.Revision || len(b.Puts) != 1 || !slices.Equal(b.Deletes, []string{"export/eu-1/shop/cart"}) {
			t.Errorf("a put and a delete of one transaction: %+v", b)
		}
		// A finding does not move the revision.
		if _, err := ss.Report(ctx, []*federationv1.Record{finding("eu-1", "x")}, nil); err != nil {
			t.Fatal(err)
		}
		if b = seen.next(t, w); b.Revision != swap.Revision || len(b.Puts) != 1 {
			t.Errorf("a finding: %+v", b)
		}
		if d := cmp.Diff(fresh(t, s), map[string]*federationv1.Record(seen), protocmp.Transform()); d != "" {
			t.Error(d)
		}
		late := s.Watch()
		defer late.Close()
		if b, err := late.Next(ctx); err != nil || !b.Full || b.Revision != swap.Revision || len(b.Puts) != len(seen) {
			t.Errorf("a late consumer: %+v, %v", b, err)
		}
	})
}

func TestSlowConsumerLosesNothing(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	w := s.Watch()
	defer w.Close()
	seen := records{}
	seen.until(t, w, fresh(t, s))
	for i := range 5 * maxQueue {
		puts := []*federationv1.Record{export("eu-1", "pay", uint32(i+1)), ready("eu-1", "pay", int32(i+1)), export("eu-1", fmt.Sprintf("svc-%d", i), 80)}
		var deletes []string
		if i > 0 {
			deletes = append(deletes, fmt.Sprintf("export/eu-1/shop/svc-%d", i-1))
		}
		if _, err := ss.Report(ctx, puts, deletes); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { rev, _, _ := s.view.at(); return rev >= etcdRevision(t, s) })
	n := 0
	for want := fresh(t, s); !same(seen, want); n++ {
		b := seen.next(t, w)
		// Whatever was joined, port and readiness are of one transaction.
		if p, r := seen["export/eu-1/shop/pay"], seen["ready/eu-1/shop/pay"]; int32(p.GetExport().GetPorts()[0].GetNumber()) != r.GetReadiness().GetReady() {
			t.Fatalf("half of a transaction at %v", b.Revision)
		}
		if keysBelow(seen, "export/") != 2 {
			t.Fatalf("half of a transaction at %v: %v", b.Revision, slices.Sorted(maps.Keys(seen)))
		}
	}
	if n > maxQueue+1 {
		t.Errorf("%d batches waited for a consumer, at most %d may", n, maxQueue)
	}
}

func TestNextEnds(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	w := s.Watch()
	if _, err := w.Next(timeout(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("its context has ended: %v", err)
	}
	ended := make(chan error)
	go func() { _, err := w.Next(context.Background()); ended <- err }()
	s.Close()
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("the store was closed: %v", err)
	}
}

// cutter is a TCP proxy before an etcd; it can be shut, which cuts all
// connections and lets none through.
type cutter struct {
	url string

	mu    sync.Mutex
	shut  bool
	conns map[net.Conn]struct{}
}

func newCutter(t testing.TB, target string) *cutter {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{url: u.Scheme + "://" + l.Addr().String(), conns: make(map[net.Conn]struct{})}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { c.relay(in, u.Host) })
		}
	})
	t.Cleanup(func() { l.Close(); c.close(); wg.Wait() })
	return c
}

func (c *cutter) relay(in net.Conn, target string) {
	defer in.Close()
	out, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer out.Close()
	c.mu.Lock()
	if c.shut {
		c.mu.Unlock()
		return
	}
	c.conns[in], c.conns[out] = struct{}{}, struct{}{}
	c.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(out, in); out.Close() })
	wg.Go(func() { io.Copy(in, out); in.Close() })
	wg.Wait()
	c.mu.Lock()
	delete(c.conns, in)
	delete(c.conns, out)
	c.mu.Unlock()
}

func (c *cutter) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = true
	for conn := range c.conns {
		conn.Close()
	}
}

func (c *cutter) open() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = false
}

// watched is a store that is followed through a cutter, and one that writes
// past it.
func watched(t *testing.T) (e *testEtcd, c *cutter, reader, writer *Store) {
	t.Helper()
	e = newEtcd(t, 1)
	c = newCutter(t, e.urls[0])
	cfg := e.config()
	cfg.Endpoints = []string{c.url}
	return e, c, open(t, cfg), open(t, e.config())
}

func TestWatchResumesAfterDisconnection(t *testing.T) {
	t.Parallel()
	_, c, reader, writer := watched(t)
	ctx := timeout(t)
	join(t, writer, "eu-1")
	ss := session(t, writer, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "gone", 80), export("eu-1", "kept", 80)}); err != nil {
		t.Fatal(err)
	}
	w := reader.Watch()
	defer w.Close()
	seen := records{}
	seen.until(t, w, fresh(t, writer))
	c.close()
	for i := range 10 {
		if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", uint32(i+1))}, []string{"export/eu-1/shop/gone"}); err != nil {
			t.Fatal(err)
		}
	}
	c.open()
	batches := seen.until(t, w, fresh(t, writer))
	if len(batches) != 10 {
		t.Errorf("10 transactions during the disconnection came in %d batches", len(batches))
	}
	if n := testutil.ToFloat64(reader.metrics.relists.WithLabelValues("compacted")); n != 0 {
		t.Error("it listed anew without need")
	}
}

func TestCompactionUnderAWatch(t *testing.T) {
	t.Parallel()
	_, c, reader, writer := watched(t)
	ctx := timeout(t)
	join(t, writer, "eu-1")
	ss := session(t, writer, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "gone", 80), export("eu-1", "kept", 80)}); err != nil {
		t.Fatal(err)
	}
	w := reader.Watch()
	defer w.Close()
	seen := records{}
	seen.until(t, w, fresh(t, writer))
	c.close()
	if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}, []string{"export/eu-1/shop/gone"}); err != nil {
		t.Fatal(err)
	}
	if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "pay", 81)}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := raw(t, writer).Compact(ctx, etcdRevision(t, writer)); err != nil {
		t.Fatal(err)
	}
	c.open()
	batches := seen.until(t, w, fresh(t, writer))
	// The list finds what the events that are gone would have told, the delete
	// included, and the unchanged export is not repeated.
	if len(batches) != 1 || batches[0].Full || len(batches[0].Puts) != 1 || !slices.Equal(batches[0].Deletes, []string{"export/eu-1/shop/gone"}) {
		t.Errorf("after the compaction: %+v", batches)
	}
	if n := testutil.ToFloat64(reader.metrics.relists.WithLabelValues("compacted")); n != 1 {
		t.Errorf("%v relists because of compaction, want 1", n)
	}
	// It follows again.
	if _, err := ss.Report(ctx, []*federationv1.Record{export("eu-1", "more", 80)}, nil); err != nil {
		t.Fatal(err)
	}
	seen.until(t, w, fresh(t, writer))
}

func TestRestartUnderAWatch(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d members", size), func(t *testing.T) {
			e := newEtcd(t, size)
			s := open(t, e.config())
			join(t, s, "eu-1")
			ss := session(t, s, "eu-1")
			w := s.Watch()
			defer w.Close()
			seen := records{}
			for round := range size {
				if _, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", fmt.Sprintf("before-%d", round), 80)}, nil); err != nil {
					t.Fatal(err)
				}
				// With three members this stops the leader at least once.
				e.stopMember(round)
				if size == 3 {
					// Two of three go on.
					if _, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", fmt.Sprintf("during-%d", round), 80)}, nil); err != nil {
						t.Fatal(err)
					}
					seen.until(t, w, fresh(t, s))
				}
				e.startMember(round)
				if _, err := ss.Report(timeout(t), []*federationv1.Record{export("eu-1", fmt.Sprintf("after-%d", round), 80)}, nil); err != nil {
					t.Fatal(err)
				}
				seen.until(t, w, fresh(t, s))
			}
			if want := 3*size + 1 - map[int]int{1: 1, 3: 0}[size]; len(seen) != want {
				t.Errorf("%d records, want %d", len(seen), want)
			}
		})
	}
}

// A view that is wrong is mended by the comparison with a fresh list.
func TestVerificationMends(t *testing.T) {
	t.Parallel()
	cfg := embeddedConfig(t)
	cfg.VerifyEvery = 20 * time.Millisecond
	s := open(t, cfg)
	ctx := timeout(t)
	join(t, s, "eu-1")
	if _, err := session(t, s, "eu-1").ReportFull(ctx, []*federationv1.Record{export("eu-1", "a", 80), export("eu-1", "b", 80)}); err != nil {
		t.Fatal(err)
	}
	w := s.Watch()
	defer w.Close()
	seen := records{}
	seen.until(t, w, fresh(t, s))
	// As if an event had been missed, and another been made up.
	s.view.mu.Lock()
	delete(s.view.items, "export/eu-1/shop/a")
	s.view.items["export/eu-1/shop/ghost"] = item{created: 1, modified: 1, record: export("eu-1", "ghost", 80)}
	s.view.mu.Unlock()
	b := seen.next(t, w)
	if !slices.Equal(b.Deletes, []string{"export/eu-1/shop/ghost"}) || len(b.Puts) != 1 || b.Full {
		t.Errorf("the mending batch: %+v", b)
	}
	if n := testutil.ToFloat64(s.metrics.repairs); n != 2 {
		t.Errorf("%v repairs, want 2", n)
	}
}

// A value that cannot be read changes nothing, and stops nothing.
func TestBadValueKeepsTheLastGoodOne(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	ss := session(t, s, "eu-1")
	if _, err := ss.ReportFull(ctx, []*federationv1.Record{export("eu-1", "pay", 80)}); err != nil {
		t.Fatal(err)
	}
	w := s.Watch()
	defer w.Close()
	seen := records{}
	good := fresh(t, s)
	seen.until(t, w, good)
	c := raw(t, s)
	for i, bad := range []string{"\xff\xff", "", strings.Repeat("x", 100)} {
		if _, err := c.Put(ctx, s.prefix+"export/eu-1/shop/pay", bad); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Put(ctx, s.prefix+"unheard/of", bad); err != nil {
			t.Fatal(err)
		}
		good["drain/eu-1"] = drain("eu-1", int32(i+1))
		var old *federationv1.Record
		if i > 0 {
			old = drain("eu-1", int32(i))
		}
		if _, err := s.Swap(ctx, Swap{Key: "drain/eu-1", Old: old, New: good["drain/eu-1"]}); err != nil {
			t.Fatal(err)
		}
		seen.until(t, w, good)
	}
	if n := testutil.ToFloat64(s.metrics.badValues); n < 3 {
		t.Errorf("%v bad values were counted", n)
	}
}
