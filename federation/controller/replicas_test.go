package controller

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Two controllers that make one mesh at once make one, and serve the same.
func TestTwoControllersAreOneMesh(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	cfgs := []Config{m.config("one"), m.config("two")}
	started := make([]*Started, 2)
	var wg sync.WaitGroup
	for i, cfg := range cfgs {
		wg.Go(func() {
			var err error
			if started[i], err = Start(timeout(t), cfg); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, s := range started {
		defer s.Stop()
	}
	one, two := started[0], started[1]
	if a, b := must(one.trust.pin())(t), must(two.trust.pin())(t); a != b {
		t.Fatalf("two roots: %v and %v", a, b)
	}

	// What is done at one is there at the other, and agents of the two see each
	// other.
	eu1 := m.join(one, "eu-1")
	eu2, _, err := m.enroll(two.Address(), m.register(one, "eu-2"), mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	a, b := m.mustConnect(eu1, one.Address(), nil), m.mustConnect(eu2, two.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	b.reportFull(offer("eu-2", "payments", 1)...)
	for _, x := range []*testAgent{a, b} {
		x.until("both exports", func() bool {
			return x.have["ready/eu-1/shop/payments"] != nil && x.have["ready/eu-2/shop/payments"] != nil
		})
	}
	eventually(t, "both are at one revision", func() bool {
		x, y := one.state.current().Catalog, two.state.current().Catalog
		return x.Revision() == y.Revision() && one.state.current().World.Digest() == two.state.current().World.Digest()
	})
	// Addresses may still be given out: what counts is that the two end alike.
	eventually(t, "two equal lists", func() bool {
		lists := make([]*federationv1.ListResponse, 2)
		for i, c := range started {
			lists[i] = must(m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_SERVICE}))(t)
		}
		return proto.Equal(lists[0], lists[1])
	})
	st := must(m.adminClient(two).GetStatus(timeout(t), &federationv1.GetStatusRequest{}))(t)
	if len(st.GetControllers()) != 2 {
		t.Errorf("controllers: %v", st.GetControllers())
	}
}

// A session moves from a controller that dies to the other, and loses nothing.
func TestEitherControllerMayDie(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	one, two := m.start("one"), m.start("two")
	eu1, eu2 := m.join(one, "eu-1"), m.join(one, "eu-2")
	a, b := m.mustConnect(eu1, one.Address(), nil), m.mustConnect(eu2, two.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	a.until("a full set", func() bool { return a.full && a.have["ready/eu-1/shop/payments"] != nil })
	b.until("the export", func() bool { return b.have["ready/eu-1/shop/payments"] != nil })
	gone := watchFor(b, "export/eu-1/shop/payments")

	if err := one.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.ended(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream of the stopped controller ended with %v", err)
	}
	again := m.mustConnect(eu1, two.Address(), a)
	again.until("a full set", func() bool { return again.full })
	if len(again.welcome.GetDiffering()) == federationv1.Buckets {
		t.Error("everything is sent again though the agent has it")
	}
	again.reportFull(offer("eu-1", "payments", 1)...)
	b.until("a change by the session that moved", func() bool {
		return b.have["ready/eu-1/shop/payments"].GetReadiness().GetReady() == 1
	})
	if gone() {
		t.Error("the export was away in between")
	}
	eventually(t, "the other leads", func() bool {
		leader, err := two.store.Leader(timeout(t), election)
		return err == nil && leader == "two"
	})
	eu3, _, err := m.enroll(two.Address(), m.register(two, "us-1"), mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	c := m.mustConnect(eu3, two.Address(), nil)
	c.until("addresses by the new leader", func() bool { return c.have["vip/us-1/shop/payments"] != nil })
}

// watchFor says whether an agent was ever without a key, from now on.
func watchFor(a *testAgent, key string) (wasGone func() bool) {
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan bool, 1)
	go func() {
		missing := false
		for {
			a.mu.Lock()
			changed := a.changed
			if a.have[key] == nil && a.err == nil {
				missing = true
			}
			a.mu.Unlock()
			select {
			case <-changed:
			case <-ctx.Done():
				gone <- missing
				return
			}
		}
	}()
	return func() bool { cancel(); return <-gone }
}

// A second connection of a cluster takes over, here or elsewhere.
func TestASessionIsTakenOver(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	one, two := m.start("one"), m.start("two")
	eu1 := m.join(one, "eu-1")
	first := m.mustConnect(eu1, one.Address(), nil)
	second := m.mustConnect(eu1, one.Address(), nil)
	if err := first.ended(); status.Code(err) != codes.Aborted {
		t.Errorf("taken over at the same controller: %v", err)
	}
	third := m.mustConnect(eu1, two.Address(), nil)
	if err := second.ended(); status.Code(err) != codes.Aborted {
		t.Errorf("taken over at another controller: %v", err)
	}
	if first.welcome.GetEpoch() >= second.welcome.GetEpoch() || second.welcome.GetEpoch() >= third.welcome.GetEpoch() {
		t.Errorf("epochs %d, %d, %d", first.welcome.GetEpoch(), second.welcome.GetEpoch(), third.welcome.GetEpoch())
	}
	third.reportFull(offer("eu-1", "payments", 2)...)
	eventually(t, "the cluster is shown where its session is", func() bool {
		p := one.store.Presences()["eu-1"]
		return p.GetController() == "two" && p.GetInstance() == "agent-1"
	})
}

// Why and call are answered by the agent, wherever its session is.
func TestAnAgentAnswersThroughEitherController(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	one, two := m.start("one"), m.start("two")
	eu1 := m.join(one, "eu-1")
	a, err := m.connectWith(eu1, one.Address(), func(q *federationv1.Question) *federationv1.Answer {
		if call := q.GetCall(); call != nil {
			return &federationv1.Answer{Answer: &federationv1.Answer_Call{Call: &federationv1.CallResponse{Status: 200, Body: "from " + call.GetFrom()}}}
		}
		if q.GetWhy().GetName() == "broken" {
			return &federationv1.Answer{Error: "no such service here"}
		}
		return &federationv1.Answer{Answer: &federationv1.Answer_Why{Why: &federationv1.WhyResponse{World: "the agent's"}}}
	})
	if err != nil {
		t.Fatal(err)
	}
	a.reportFull(offer("eu-1", "payments", 2)...)
	why := &federationv1.WhyRequest{Namespace: "shop", Name: "payments", From: "eu-1"}
	call := &federationv1.CallRequest{Namespace: "shop", Name: "payments", Port: 80, From: "eu-1"}
	eventually(t, "both controllers know where the agent is", func() bool {
		return one.store.Presences()["eu-1"] != nil && two.store.Presences()["eu-1"] != nil
	})
	for _, c := range []*Started{one, two} {
		got, err := m.adminClient(c).Why(timeout(t), why)
		if err != nil || got.GetPredicted() || got.GetWorld() != "the agent's" {
			t.Errorf("why at %s: %v, %v", c.cfg.Name, got, err)
		}
		called, err := m.adminClient(c).Call(timeout(t), call)
		if err != nil || called.GetBody() != "from eu-1" {
			t.Errorf("call at %s: %v, %v", c.cfg.Name, called, err)
		}
		got, err = m.adminClient(c).Why(timeout(t), &federationv1.WhyRequest{Namespace: "shop", Name: "broken", From: "eu-1"})
		if err != nil || !got.GetPredicted() || got.GetPredictedBecause() == "" {
			t.Errorf("an agent that cannot answer, at %s: %v, %v", c.cfg.Name, got, err)
		}
	}
	// Without its agent a cluster's plan is predicted, and no call is made.
	a.cancel()
	eventually(t, "both know that it is gone", func() bool {
		return one.store.Presences()["eu-1"] == nil && two.store.Presences()["eu-1"] == nil
	})
	for _, c := range []*Started{one, two} {
		got, err := m.adminClient(c).Why(timeout(t), why)
		if err != nil || !got.GetPredicted() || got.GetPlan().GetVerdicts()[0].GetCluster() != "eu-1" {
			t.Errorf("predicted at %s: %v, %v", c.cfg.Name, got, err)
		}
		if _, err := m.adminClient(c).Call(timeout(t), call); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a call from nobody: %v", err)
		}
	}
	if _, err := m.adminClient(one).Why(timeout(t), &federationv1.WhyRequest{Namespace: "shop", Name: "payments", From: "nowhere"}); status.Code(err) != codes.NotFound {
		t.Errorf("from an unknown cluster: %v", err)
	}
}

// What an agent says of itself shows at every controller.
func TestStatusIsSeenEverywhere(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	one, two := m.start("one"), m.start("two")
	a := m.mustConnect(m.join(one, "eu-1"), one.Address(), nil)
	a.until("a full set", func() bool { return a.full })
	rev := federationv1.EncodeRevision(a.rev)
	a.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Status{Status: &federationv1.Status{
		Applied: rev, Acked: rev,
		Gateways: []*federationv1.Gateway{{Cluster: "another", Name: "gw-1", ConnectedSince: timestamppb.Now()}},
	}}})
	for _, c := range []*Started{one, two} {
		eventually(t, "the status is at "+c.cfg.Name, func() bool {
			list := must(m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_CLUSTER}))(t)
			got := list.GetObjects()[0].GetCluster()
			return got.GetAcked().GetNumber() == rev.GetNumber() && got.GetGateways() == 1 && got.GetSession() == "one"
		})
		list := must(m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_GATEWAY}))(t)
		if g := list.GetObjects()[0].GetGateway(); g.GetName() != "gw-1" || g.GetCluster() != "eu-1" {
			t.Errorf("gateway at %s: %v; its cluster is the one whose agent speaks", c.cfg.Name, g)
		}
	}
}

// A watched list comes again when it differs.
func TestWatch(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	ctx, cancel := context.WithCancel(timeout(t))
	defer cancel()
	w, err := m.adminClient(c).Watch(ctx, &federationv1.WatchRequest{List: &federationv1.ListRequest{Kind: federationv1.Kind_KIND_CLUSTER}})
	if err != nil {
		t.Fatal(err)
	}
	if first := must(w.Recv())(t); len(first.GetList().GetObjects()) != 0 {
		t.Errorf("first: %v", first)
	}
	m.register(c, "eu-1")
	if next := must(w.Recv())(t); len(next.GetList().GetObjects()) != 1 {
		t.Errorf("next: %v", next)
	}
	cancel()
	if _, err := w.Recv(); !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		t.Errorf("after the end: %v", err)
	}
}

// Nothing that is reported again, and no status, changes the catalog.
func TestAnUnchangedReportWritesNothing(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	a := m.mustConnect(m.join(c, "eu-1"), c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	a.until("its own address", func() bool { return a.have["vip/eu-1/shop/payments"] != nil })
	before := c.state.current().Catalog.Revision()
	for range 3 {
		a.reportFull(offer("eu-1", "payments", 2)...)
		a.report(&federationv1.Report{Puts: offer("eu-1", "payments", 2)})
	}
	a.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Status{Status: &federationv1.Status{}}})
	time.Sleep(50 * time.Millisecond) // what would come, comes at once
	if after := c.state.current().Catalog.Revision(); after != before {
		t.Errorf("the catalog went from %v to %v", before, after)
	}
	keys := slices.Sorted(maps.Keys(a.have))
	if !slices.Contains(keys, "bundle") || !slices.Contains(keys, "cluster/eu-1") {
		t.Errorf("the agent has %v", keys)
	}
}
