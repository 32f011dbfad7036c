package federation

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Generators of small meshes: few names, so that things meet.

func ids() *rapid.Generator[ClusterID] {
	return rapid.SampledFrom([]ClusterID{"c1", "c2", "c3", "c4", "c5"})
}

func serviceIDs() *rapid.Generator[ServiceID] {
	return rapid.SampledFrom([]ServiceID{{"a", "x"}, {"a", "y"}, {"b", "x"}})
}

func regions() *rapid.Generator[string] { return rapid.SampledFrom([]string{"", "r1", "r2"}) }

func addressOf(c ClusterID) Address { return Address{Host: string(c) + ".gw", Port: 15443} }

// mostly draws the first value, and now and then one of the others: meshes in
// which nothing can be used have dull plans.
func mostly[T any](t *rapid.T, label string, usual T, others ...T) T {
	if i := rapid.IntRange(-8, len(others)-1).Draw(t, label); i >= 0 {
		return others[i]
	}
	return usual
}

func members() *rapid.Generator[Member] {
	return rapid.Custom(func(t *rapid.T) Member {
		c := ids().Draw(t, "cluster")
		return Member{
			Cluster: c, Region: regions().Draw(t, "region"), Generation: int64(rapid.IntRange(0, 2).Draw(t, "generation")),
			State:    mostly(t, "state", MemberActive, MemberPending, MemberQuarantined, MemberDeregistered),
			Grants:   []Grant{mostly(t, "grant", Grant{"*", "*"}, Grant{"a", "*"}, Grant{"b", "x"})},
			Gateways: mostly(t, "gateways", []Address{addressOf(c)}, nil),
		}
	})
}

func ports() *rapid.Generator[[]Port] {
	return rapid.SliceOfN(rapid.SampledFrom([]Port{
		{"http", 80, TCP, ""}, {"http", 81, TCP, ""}, {"web", 80, TCP, ""}, {"http", 80, TCP, "http"}, {"dns", 80, UDP, ""}, {"", 80, TCP, ""}, {"admin", 90, TCP, ""},
	}), 0, 3)
}

func selectors() *rapid.Generator[Selector] {
	return rapid.Custom(func(t *rapid.T) Selector {
		if rapid.IntRange(0, 2).Draw(t, "all") > 0 {
			return Selector{}
		}
		return Selector{
			Clusters: rapid.SliceOfN(ids(), 0, 2).Draw(t, "clusters"),
			Regions:  rapid.SliceOfN(regions(), 0, 1).Draw(t, "regions"),
		}
	})
}

func exports() *rapid.Generator[Export] {
	return rapid.Custom(func(t *rapid.T) Export {
		c := ids().Draw(t, "cluster")
		return Export{
			Cluster: c, Service: serviceIDs().Draw(t, "service"), Ports: mostly(t, "usual", []Port{{"http", 80, TCP, ""}}, ports().Draw(t, "ports")),
			Accepted: int64(rapid.IntRange(0, 3).Draw(t, "accepted")),
			Gateways: mostly(t, "gateways", []Address{addressOf(c)}, nil, []Address{{"other", 1}, addressOf(c), addressOf(c)}),
			Visible:  selectors().Draw(t, "visible"),
			Mode:     rapid.SampledFrom([]Mode{Terminate, Passthrough}).Draw(t, "mode"),
		}
	})
}

func steps() *rapid.Generator[Step] {
	return rapid.Custom(func(t *rapid.T) Step {
		s := Step{Kind: StepKind(rapid.IntRange(0, 4).Draw(t, "kind"))}
		switch s.Kind {
		case StepClusters:
			s.Clusters = rapid.SliceOfN(ids(), 0, 3).Draw(t, "clusters")
		case StepRegions:
			s.Regions = rapid.SliceOfN(regions(), 0, 2).Draw(t, "regions")
		}
		if rapid.IntRange(0, 2).Draw(t, "splits") == 0 {
			s.Split = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Weight {
				return Weight{ids().Draw(t, "cluster"), rapid.SampledFrom([]int{0, 1, 2, 30, MaxWeight, -1}).Draw(t, "weight")}
			}), 0, 3).Draw(t, "split")
		}
		return s
	})
}

func policies() *rapid.Generator[Policy] {
	return rapid.Custom(func(t *rapid.T) Policy {
		id := serviceIDs().Draw(t, "name")
		p := Policy{
			ID:         PolicyID{rapid.SampledFrom([]string{OriginController, OriginController, "c1", "c9"}).Draw(t, "origin"), id.Namespace, rapid.SampledFrom([]string{"p", "q"}).Draw(t, "policy")},
			Accepted:   int64(rapid.IntRange(0, 3).Draw(t, "accepted")),
			Order:      rapid.SliceOfN(steps(), 0, 4).Draw(t, "order"),
			SpillBelow: PerMille(rapid.SampledFrom([]int{0, 0, 500, 700, 1000, -5, 2000}).Draw(t, "spill")),
			Deny: Deny{
				Clusters: rapid.SliceOfN(ids(), 0, 1).Draw(t, "deny"), Regions: rapid.SliceOfN(regions(), 0, 1).Draw(t, "denyRegions"),
				Unattested: rapid.IntRange(0, 9).Draw(t, "unattested") == 0,
			},
			Liveness: LivenessRule{
				OnSuspect: LivenessAction(rapid.IntRange(0, 3).Draw(t, "onSuspect")), OnExpired: LivenessAction(rapid.IntRange(0, 3).Draw(t, "onExpired")),
			},
		}
		switch rapid.IntRange(0, 3).Draw(t, "target") {
		case 0:
		case 1:
			p.TargetNamespace = id.Namespace
		default:
			p.TargetNamespace, p.TargetService = id.Namespace, id.Name
		}
		return p
	})
}

func worlds() *rapid.Generator[*World] {
	return rapid.Custom(func(t *rapid.T) *World {
		var w *World
		for range rapid.IntRange(0, 15).Draw(t, "facts") {
			w = observation(t, w)
		}
		return w
	})
}

func observation(t *rapid.T, w *World) *World {
	c := ids().Draw(t, "cluster")
	switch rapid.IntRange(0, 6).Draw(t, "fact") {
	case 0:
		return w.WithSilence(c, time.Duration(rapid.SampledFrom([]int{0, 15, 75}).Draw(t, "silence"))*time.Second)
	case 1:
		return w.WithProbe(c, Probe(rapid.IntRange(0, 2).Draw(t, "probe")))
	case 2:
		return w.WithDrain(c, PerMille(rapid.SampledFrom([]int{0, 1, 300, 500, 1000}).Draw(t, "drain")))
	default:
		total := rapid.IntRange(0, 10).Draw(t, "total")
		return w.WithReadiness(ExportID{c, serviceIDs().Draw(t, "service")}, Readiness{rapid.IntRange(0, total).Draw(t, "ready"), total})
	}
}

type parts struct {
	members  []Member
	exports  []Export
	policies []Policy
}

func meshes() *rapid.Generator[parts] {
	return rapid.Custom(func(t *rapid.T) parts {
		return parts{
			rapid.SliceOfN(members(), 0, 8).Draw(t, "members"),
			rapid.SliceOfN(exports(), 0, 16).Draw(t, "exports"),
			rapid.SliceOfN(policies(), 0, 4).Draw(t, "policies"),
		}
	})
}

func (p parts) merge() *Catalog { return Merge(Revision{"test", 1}, p.members, p.exports, p.policies) }

func callers() []Caller {
	var list []Caller
	for _, c := range []ClusterID{"c1", "c2", "c3", "c4", "c5", "c9"} {
		list = append(list, Caller{Cluster: c})
	}
	return list
}

// everyPlan goes through the plans of all callers, services and ports.
func everyPlan(c *Catalog, w *World, visit func(Plan)) {
	for _, from := range callers() {
		for _, s := range []ServiceID{{"a", "x"}, {"a", "y"}, {"b", "x"}, {"b", "z"}} {
			for _, port := range []uint16{0, 80, 81, 90} {
				visit(c.PlanPort(s, port, from, w))
			}
		}
	}
}

func sameCatalog(t *rapid.T, what string, a, b *Catalog) {
	t.Helper()
	if x, y := a.Describe(), b.Describe(); x != y {
		t.Fatalf("%s: described as\n%s\nand as\n%s", what, x, y)
	}
	if !reflect.DeepEqual(a, b) {
		t.Fatalf("%s: the same description of different catalogs\n%s", what, a.Describe())
	}
	if d := Diff(a, b); len(d) > 0 {
		t.Fatalf("%s: Diff sees %v", what, d)
	}
}

func TestMergeKnowsNoOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := meshes().Draw(t, "mesh")
		q := parts{
			rapid.Permutation(p.members).Draw(t, "members"),
			rapid.Permutation(p.exports).Draw(t, "exports"),
			rapid.Permutation(p.policies).Draw(t, "policies"),
		}
		sameCatalog(t, "in another order", p.merge(), q.merge())
		twice := parts{slices.Concat(p.members, q.members), slices.Concat(q.exports, p.exports), slices.Concat(p.policies, q.policies)}
		sameCatalog(t, "everything twice", p.merge(), twice.merge())
	})
}

// Merge and Apply keep nothing of what they were given.
func TestMergeCopies(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := meshes().Draw(t, "mesh")
		merged := p.merge()
		var applied *Catalog
		for _, e := range p.exports {
			applied = applied.Apply(Revision{}, PutExport{e})
		}
		before, beforeApplied := merged.Describe(), applied.Describe()
		for i := range p.members {
			for j := range p.members[i].Gateways {
				p.members[i].Gateways[j].Host = "changed"
			}
		}
		for i := range p.exports {
			for j := range p.exports[i].Ports {
				p.exports[i].Ports[j].Number = 1
			}
		}
		for i := range p.policies {
			for j := range p.policies[i].Order {
				p.policies[i].Order[j].Kind = StepLocal
			}
		}
		if merged.Describe() != before || applied.Describe() != beforeApplied {
			t.Fatal("a catalog changed with what it was made from")
		}
	})
}

func TestApplyIsMerge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ms, es, ps := map[ClusterID]Member{}, map[ExportID]Export{}, map[PolicyID]Policy{}
		var c *Catalog
		type kept struct {
			c    *Catalog
			text string
		}
		var history []kept
		for i := range rapid.IntRange(1, 12).Draw(t, "revisions") {
			var events []Event
			for range rapid.IntRange(0, 4).Draw(t, "events") {
				events = append(events, anyEvent(t, ms, es, ps))
			}
			c = c.Apply(Revision{"test", int64(i)}, events...)
			history = append(history, kept{c, c.Describe()})
			sameCatalog(t, "applied and merged", c, Merge(c.Revision(), values(ms), values(es), values(ps)))
			if again := c.Apply(c.Revision(), events[max(0, len(events)-1):]...); len(Diff(c, again)) > 0 {
				t.Fatalf("the last event a second time changes %v", Diff(c, again))
			}
		}
		for _, k := range history {
			if k.c.Describe() != k.text {
				t.Fatal("a later change changed an earlier catalog")
			}
		}
	})
}

// anyEvent draws an event and keeps book of what there should be after it.
func anyEvent(t *rapid.T, ms map[ClusterID]Member, es map[ExportID]Export, ps map[PolicyID]Policy) Event {
	switch rapid.IntRange(0, 5).Draw(t, "event") {
	case 0:
		m := members().Draw(t, "member")
		ms[m.Cluster] = m
		return PutMember{m}
	case 1:
		c := ids().Draw(t, "cluster")
		delete(ms, c)
		return DeleteMember{c}
	case 2:
		id := ExportID{ids().Draw(t, "cluster"), serviceIDs().Draw(t, "service")}
		delete(es, id)
		return DeleteExport{id}
	case 3:
		p := policies().Draw(t, "policy")
		ps[p.ID] = p
		return PutPolicy{p}
	case 4:
		id := policies().Draw(t, "policy").ID
		delete(ps, id)
		return DeletePolicy{id}
	default:
		e := exports().Draw(t, "export")
		es[e.ID()] = e
		return PutExport{e}
	}
}

func TestPlansAreWhole(t *testing.T) {
	rapid.Check(t, plansAreWhole)
}

// FuzzPlan is TestPlansAreWhole with the fuzzer's choice of meshes.
func FuzzPlan(f *testing.F) { f.Fuzz(rapid.MakeFuzz(plansAreWhole)) }

func plansAreWhole(t *rapid.T) {
	c, w := meshes().Draw(t, "mesh").merge(), worlds().Draw(t, "world")
	for _, f := range c.Findings() {
		if _, ok := Explain(f.Code); !ok || f.Message == "" {
			t.Fatalf("a finding without a meaning: %v", f)
		}
	}
	everyPlan(c, w, func(p Plan) {
		checkPlan(t, c, p)
		view := c.View(p.Caller.Cluster)
		if q := view.PlanPort(p.Service, p.Port, p.Caller, w); !reflect.DeepEqual(p, q) {
			t.Fatalf("from the caller's view\n%s\ninstead of\n%s", q, p)
		}
		if p.Port != 0 {
			return
		}
		s, _ := c.ServiceFrom(p.Service, p.Caller.Cluster)
		v, _ := view.ServiceFrom(p.Service, p.Caller.Cluster)
		switch {
		case s == nil && v == nil:
		case s == nil || v == nil || !slices.Equal(s.Ports, v.Ports):
			t.Fatalf("the view has other ports: %v and %v", s, v)
		case !distinct(s.Ports):
			t.Fatalf("merged ports contradict each other: %v", s.Ports)
		}
	})
}

// FuzzHostile makes catalogs of values that no parser would let through.
func FuzzHostile(f *testing.F) {
	f.Fuzz(rapid.MakeFuzz(hostile))
}

func TestHostile(t *testing.T) { rapid.Check(t, hostile) }

func hostile(t *rapid.T) {
	word := rapid.SampledFrom([]string{"", "c1", "a", "../x", "\x00", "controller"})
	num := rapid.SampledFrom([]int{0, 1, -1, 7, 1000, math.MaxInt, math.MinInt})
	p := meshes().Draw(t, "mesh")
	p.exports = append(p.exports, Export{Cluster: ClusterID(word.Draw(t, "c")), Service: ServiceID{word.Draw(t, "ns"), word.Draw(t, "n")}, Mode: Mode(num.Draw(t, "mode")), Accepted: int64(num.Draw(t, "accepted"))})
	p.members = append(p.members, Member{Cluster: ClusterID(word.Draw(t, "c")), State: MemberState(num.Draw(t, "state")), Grants: []Grant{{}}})
	q := policies().Draw(t, "policy")
	q.Order = append(q.Order, Step{Kind: StepKind(num.Draw(t, "kind")), Split: []Weight{{"c1", num.Draw(t, "weight")}, {"c1", num.Draw(t, "weight")}}})
	q.SpillBelow, q.Liveness.SuspectAfter = PerMille(num.Draw(t, "spill")), time.Duration(num.Draw(t, "after"))
	q.Liveness.OnSuspect = LivenessAction(num.Draw(t, "action"))
	p.policies = append(p.policies, q)
	w := worlds().Draw(t, "world")
	for _, c := range []ClusterID{"c1", "c2", "", "../x"} {
		w = w.WithReadiness(ExportID{c, ServiceID{"a", "x"}}, Readiness{num.Draw(t, "ready"), num.Draw(t, "total")})
		w = w.WithDrain(c, PerMille(num.Draw(t, "drain"))).WithSilence(c, time.Duration(num.Draw(t, "silence"))).WithProbe(c, Probe(num.Draw(t, "probe")))
	}
	c := p.merge()
	_ = c.Describe()
	everyPlan(c, w, func(p Plan) { checkPlan(t, c, p) })
}

// What Diff does not name has not changed.
func TestDiffIsComplete(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := meshes().Draw(t, "mesh")
		old, w := p.merge(), worlds().Draw(t, "world")
		var events []Event
		for range rapid.IntRange(0, 3).Draw(t, "events") {
			events = append(events, anyEvent(t, map[ClusterID]Member{}, map[ExportID]Export{}, map[PolicyID]Policy{}))
		}
		next := old.Apply(old.Revision(), events...)
		w2 := w
		for range rapid.IntRange(0, 2).Draw(t, "observations") {
			w2 = observation(t, w2)
		}
		named := map[ServiceID]bool{}
		changes := Diff(old, next)
		for _, c := range changes {
			if c.Kind == ServiceChanged {
				named[c.Service] = true
			}
			if c.String() == "" {
				t.Fatal("a change without a text")
			}
		}
		if len(changes) > 0 != !reflect.DeepEqual(old, next) {
			t.Fatalf("%d changes between\n%s\nand\n%s", len(changes), old.Describe(), next.Describe())
		}
		for _, c := range DiffWorlds(next, w, w2) {
			named[c.Service] = true
		}
		before := map[string]Plan{}
		key := func(p Plan) string { return fmt.Sprint(p.Service, p.Port, p.Caller) }
		everyPlan(old, w, func(p Plan) { before[key(p)] = p })
		everyPlan(next, w2, func(p Plan) {
			// A verdict's region and zone are also those of a registration; so are
			// the plans of services that nobody offers, by their policy alone.
			if q := before[key(p)]; !named[p.Service] && len(q.Verdicts) > 0 && !reflect.DeepEqual(p, q) {
				t.Fatalf("%s is not named, but was\n%s\nand is\n%s", p.Service, q, p)
			}
		})
	})
}

func TestWorldDigest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w *World
		history := map[string]*World{}
		for range rapid.IntRange(0, 20).Draw(t, "facts") {
			w = observation(t, w)
			if old, ok := history[w.Digest()]; ok && !sameWorld(old, w) {
				t.Fatal("two worlds share a digest")
			}
			history[w.Digest()] = w
		}
		// The same by another way, from the end.
		var again *World
		for e, r := range w.AllReadiness() {
			again = again.WithReadiness(e, Readiness{r.Ready, r.Total + 1}).WithReadiness(e, r)
		}
		for _, c := range []ClusterID{"c5", "c4", "c3", "c2", "c1"} {
			again = again.WithDrain(c, 77).WithDrain(c, w.Drain(c)).WithProbe(c, w.Probe(c)).WithSilence(c, time.Hour).WithSilence(c, w.Silence(c))
		}
		if again.Digest() != w.Digest() || !sameWorld(again, w) {
			t.Fatal("the digest depends on the way")
		}
		if len(w.Digest()) != 16 {
			t.Fatalf("digest %q", w.Digest())
		}
	})
}

func sameWorld(a, b *World) bool { return reflect.DeepEqual(a.clone(), b.clone()) }

// ranked is a mesh whose policy ranks every cluster: a step for each rank, and
// a last one that can always serve. It says which cluster has which rank.
func ranked(t *rapid.T) (c *Catalog, w *World, rank map[ClusterID]int) {
	var p parts
	policy := Policy{ID: PolicyID{OriginController, "a", "p"}, TargetNamespace: "a", TargetService: "x"}
	policy.SpillBelow = PerMille(rapid.SampledFrom([]int{0, 500, 700, 1000}).Draw(t, "spill"))
	rank = map[ClusterID]int{}
	add := func(id ClusterID, step int, r Readiness, remaining PerMille) {
		p.members = append(p.members, Member{Cluster: id, State: MemberActive, Grants: []Grant{{"*", "*"}}, Gateways: []Address{addressOf(id)}})
		p.exports = append(p.exports, Export{Cluster: id, Service: ServiceID{"a", "x"}, Ports: []Port{{"", 80, TCP, ""}}, Gateways: []Address{addressOf(id)}})
		for len(policy.Order) <= step {
			policy.Order = append(policy.Order, Step{Kind: StepClusters})
		}
		policy.Order[step].Clusters = append(policy.Order[step].Clusters, id)
		w = w.WithReadiness(ExportID{id, ServiceID{"a", "x"}}, r).WithDrain(id, remaining)
		rank[id] = step
	}
	step := 0
	for i := range rapid.IntRange(1, 8).Draw(t, "clusters") {
		if i > 0 && rapid.Bool().Draw(t, "next step") {
			step++
		}
		total := rapid.IntRange(1, 20).Draw(t, "total")
		add(ClusterID(fmt.Sprintf("n%d", i)), step, Readiness{rapid.IntRange(0, total).Draw(t, "ready"), total},
			PerMille(rapid.SampledFrom([]int{1000, 1000, 1000, 0, 250, 900}).Draw(t, "drain")))
	}
	add("sink", step+1, Readiness{5, 5}, All)
	p.policies = []Policy{policy}
	return p.merge(), w, rank
}

func firstTier(p Plan) map[ClusterID]PerMille {
	shares := map[ClusterID]PerMille{}
	for _, b := range p.Tiers[0].Backends {
		shares[b.Cluster] = b.Share
	}
	return shares
}

// A cluster that dies, or goes, leaves its traffic to its own step and to those
// after it: nobody before it gains or loses any.
func TestTrafficMovesToSuccessors(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, w, rank := ranked(t)
		service, from := ServiceID{"a", "x"}, Caller{Cluster: "elsewhere"}
		before := firstTier(c.Plan(service, from, w))
		victim := ClusterID(fmt.Sprintf("n%d", rapid.IntRange(0, len(rank)-2).Draw(t, "victim")))
		gone := ExportID{victim, service}
		killed := c.Plan(service, from, w.WithReadiness(gone, Readiness{0, 20}))
		removed := c.Apply(c.Revision(), DeleteExport{gone}).Plan(service, from, w)
		for what, p := range map[string]Plan{"killed": killed, "removed": removed} {
			checkPlanShares(t, p)
			after := firstTier(p)
			if after[victim] > 0 {
				t.Fatalf("%s is %s and still serves:\n%s", victim, what, p)
			}
			for id, r := range rank {
				// Rounding may move one per mille.
				if d := after[id] - before[id]; r < rank[victim] && (d > 1 || d < -1) {
					t.Fatalf("%s, before %s in the order, had %d and has %d when that is %s:\n%s", id, victim, before[id], after[id], what, p)
				}
			}
			// A victim without a share leaves the others alone, unless its
			// endpoints counted for the capacity of its step.
			if policy, _ := c.PolicyFor(service, "elsewhere"); policy.SpillBelow == 0 && before[victim] == 0 && !reflect.DeepEqual(before, after) {
				t.Fatalf("%s served nobody, but without it %v becomes %v", victim, before, after)
			}
		}
	})
}

func checkPlanShares(t *rapid.T, p Plan) {
	for i, tier := range p.Tiers {
		var sum PerMille
		for _, b := range tier.Backends {
			sum += b.Share
		}
		if sum != All {
			t.Fatalf("tier %d adds up to %d:\n%s", i, sum, p)
		}
	}
}

// The further a cluster is drained the less it serves, and in a step of its own
// in proportion.
func TestDrainIsLinear(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, w, rank := ranked(t)
		service, from := ServiceID{"a", "x"}, Caller{Cluster: "elsewhere"}
		victim := ClusterID(fmt.Sprintf("n%d", rapid.IntRange(0, len(rank)-2).Draw(t, "victim")))
		alone := true
		for id, r := range rank {
			alone = alone && (id == victim || r != rank[victim])
		}
		full := firstTier(c.Plan(service, from, w.WithDrain(victim, All)))[victim]
		last := full
		for remaining := All; remaining >= 0; remaining -= 50 {
			share := firstTier(c.Plan(service, from, w.WithDrain(victim, remaining)))[victim]
			if share > last+1 {
				t.Fatalf("%s has %d at %v, and had %d before", victim, share, remaining, last)
			}
			if want := full * remaining / All; alone && (share > want+1 || share < want-1) {
				t.Fatalf("%s has %d at %v instead of %d", victim, share, remaining, want)
			}
			last = share
		}
	})
}
