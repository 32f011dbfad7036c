package controller

import (
	"slices"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// maxPlanChanges is how many changed plans an answer holds.
const maxPlanChanges = 50

// planChanges lists the plans that differ between two catalogs, for every
// caller's cluster, and how many more there are than the list holds. Only
// services that Diff names are planned.
func planChanges(before, after *federation.Catalog, w *federation.World) (out []*federationv1.PlanChange, more int32) {
	for _, ch := range federation.Diff(before, after) {
		if ch.Kind != federation.ServiceChanged {
			continue
		}
		for m := range after.Members() {
			if m.State == federation.MemberDeregistered {
				continue
			}
			caller := federation.Caller{Cluster: m.Cluster, Zone: m.Zone}
			old, now := before.Plan(ch.Service, caller, w), after.Plan(ch.Service, caller, w)
			if sameTiers(old, now) {
				continue
			}
			if len(out) == maxPlanChanges {
				more++
				continue
			}
			out = append(out, &federationv1.PlanChange{Before: federationv1.EncodePlan(old), After: federationv1.EncodePlan(now)})
		}
	}
	return out, more
}

// sameTiers reports whether two plans send traffic the same way.
func sameTiers(a, b federation.Plan) bool {
	return slices.EqualFunc(a.Tiers, b.Tiers, func(a, b federation.Tier) bool {
		return slices.EqualFunc(a.Backends, b.Backends, func(a, b federation.Backend) bool {
			return a.Cluster == b.Cluster && a.Share == b.Share && a.Mode == b.Mode
		})
	})
}

// stranded lists the callers that can reach a service now and could not once a
// cluster is drained: nobody else that their plan uses has a ready endpoint.
func stranded(c *federation.Catalog, w *federation.World, drained federation.ClusterID) []*federationv1.Stranded {
	without := w.WithDrain(drained, 0)
	var out []*federationv1.Stranded
	for e := range c.ExportsOf(drained) {
		for m := range c.Members() {
			if m.State != federation.MemberActive {
				continue
			}
			caller := federation.Caller{Cluster: m.Cluster, Zone: m.Zone}
			if !reaches(c.Plan(e.Service, caller, w), "") || reaches(c.Plan(e.Service, caller, without), drained) {
				continue
			}
			out = append(out, &federationv1.Stranded{
				Namespace: e.Service.Namespace, Name: e.Service.Name, CallerCluster: string(m.Cluster),
			})
		}
	}
	return out
}

// reaches reports whether a plan uses a ready cluster other than but.
func reaches(p federation.Plan, but federation.ClusterID) bool {
	return slices.ContainsFunc(p.Verdicts, func(v federation.Verdict) bool {
		return v.Tier >= 0 && v.Cluster != but && v.Readiness.Ready > 0
	})
}
