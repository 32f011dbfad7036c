package controller

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// A controller that is started before its etcd waits for it, and says so.
func TestEtcdMayStartLater(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	cfg := m.config("one")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	cfg.Store.Endpoints = []string{"http://" + addr}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "it says what it waits for", func() bool {
		err := c.Ready(ctx)
		return err != nil && strings.Contains(err.Error(), addr) && c.StoreReady(ctx) != nil
	})
	r, err := newRelayAt(addr, "unix", filepath.Join(etcd.dir, "client.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	select {
	case <-c.serving:
	case err := <-ended:
		ended <- err
		t.Fatal("it has given up")
	case <-time.After(30 * time.Second):
		t.Fatal("it does not serve")
	}
	if err := c.StoreReady(ctx); err != nil {
		t.Error(err)
	}
}

func TestAWrongEtcdEndpointIsNamed(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	m := newTestMesh(t, clock.Real())
	cfg := m.config("one")
	cfg.Store.Endpoints = []string{web.URL}
	s, err := Start(timeout(t), cfg)
	if err == nil {
		s.Stop()
		t.Fatal("it has started over a web server")
	}
	if !strings.Contains(err.Error(), web.URL) || !strings.Contains(err.Error(), "etcd") {
		t.Errorf("says %q", err)
	}
}

func TestWrongConfigurations(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"name":    func(c *Config) { c.Name = "Not A Label" },
		"region":  func(c *Config) { c.Region = "root" },
		"address": func(c *Config) { c.Advertise = "nowhere" },
		"life":    func(c *Config) { c.Lifetimes = shortLifetimes(); c.Lifetimes.Leaf = time.Minute },
	} {
		m := newTestMesh(t, clock.Real())
		cfg := m.config("one")
		edit(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
		cfg.Listener.Close()
	}
}

// While etcd is away, what is known is still served, and nothing is lost: the
// next session reports again.
func TestEtcdMayGoAway(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	cfg := m.config("one")
	etcd.endpoint(t)
	r, err := relayToSocket(filepath.Join(etcd.dir, "client.sock"))
	if err != nil {
		t.Fatal(err)
	}
	addr := r.addr()
	cfg.Store.Endpoints = []string{"http://" + addr}
	c := m.startWith(cfg)
	cred := m.join(c, "eu-1")
	a, b := m.mustConnect(cred, c.Address(), nil), m.mustConnect(m.join(c, "eu-2"), c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	b.until("the export", func() bool { return b.have["ready/eu-1/shop/payments"] != nil })
	wasGone := watchFor(b, "export/eu-1/shop/payments")
	r.close()
	short, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	// A person's role cannot be read now.
	if _, err := m.adminClient(c).GetStatus(short, &federationv1.GetStatusRequest{}); status.Code(err) != codes.Unavailable && status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("an operator while etcd is away: %v", err)
	}
	again, err := newRelayAt(addr, "unix", filepath.Join(etcd.dir, "client.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(again.close)
	eventually(t, "etcd is there again", func() bool { return c.StoreReady(timeout(t)) == nil })
	back := a
	eventually(t, "the agent can report again", func() bool {
		if back.isOver() {
			var err error
			if back, err = m.connect(cred, c.Address(), a); err != nil {
				back = a
				return false
			}
		}
		return back.tryReport(offer("eu-1", "payments", 1)...)
	})
	b.until("a change after the outage", func() bool { return b.have["ready/eu-1/shop/payments"].GetReadiness().GetReady() == 1 })
	if wasGone() {
		t.Error("the export was away in between")
	}
}

// What is no conversation ends the stream, and nothing else.
func TestNonsenseEndsItsStreamOnly(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1, eu2 := m.join(c, "eu-1"), m.join(c, "eu-2")
	bystander := m.mustConnect(eu2, c.Address(), nil)
	speak := func(messages ...*federationv1.SyncRequest) error {
		stream, err := federationv1.NewSyncClient(m.dial(eu1, c.Address())).Sync(timeout(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, msg := range messages {
			if err := stream.Send(msg); err != nil && err != io.EOF {
				t.Fatal(err)
			}
		}
		for {
			if _, err := stream.Recv(); err != nil {
				return err
			}
		}
	}
	hello := &federationv1.SyncRequest{Message: &federationv1.SyncRequest_Hello{Hello: &federationv1.Hello{}}}
	big := &federationv1.Record{Key: strings.Repeat("k", 5<<20)}
	for name, tt := range map[string]struct {
		messages []*federationv1.SyncRequest
		want     codes.Code
	}{
		"a report before the hello": {[]*federationv1.SyncRequest{report()}, codes.InvalidArgument},
		"an empty message":          {[]*federationv1.SyncRequest{{}}, codes.InvalidArgument},
		"two hellos":                {[]*federationv1.SyncRequest{hello, hello}, codes.InvalidArgument},
		"a digest of three buckets": {[]*federationv1.SyncRequest{{Message: &federationv1.SyncRequest_Hello{
			Hello: &federationv1.Hello{Digest: &federationv1.Digest{Buckets: []uint64{1, 2, 3}}},
		}}}, codes.InvalidArgument},
		"five megabytes": {[]*federationv1.SyncRequest{hello, report(big)}, codes.ResourceExhausted},
		"an endless set": {[]*federationv1.SyncRequest{hello, manyRecords(30_000)}, codes.ResourceExhausted},
	} {
		if err := speak(tt.messages...); status.Code(err) != tt.want {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	bystander.reportFull(offer("eu-2", "payments", 1)...)
}

func report(records ...*federationv1.Record) *federationv1.SyncRequest {
	return &federationv1.SyncRequest{Message: &federationv1.SyncRequest_Report{Report: &federationv1.Report{Puts: records}}}
}

func manyRecords(n int) *federationv1.SyncRequest {
	r := &federationv1.Report{FullBegin: true}
	for range n {
		r.Puts = append(r.Puts, &federationv1.Record{Key: "x"})
	}
	return &federationv1.SyncRequest{Message: &federationv1.SyncRequest_Report{Report: r}}
}

func TestLimits(t *testing.T) {
	l := newLimits()
	now := time.Now()
	for i := range enrollBurst {
		if err := l.enroll("192.0.2.1", now); err != nil {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
	if err := l.enroll("192.0.2.1", now); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("past the burst: %v", err)
	}
	if err := l.enroll("192.0.2.2", now); err != nil {
		t.Errorf("another address: %v", err)
	}
	if err := l.enroll("192.0.2.1", now.Add(time.Second)); err != nil {
		t.Errorf("a second later: %v", err)
	}
	few := &limiters{rate: 1, burst: 1, by: map[string]*limiter{}}
	for i := range 3 * limitersKept {
		few.allow(federation.Address{Host: "host", Port: uint16(i)}.String()+string(rune(i)), now)
	}
	if n := len(few.by); n > limitersKept+1 {
		t.Errorf("%d sources are remembered", n)
	}
	few.allow("later", now.Add(2*limiterForgets))
	if n := len(few.by); n > 2 {
		t.Errorf("%d sources are remembered after a quiet time", n)
	}
}
