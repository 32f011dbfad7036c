package controller

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// After a restore nothing is taken from anybody before every member has
// reported.
func TestARestoreTakesNothingAway(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(20, 0)
	m := newTestMesh(t, clk)
	c := m.start("one")
	eu1, eu2 := m.join(c, "eu-1"), m.join(c, "eu-2")
	a, b := m.mustConnect(eu1, c.Address(), nil), m.mustConnect(eu2, c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	b.reportFull(offer("eu-2", "payments", 2)...)
	a.until("both offers", func() bool {
		return a.have["ready/eu-1/shop/payments"] != nil && a.have["ready/eu-2/shop/payments"] != nil
	})

	if err := c.store.BeginIncarnation(timeout(t)); err != nil {
		t.Fatal(err)
	}
	a.ended()
	b.ended()
	// The agent brings what the restored store has forgotten.
	a.have["export/us-1/shop/payments"] = federationv1.ExportRecord(testExport("us-1", "payments"))
	again := m.mustConnect(eu1, c.Address(), a)
	if again.welcome.GetReported() != nil {
		t.Error("an agent is told that it need not report")
	}
	again.reportFull(offer("eu-1", "payments", 2)...)
	st := must(m.adminClient(c).GetStatus(timeout(t), &federationv1.GetStatusRequest{}))(t)
	if !st.GetRecovering() {
		t.Error("the status does not say that the store is recovering")
	}
	if again.hold("export/us-1/shop/payments") == nil || again.hold("export/eu-2/shop/payments") == nil {
		t.Error("something was taken away during the recovery")
	}
	began := clk.Now()
	eventually(t, "enough time for a recovery to end", func() bool { return clk.Now().Sub(began) > recoverySettles })
	if again.isFull() {
		t.Error("the set is called full though a member has not reported")
	}
	other := m.mustConnect(eu2, c.Address(), b)
	other.reportFull(offer("eu-2", "payments", 1)...)
	again.until("the full set, once all have reported", func() bool { return again.full && again.have["export/us-1/shop/payments"] == nil })
	again.until("and the news", func() bool { return again.have["ready/eu-2/shop/payments"].GetReadiness().GetReady() == 1 })
}

// A denial that the backup is too old to hold comes back from the agents.
func TestARestoreForgetsNoDenial(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1 := m.join(c, "eu-1")
	m.join(c, "eu-2")
	denial := federationv1.EncodeDenial(federation.Denial{Cluster: "eu-2", Generation: 1, IssuedBefore: time.Now(), Reason: "stolen"})
	a := m.mustConnect(eu1, c.Address(), nil)
	tell := func(x *testAgent) {
		x.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Status{Status: &federationv1.Status{Denials: []*federationv1.Denial{denial}}}})
	}
	tell(a)
	a.reportFull() // handled after the status
	if _, ok := c.state.fact(federationv1.DenialKey("eu-2", 1)); ok {
		t.Fatal("an agent has denied another cluster")
	}
	if err := c.store.BeginIncarnation(timeout(t)); err != nil {
		t.Fatal(err)
	}
	a.ended()
	again := m.mustConnect(eu1, c.Address(), a)
	tell(again)
	again.until("the denial, for everybody", func() bool { return again.have["deny/eu-2/1"] != nil })
}

// A cluster with a valid identity that the store does not know is pending.
func TestAnUnknownClusterIsPending(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	cred := m.join(c, "eu-1")
	ghost := m.ghost(c, cred, "eu-9")
	if _, err := m.connect(ghost, c.Address(), nil); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("an unregistered cluster: %v", err)
	}
	eventually(t, "it is shown as pending", func() bool {
		list := must(m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_CLUSTER, Name: "eu-9"}))(t)
		return len(list.GetObjects()) == 1 && list.GetObjects()[0].GetCluster().GetMember().GetState() == federationv1.MemberState_MEMBER_STATE_PENDING
	})
	if _, err := m.connect(ghost, c.Address(), nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a pending cluster: %v", err)
	}
}
