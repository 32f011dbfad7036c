package controller

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// silenceOf is what an agent knows of a cluster's silence.
func silenceOf(a *testAgent, cluster string) time.Duration {
	return a.have["liveness/"+cluster].GetSilence().GetSilent().AsDuration()
}

// One cluster of three falls silent: it is suspect, then expired, and fresh
// again when it is heard.
func TestASilentClusterExpires(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(20, 0)
	m := newTestMesh(t, clk)
	c := m.start("one")
	creds := []*credential{m.join(c, "eu-1"), m.join(c, "eu-2"), m.join(c, "us-1")}
	agents := make([]*testAgent, 3)
	for i, cred := range creds {
		agents[i] = m.mustConnect(cred, c.Address(), nil)
	}
	spoke := clk.Now() // the agent's last words come now or later
	agents[0].reportFull(offer("eu-1", "payments", 2)...)
	watcher := agents[1]
	watcher.until("the export", func() bool { return watcher.have["export/eu-1/shop/payments"] != nil })
	wasGone := watchFor(watcher, "export/eu-1/shop/payments")
	agents[0].cancel()
	watcher.until("eu-1 is suspect", func() bool { return silenceOf(watcher, "eu-1") == federation.DefaultSuspectAfter })
	if d := clk.Now().Sub(spoke); d < federation.DefaultSuspectAfter {
		t.Errorf("suspect after %v", d)
	}
	watcher.until("eu-1 has expired", func() bool { return silenceOf(watcher, "eu-1") == federation.DefaultExpireAfter })
	if d := clk.Now().Sub(spoke); d < federation.DefaultExpireAfter {
		t.Errorf("expired after %v", d)
	}
	if wasGone() {
		t.Error("silence has withdrawn the export")
	}
	findings := must(m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_FINDING, Name: string(federation.CodeMemberExpired)}))(t)
	if len(findings.GetObjects()) != 1 {
		t.Errorf("findings: %v", findings)
	}
	m.mustConnect(creds[0], c.Address(), agents[0])
	watcher.until("eu-1 is fresh", func() bool { return watcher.have["liveness/eu-1"] == nil })
}

// All but one fall silent at once: that is no reason to expire anybody.
func TestAMeshThatFallsSilentDoesNotExpire(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(20, 0)
	m := newTestMesh(t, clk)
	c := m.start("one")
	var agents []*testAgent
	for _, name := range []string{"eu-1", "eu-2", "us-1"} {
		agents = append(agents, m.mustConnect(m.join(c, name), c.Address(), nil))
	}
	watcher := agents[0]
	watcher.until("a full set", func() bool { return watcher.full })
	left := clk.Now()
	agents[1].cancel()
	agents[2].cancel()
	watcher.until("both are suspect", func() bool { return silenceOf(watcher, "eu-2") != 0 && silenceOf(watcher, "us-1") != 0 })
	eventually(t, "long after they would have expired", func() bool { return clk.Now().Sub(left) > 3*federation.DefaultExpireAfter/2 })
	watcher.mu.Lock()
	defer watcher.mu.Unlock()
	for _, name := range []string{"eu-2", "us-1"} {
		if got := silenceOf(watcher, name); got != federation.DefaultSuspectAfter {
			t.Errorf("%s: silence %v, want it to stay suspect", name, got)
		}
	}
}

// A new leader expires nobody sooner, and forgets no silence.
func TestANewLeaderKeepsWhatIsKnown(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(20, 0)
	m := newTestMesh(t, clk)
	one, two := m.start("one"), m.start("two")
	for _, name := range []string{"eu-1", "eu-2"} {
		m.mustConnect(m.join(one, name), two.Address(), nil)
	}
	silent := m.mustConnect(m.join(one, "us-1"), two.Address(), nil)
	watcher := m.mustConnect(m.join(one, "us-2"), two.Address(), nil)
	silent.cancel()
	watcher.until("us-1 has expired", func() bool { return silenceOf(watcher, "us-1") == federation.DefaultExpireAfter })
	leads := func(c *Started) bool {
		leader, err := two.store.Leader(timeout(t), election)
		return err == nil && leader == c.cfg.Name
	}
	forgotten := watchFor(watcher, "liveness/us-1")
	if !leads(one) {
		t.Fatal("the first controller does not lead")
	}
	if err := one.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other leads", func() bool { return leads(two) })
	m.register(two, "later")
	watcher.until("the new leader's time has come", func() bool { return watcher.have["cluster/later"] != nil })
	at := clk.Now()
	eventually(t, "it had time to forget", func() bool { return clk.Now().Sub(at) > 15*time.Second })
	if forgotten() {
		t.Error("the new leader has forgotten the silence")
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	a, b := m.mustConnect(m.join(c, "eu-1"), c.Address(), nil), m.mustConnect(m.join(c, "eu-2"), c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	client := m.adminClient(c)
	b.until("the export", func() bool { return b.have["ready/eu-1/shop/payments"] != nil })
	eventually(t, "the controller has it as well", func() bool {
		_, ok := c.state.current().World.Readiness(federation.ExportID{Cluster: "eu-1", Service: federation.ServiceID{Namespace: "shop", Name: "payments"}})
		return ok
	})

	// Nobody else serves it yet.
	req := &federationv1.DrainRequest{Cluster: "eu-1", Over: durationpb.New(time.Second)}
	if _, err := client.Drain(timeout(t), req); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "--force") {
		t.Fatalf("a drain that leaves callers nowhere to go: %v", err)
	}
	b.reportFull(offer("eu-2", "payments", 2)...)
	a.until("the other offer, at the controller that sent it", func() bool { return a.have["ready/eu-2/shop/payments"] != nil })
	began := time.Now()
	if _, err := client.Drain(timeout(t), req); err != nil {
		t.Fatal(err)
	}
	var shares []int32
	a.until("nothing is left of its share", func() bool {
		d := a.have["drain/eu-1"].GetDrain()
		if d == nil {
			return false
		}
		if n := len(shares); n == 0 || shares[n-1] != d.GetRemainingPerMille() {
			shares = append(shares, d.GetRemainingPerMille())
		}
		return d.GetRemainingPerMille() == 0
	})
	if d := time.Since(began); d < time.Second {
		t.Errorf("drained after %v", d)
	}
	if len(shares) < 4 || len(shares) > 12 {
		t.Errorf("the share went %v; want a step every 100 ms", shares)
	}
	for i := 1; i < len(shares); i++ {
		if shares[i] > shares[i-1] {
			t.Errorf("the share rose: %v", shares)
		}
	}
	if _, err := client.Undrain(timeout(t), &federationv1.UndrainRequest{Cluster: "eu-1", Over: durationpb.New(300 * time.Millisecond)}); err != nil {
		t.Fatal(err)
	}
	a.until("the drain is over", func() bool { return a.have["drain/eu-1"] == nil })
	if _, err := client.Undrain(timeout(t), &federationv1.UndrainRequest{Cluster: "eu-1"}); status.Code(err) != codes.NotFound {
		t.Errorf("undraining what is not drained: %v", err)
	}
	if _, err := client.Drain(timeout(t), &federationv1.DrainRequest{Cluster: "nowhere"}); status.Code(err) != codes.NotFound {
		t.Errorf("draining nobody: %v", err)
	}
}

func TestPolicies(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	a, b := m.mustConnect(m.join(c, "eu-1"), c.Address(), nil), m.mustConnect(m.join(c, "eu-2"), c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	b.reportFull(offer("eu-2", "payments", 2)...)
	client := m.adminClient(c)
	policy := &federationv1.Policy{
		Namespace: "shop", Name: "away", TargetNamespace: "shop", TargetService: "payments",
		Order: []*federationv1.Step{{Kind: federationv1.StepKind_STEP_KIND_CLUSTERS, Clusters: []string{"eu-2"}}, {Kind: federationv1.StepKind_STEP_KIND_ANY}},
	}
	var dry *federationv1.ApplyPolicyResponse
	eventually(t, "both offers are known", func() bool {
		dry = must(client.ApplyPolicy(timeout(t), &federationv1.ApplyPolicyRequest{Policy: policy, DryRun: true}))(t)
		return len(dry.GetChanges()) > 0 && len(dry.GetChanges()[0].GetAfter().GetVerdicts()) == 2
	})
	if dry.GetOutcome() != "created" || dry.GetChanges()[0].GetAfter().GetVerdicts()[0].GetCluster() != "eu-2" {
		t.Errorf("dry run: %v", dry)
	}
	if list := must(client.List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_POLICY}))(t); len(list.GetObjects()) != 0 {
		t.Error("the dry run has stored the policy")
	}
	for _, want := range []string{"created", "unchanged"} {
		if got := must(client.ApplyPolicy(timeout(t), &federationv1.ApplyPolicyRequest{Policy: policy}))(t); got.GetOutcome() != want {
			t.Errorf("applied: %v, want %v", got.GetOutcome(), want)
		}
	}
	a.until("the policy", func() bool { return a.have["policy/controller/shop/away"] != nil })
	policy.SpillBelowPerMille = 500
	if got := must(client.ApplyPolicy(timeout(t), &federationv1.ApplyPolicyRequest{Policy: policy}))(t); got.GetOutcome() != "changed" || got.GetBefore() == nil {
		t.Errorf("applied again: %v", got)
	}
	bad := &federationv1.Policy{Namespace: "shop", Name: "bad", Order: []*federationv1.Step{{Kind: federationv1.StepKind_STEP_KIND_CLUSTERS}}}
	if _, err := client.ApplyPolicy(timeout(t), &federationv1.ApplyPolicyRequest{Policy: bad}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a step that names nobody: %v", err)
	}
	if _, err := client.DeletePolicy(timeout(t), &federationv1.DeletePolicyRequest{Namespace: "shop", Name: "away"}); err != nil {
		t.Fatal(err)
	}
	a.until("the policy is gone", func() bool { return a.have["policy/controller/shop/away"] == nil })
	if _, err := client.DeletePolicy(timeout(t), &federationv1.DeletePolicyRequest{Namespace: "shop", Name: "away"}); status.Code(err) != codes.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
}

// Readiness that nobody's plan depends on waits; a crossing does not.
func TestReadinessIsDamped(t *testing.T) {
	t.Parallel()
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	a := m.mustConnect(m.join(c, "eu-1"), c.Address(), nil)
	e := testExport("eu-1", "payments")
	ready := func(n int) *federationv1.Record {
		return federationv1.ReadinessRecord(e.ID(), federation.Readiness{Ready: n, Total: 100})
	}
	a.reportFull(federationv1.ExportRecord(e), ready(100))
	a.until("all are ready", func() bool { return a.have["ready/eu-1/shop/payments"].GetReadiness().GetReady() == 100 })
	var seen []int32
	began := time.Now()
	for n := 99; n >= 60; n-- {
		a.report(&federationv1.Report{Puts: []*federationv1.Record{ready(n)}})
	}
	a.until("the last of them", func() bool {
		got := a.have["ready/eu-1/shop/payments"].GetReadiness().GetReady()
		if len(seen) == 0 || seen[len(seen)-1] != got {
			seen = append(seen, got)
		}
		return got == 60
	})
	if d := time.Since(began); d < 500*time.Millisecond {
		t.Errorf("a burst of 40 changes came through in %v: %v", d, seen)
	}
	if len(seen) > 6 {
		t.Errorf("40 changes came as %v", seen)
	}
	began = time.Now()
	a.report(&federationv1.Report{Puts: []*federationv1.Record{ready(0)}})
	a.until("zero", func() bool { return a.have["ready/eu-1/shop/payments"].GetReadiness().GetReady() == 0 })
	if n := c.state.current().World; n == nil {
		t.Error(began)
	}
}

// Addresses are unique in a cluster, come back to their service, and go to no
// other one for a day.
func TestAddressesOutliveTheirServices(t *testing.T) {
	t.Parallel()
	clk := &jumpingClock{Clock: clock.Real()}
	m := newTestMesh(t, clk)
	c := m.start("one")
	client := m.adminClient(c)
	small := member("eu-1")
	small.Vips = "240.0.0.0/30" // room for two
	resp, err := client.RegisterCluster(timeout(t), &federationv1.RegisterClusterRequest{Member: small})
	if err != nil {
		t.Fatal(err)
	}
	cred, _, err := m.enroll(c.Address(), resp.GetToken(), mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	a := m.mustConnect(cred, c.Address(), nil)
	addr := func(name string) string { return a.have["vip/eu-1/shop/"+name].GetVip().GetAddress() }
	a.reportFull(append(offer("eu-1", "a", 1), offer("eu-1", "b", 1)...)...)
	a.until("two addresses", func() bool { return addr("a") != "" && addr("b") != "" && addr("a") != addr("b") })
	was := addr("a")
	a.report(&federationv1.Report{Deletes: []string{"export/eu-1/shop/a"}})
	a.until("a's address is released", func() bool { return a.have["vip/eu-1/shop/a"].GetVip().GetReleased() != nil })
	released := clk.Now()
	a.report(&federationv1.Report{Puts: offer("eu-1", "a", 1)})
	a.until("a has it again", func() bool { return a.have["vip/eu-1/shop/a"].GetVip().GetReleased() == nil && addr("a") == was })
	a.report(&federationv1.Report{Deletes: []string{"export/eu-1/shop/a"}})
	a.until("it is released again", func() bool { return a.have["vip/eu-1/shop/a"].GetVip().GetReleased() != nil })
	a.report(&federationv1.Report{Puts: offer("eu-1", "c", 1)})
	a.until("c, without an address", func() bool { return a.have["export/eu-1/shop/c"] != nil })
	clk.jump(vipQuarantine - time.Minute)
	a.report(&federationv1.Report{Puts: offer("eu-1", "b", 2)})
	a.until("a later revision", func() bool { return a.have["ready/eu-1/shop/b"].GetReadiness().GetReady() == 2 })
	a.mu.Lock()
	if addr("c") != "" || addr("a") != was {
		t.Errorf("before the day is over: a has %q, c has %q", addr("a"), addr("c"))
	}
	a.mu.Unlock()
	clk.jump(2 * time.Minute)
	a.until("c has it once the day is over", func() bool { return addr("c") == was && addr("a") == "" })
	if d := clk.Now().Sub(released); d < vipQuarantine {
		t.Errorf("it went to another service after %v", d)
	}
}

// jumpingClock is the machine's, and ahead of it by what it was told to jump.
type jumpingClock struct {
	clock.Clock
	ahead atomic.Int64
}

func (c *jumpingClock) Now() time.Time       { return c.Clock.Now().Add(time.Duration(c.ahead.Load())) }
func (c *jumpingClock) jump(d time.Duration) { c.ahead.Add(int64(d)) }

// Region authorities are replaced before their end, and what they have signed
// goes on being accepted.
func TestRegionAuthoritiesRotate(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(40, 0)
	m := newTestMesh(t, clk)
	cfg := m.config("one")
	cfg.Lifetimes = shortLifetimes()
	c := m.startWith(cfg)
	serials := map[string]bool{}
	eventually(t, "the authority is replaced twice", func() bool {
		for _, s := range c.trust.all() {
			if s.place == c.cfg.Region && s.state == stateActive {
				serials[s.authority.Serial()] = true
			}
		}
		return len(serials) == 3
	})
	root := must(c.trust.active(placeRoot))(t)
	for _, s := range c.trust.all() {
		if s.place == c.cfg.Region && !s.authority.Root().Equal(root.authority.Root()) {
			t.Errorf("%s has another root", s.path())
		}
	}
	if _, err := c.source.GetX509SVID(); err != nil {
		t.Errorf("the controller's own identity: %v", err)
	}
	if _, err := m.adminClient(c).GetTrust(timeout(t), &federationv1.GetTrustRequest{}); err != nil {
		t.Errorf("trust: %v", err)
	}
}
