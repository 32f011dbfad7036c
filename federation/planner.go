package federation

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"time"
)

// Plan decides where a caller's traffic for a service goes, whatever the port:
// it holds for the ports that all its backends share. It depends on nothing but
// its arguments, and on no more of the catalog than c.View(from.Cluster) has.
func (c *Catalog) Plan(s ServiceID, from Caller, w *World) Plan { return c.PlanPort(s, 0, from, w) }

// PlanPort is Plan for one TCP port: only clusters that expose it are used.
func (c *Catalog) PlanPort(s ServiceID, port uint16, from Caller, w *World) Plan {
	p := planner{plan: Plan{Revision: c.Revision(), Service: s, Port: port, Caller: from}, order: defaultOrder}
	if policy, ok := c.PolicyFor(s, from.Cluster); ok {
		p.policy, p.plan.Policy = *policy, policy.ID
		if len(policy.Order) > 0 {
			p.order = policy.Order
		}
	}
	offers := c.offers(s, from.Cluster)
	var merged []Port
	if port != 0 {
		merged, _ = mergePorts(offers)
	}
	p.region = c.region(from.Cluster)
	p.steps, p.nearest = make([]stepState, len(p.order)), len(p.order)
	p.candidates = make([]candidate, len(offers))
	readiness := w.readinessOf(s)
	for i := range offers {
		k := &p.candidates[i]
		k.offer, k.local = &offers[i], offers[i].Cluster == from.Cluster
		if m, ok := c.Member(k.offer.Cluster); ok {
			k.region, k.zone = m.Region, m.Zone
		}
		k.readiness, _ = readiness.get(k.offer.Cluster)
		k.remaining = w.Drain(k.offer.Cluster)
		p.place(k, merged, w)
	}
	p.arrange()
	p.conclude()
	return p.plan
}

var defaultOrder = []Step{{Kind: StepLocal}, {Kind: StepRegion}, {Kind: StepAny}}

// planner holds what is known while one plan is made.
type planner struct {
	plan       Plan
	policy     Policy
	order      []Step
	region     string // of the caller
	candidates []candidate
	steps      []stepState // by rank in the order
	nearest    int         // the first rank that has candidates, whether they can serve or not
}

// standing is how willingly a candidate is used. Every candidate of one
// standing comes before all of the next.
type standing uint8

const (
	good          standing = iota
	deprioritised          // silent, one way or the other
	lastResort             // drained: used when all else fails
	out                    // never used
)

type candidate struct {
	offer        *Offer
	region, zone string
	local        bool
	readiness    Readiness
	remaining    PerMille // of its share, by a drain
	rank         int      // of the step that it belongs to
	standing     standing
	reason       Reason // decided by place unless it is in good standing
	detail       string
	note         string // added to the detail of a used candidate
	leftOut      bool   // by the split of its step
	amount       uint64 // part of the whole
	tier         int    // -1 is none
	share        PerMille
}

// position orders candidates by tier, those in none last.
func (k *candidate) position() int {
	if k.tier < 0 {
		return math.MaxInt
	}
	return k.tier
}

// stepState is what became of one step while the first tier was composed.
type stepState struct {
	ready, total uint64   // endpoints of its candidates in the standing that serves
	remaining    PerMille // most that the drains leave of one of its candidates
	reached      bool     // traffic came to it
	before       uint64   // what was left when it was reached
	short        bool     // it has less capacity than spillBelow asks
	draining     bool     // all its candidates drain
}

// whole is all the traffic, fine enough that rounding in between stays far
// below one per mille.
const whole = 1 << 50

// muldiv is a*b/c, rounded down, without overflow; a <= c or b <= c.
func muldiv(a, b, c uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	q, _ := bits.Div64(hi, lo, c)
	return q
}

// place decides everything about a candidate that does not depend on the
// others: its step and its standing.
func (p *planner) place(k *candidate, merged []Port, w *World) {
	k.tier = -1
	refuse := func(r Reason, format string, args ...any) {
		k.standing, k.reason, k.detail = out, r, fmt.Sprintf(format, args...)
	}
	if !k.offer.InUse {
		k.standing, k.reason, k.detail = out, k.offer.Reason, k.offer.Detail
		return
	}
	if p.plan.Port != 0 {
		if r, detail, ok := k.offer.serves(p.plan.Port, merged); !ok {
			k.standing, k.reason, k.detail = out, r, detail
			return
		}
	} else if !k.offer.tcp() {
		refuse(ReasonProtocolNotCarried, "it has no TCP port, and only TCP is carried between clusters")
		return
	}
	if !k.local && len(k.offer.Gateways) == 0 {
		refuse(ReasonNoGateway, "it names no gateway to reach it by")
		return
	}
	if !k.local && k.offer.Mode == Passthrough && len(k.offer.Serves) == 0 {
		refuse(ReasonServesNobody, "it passes tunnels through, but names no identity by which a caller could verify whom it reaches")
		return
	}
	switch d := &p.policy.Deny; {
	case slices.Contains(d.Clusters, k.offer.Cluster):
		refuse(ReasonDeniedByPolicy, "the policy denies the cluster")
		return
	case k.region != "" && slices.Contains(d.Regions, k.region):
		refuse(ReasonDeniedByPolicy, "the policy denies the region %s", k.region)
		return
	case d.Unattested && p.plan.Caller.ID.IsZero():
		refuse(ReasonCallerUnattested, "the policy denies callers without an attested identity")
		return
	}
	if k.rank = p.rank(k); k.rank < 0 {
		refuse(ReasonNotInOrder, "no step of the policy's order names it")
		return
	}
	p.nearest = min(p.nearest, k.rank)
	p.standing(k, w)
	if k.standing == good {
		p.steps[k.rank].ready += uint64(k.readiness.Ready)
		p.steps[k.rank].total += uint64(k.readiness.Total)
	}
	if k.readiness.Ready == 0 && k.standing != out {
		if k.readiness.Total == 0 {
			refuse(ReasonNoReadyEndpoints, "nothing is known of its endpoints")
		} else {
			refuse(ReasonNoReadyEndpoints, "none of its %d endpoints is ready", k.readiness.Total)
		}
	}
}

// rank is the first step that names a candidate, or -1.
func (p *planner) rank(k *candidate) int {
	return slices.IndexFunc(p.order, func(s Step) bool {
		switch s.Kind {
		case StepLocal:
			return k.local
		case StepRegion:
			return k.region != "" && k.region == p.region
		case StepClusters:
			return slices.Contains(s.Clusters, k.offer.Cluster)
		case StepRegions:
			return slices.Contains(s.Regions, k.region)
		default:
			return true
		}
	})
}

// standing judges drains, silence and probes. The caller's own cluster suffers
// from drains only: nothing lies between it and the caller.
func (p *planner) standing(k *candidate, w *World) {
	if k.remaining == 0 {
		k.standing, k.reason = lastResort, ReasonDrained
		k.detail = "drained: used only if everything else fails"
		return
	}
	if k.local {
		return
	}
	silence, probe := w.Silence(k.offer.Cluster), w.Probe(k.offer.Cluster)
	state, action := p.policy.Liveness.Of(silence)
	var silent string
	if state != Fresh {
		silent = fmt.Sprintf("its control link has been silent for %v (%v)", silence.Round(time.Second/10), state)
	}
	switch {
	case state != Fresh && probe == ProbeAnswers:
		k.note = silent + ", but its gateways answer"
	case state != Fresh && action == ActionRemove:
		k.standing, k.reason, k.detail = out, ReasonSuspectRemoved, silent
		if state == Expired {
			k.reason = ReasonExpiredRemoved
		}
	case probe == ProbeSilent:
		k.standing, k.reason = deprioritised, ReasonGatewaySilent
		k.detail = "its gateways do not answer the caller's: behind all that do"
	case state != Fresh && action == ActionDeprioritise:
		k.standing, k.reason = deprioritised, ReasonSuspectDeprioritised
		k.detail = silent + ": behind all that are heard"
		if state == Expired {
			k.reason = ReasonExpiredDeprioritised
		}
	case state != Fresh:
		k.note = silent + ", and is kept"
	}
}

// arrange puts the usable candidates into tiers.
func (p *planner) arrange() {
	by := make([][]*candidate, out) // by standing; inside by rank, then cluster
	for i := range p.candidates {
		if k := &p.candidates[i]; k.standing != out {
			by[k.standing] = append(by[k.standing], k)
		}
	}
	tiers := 0
	for s, list := range by {
		slices.SortFunc(list, func(a, b *candidate) int {
			return cmp.Or(cmp.Compare(a.rank, b.rank), a.offer.Cluster.Compare(b.offer.Cluster))
		})
		if tiers == 0 && standing(s) != lastResort && len(list) > 0 {
			list = p.compose(list)
			tiers = 1
		}
		for len(list) > 0 {
			n := len(list)
			if standing(s) != lastResort {
				n = stepEnd(list)
			}
			tiers = p.fallback(list[:n], tiers)
			list = list[n:]
		}
	}
}

// stepEnd is where the step of the first candidate ends in a list by rank.
func stepEnd(list []*candidate) int {
	n := 1
	for n < len(list) && list[n].rank == list[0].rank {
		n++
	}
	return n
}

// compose makes the first tier of candidates of one standing and returns those
// that got nothing. Each step takes all that is left, unless it lacks capacity
// or drains; what no step takes goes back to those that took some.
func (p *planner) compose(list []*candidate) (rest []*candidate) {
	if list[0].standing != good {
		for i := range p.steps {
			p.steps[i] = stepState{}
		}
		for _, k := range list {
			p.steps[k.rank].ready += uint64(k.readiness.Ready)
			p.steps[k.rank].total += uint64(k.readiness.Total)
		}
	}
	left := uint64(whole)
	for remaining := list; len(remaining) > 0 && left > 0; {
		n := stepEnd(remaining)
		step := remaining[:n]
		remaining = remaining[n:]

		weights, sum := p.weigh(step)
		st := &p.steps[step[0].rank]
		st.reached, st.before = true, left
		for i, k := range step {
			if weights[i] > 0 {
				st.remaining = max(st.remaining, k.remaining)
			}
		}
		take := left
		if st.draining = st.remaining < All; st.draining {
			take = muldiv(take, uint64(st.remaining), uint64(All))
		}
		if need := st.total * uint64(p.policy.SpillBelow); st.ready*uint64(All) < need {
			st.short = true
			take = muldiv(take, st.ready*uint64(All), need)
		}
		for i, k := range step {
			k.amount = muldiv(take, weights[i], sum)
		}
		left -= take
	}
	amounts := make([]uint64, len(list))
	for i, k := range list {
		amounts[i] = k.amount
	}
	return give(list, amounts, 0)
}

// fallback puts the candidates of one step into tiers from the given one on,
// and returns the next free one. One tier is enough unless the split, or
// rounding, gives a candidate nothing.
func (p *planner) fallback(list []*candidate, tier int) int {
	for len(list) > 0 {
		weights, _ := p.weigh(list)
		list = give(list, weights, tier)
		tier++
	}
	return tier
}

// weigh is how the candidates of one step share: by its split if it names one
// of them, else by ready endpoints; in both cases by what drains leave.
func (p *planner) weigh(step []*candidate) (weights []uint64, sum uint64) {
	weights = make([]uint64, len(step))
	split := p.order[step[0].rank].Split
	if step[0].standing == lastResort {
		split = nil
	}
	for i, k := range step {
		if j := slices.IndexFunc(split, func(w Weight) bool { return w.Cluster == k.offer.Cluster }); j >= 0 {
			weights[i] = uint64(split[j].Weight) * uint64(k.remaining)
			sum += weights[i]
		}
	}
	if sum > 0 {
		for i, k := range step {
			k.leftOut = weights[i] == 0
		}
		return weights, sum
	}
	for i, k := range step {
		remaining := k.remaining
		if k.standing == lastResort {
			remaining = All
		}
		weights[i] = uint64(k.readiness.Ready) * uint64(remaining)
		sum += weights[i]
	}
	return weights, sum
}

// give shares a tier among candidates in proportion to amounts and returns those whose share rounds to nothing. The per
// milles that rounding leaves go to the largest remainders, among equals in the
// order of the list.
func give(list []*candidate, amounts []uint64, tier int) (rest []*candidate) {
	var sum uint64
	for _, a := range amounts {
		sum += a
	}
	if sum == 0 { // all of it rounded away
		for i := range amounts {
			amounts[i] = 1
		}
		sum = uint64(len(amounts))
	}
	remainders := make([]uint64, len(list))
	order := make([]int, len(list))
	left := All
	for i, k := range list {
		k.share = PerMille(muldiv(amounts[i], uint64(All), sum))
		hi, lo := bits.Mul64(amounts[i], uint64(All))
		_, remainders[i] = bits.Div64(hi, lo, sum)
		left -= k.share
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(remainders[b], remainders[a]) })
	for _, i := range order[:left] {
		list[i].share++
	}
	for _, k := range list {
		if k.share > 0 {
			k.tier = tier
		} else {
			rest = append(rest, k)
		}
	}
	return rest
}

// conclude writes tiers and verdicts into the plan.
func (p *planner) conclude() {
	if len(p.candidates) == 0 {
		return
	}
	ordered := make([]*candidate, len(p.candidates))
	for i := range p.candidates {
		ordered[i] = &p.candidates[i]
	}
	slices.SortFunc(ordered, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(a.position(), b.position()), cmp.Compare(b.share, a.share), a.offer.Cluster.Compare(b.offer.Cluster))
	})
	p.plan.Verdicts = make([]Verdict, 0, len(ordered))
	for _, k := range ordered {
		p.explain(k)
		v := Verdict{
			Cluster: k.offer.Cluster, Region: k.region, Zone: k.zone, Readiness: k.readiness,
			Tier: k.tier, Share: k.share, Reason: k.reason, Detail: k.detail,
		}
		if k.reason.byPolicy() {
			v.Policy = p.plan.Policy
		}
		p.plan.Verdicts = append(p.plan.Verdicts, v)
		if k.tier < 0 {
			continue
		}
		if k.tier == len(p.plan.Tiers) {
			p.plan.Tiers = append(p.plan.Tiers, Tier{})
		}
		t := &p.plan.Tiers[k.tier]
		t.Backends = append(t.Backends, Backend{
			Cluster: k.offer.Cluster, Share: k.share, Local: k.local,
			Mode: k.offer.Mode, Gateways: k.offer.Gateways, Serves: k.offer.Serves,
		})
	}
}

// explain completes the reason of a candidate whose tier is known.
func (p *planner) explain(k *candidate) {
	if k.standing != good || k.tier < 0 {
		if k.note != "" {
			k.detail += "; " + k.note
		}
		return
	}
	var where string
	switch p.order[k.rank].Kind {
	case StepLocal:
		k.reason, where = ReasonSameCluster, "the caller's own cluster"
	case StepRegion:
		k.reason, where = ReasonSameRegion, "the caller's region"
	case StepClusters, StepRegions:
		k.reason, where = ReasonNamedInOrder, fmt.Sprintf("named in step %d of the order", k.rank+1)
	default:
		k.reason, where = ReasonAny, fmt.Sprintf("any cluster, step %d of the order", k.rank+1)
		if k.region != p.region {
			k.reason, where = ReasonOtherRegion, "another region"
		}
	}
	switch {
	case k.tier > 0 && k.leftOut:
		k.reason = ReasonSplitLeavesItOut
		k.detail = where + ", but the split gives it nothing while others of the step can serve"
	case k.remaining < All:
		k.reason = ReasonDraining
		k.detail = fmt.Sprintf("%s, draining: %v of its share is left", where, k.remaining)
	case k.tier > 0:
		k.reason = ReasonStandby
		k.detail = where + ", takes over when the tiers before it cannot be reached"
	case p.steps[k.rank].before < whole:
		k.reason = ReasonSpill
		k.detail = fmt.Sprintf("%s, takes what %s", where, p.spilled(k.rank))
	case k.rank > p.nearest:
		k.detail = where + ", the first step that can serve"
	default:
		k.detail = where
	}
	if k.note != "" {
		k.detail += "; " + k.note
	}
}

// spilled says why the steps before rank left something over.
func (p *planner) spilled(rank int) string {
	for i := rank - 1; i >= 0; i-- {
		st, kind := &p.steps[i], p.order[i].Kind
		switch {
		case !st.reached:
		case st.short:
			return fmt.Sprintf("step %d (%v) lacks: %d/%d ready, below %v", i+1, kind, st.ready, st.total, p.policy.SpillBelow)
		case st.draining:
			return fmt.Sprintf("step %d (%v) drains away, %v of it left", i+1, kind, st.remaining)
		}
	}
	return "the steps before it leave over"
}
