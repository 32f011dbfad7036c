package federation

import (
	"iter"
)

// Catalog is everything that the mesh has been told, with one revision, and
// immutable: Apply makes the next one and shares with this one whatever did not
// change. What the mesh makes of it (merged services, findings, plans) is
// computed when it is asked for, so a change costs the same however many
// clusters offer a service. A nil *Catalog is an empty one.
type Catalog struct {
	revision Revision
	members  pmap[ClusterID, *record[Member]]
	services pmap[ServiceID, offers]
	policies pmap[PolicyID, *record[Policy]]
	// Indexes of the above.
	offering  pmap[ClusterID, pmap[ServiceID, struct{}]] // which services a cluster exports
	targeting pmap[ServiceID, policySet]                 // policies by target
}

// record is one thing that was put into the catalog.
type record[T any] struct {
	value T
	// contested: Merge was given several different things of this name, and
	// took this one.
	contested bool
}

type (
	offers    = pmap[ClusterID, *record[Export]]
	policySet = pmap[PolicyID, *record[Policy]]
)

func (c *Catalog) orEmpty() *Catalog {
	if c == nil {
		return new(Catalog)
	}
	return c
}

// Revision of the catalog.
func (c *Catalog) Revision() Revision { return c.orEmpty().revision }

// Member returns a cluster's registration. It is the catalog's: read only.
func (c *Catalog) Member(id ClusterID) (*Member, bool) {
	r, ok := c.orEmpty().members.get(id)
	if !ok {
		return nil, false
	}
	return &r.value, true
}

// Members goes through all registrations, by cluster.
func (c *Catalog) Members() iter.Seq[*Member] {
	return func(yield func(*Member) bool) {
		for _, r := range c.orEmpty().members.all() {
			if !yield(&r.value) {
				return
			}
		}
	}
}

// Export returns one cluster's offer of one service. It is the catalog's: read
// only.
func (c *Catalog) Export(id ExportID) (*Export, bool) {
	o, _ := c.orEmpty().services.get(id.Service)
	r, ok := o.get(id.Cluster)
	if !ok {
		return nil, false
	}
	return &r.value, true
}

// Exports goes through all offers, by service, then cluster.
func (c *Catalog) Exports() iter.Seq[*Export] {
	return func(yield func(*Export) bool) {
		for _, o := range c.orEmpty().services.all() {
			for _, r := range o.all() {
				if !yield(&r.value) {
					return
				}
			}
		}
	}
}

// ExportsOf goes through one cluster's offers, by service.
func (c *Catalog) ExportsOf(cluster ClusterID) iter.Seq[*Export] {
	return func(yield func(*Export) bool) {
		names, _ := c.orEmpty().offering.get(cluster)
		for s := range names.all() {
			if e, ok := c.Export(ExportID{cluster, s}); ok && !yield(e) {
				return
			}
		}
	}
}

// Policy returns one policy. It is the catalog's: read only.
func (c *Catalog) Policy(id PolicyID) (*Policy, bool) {
	r, ok := c.orEmpty().policies.get(id)
	if !ok {
		return nil, false
	}
	return &r.value, true
}

// Policies goes through all policies, by namespace, name and origin.
func (c *Catalog) Policies() iter.Seq[*Policy] {
	return func(yield func(*Policy) bool) {
		for _, r := range c.orEmpty().policies.all() {
			if !yield(&r.value) {
				return
			}
		}
	}
}

// PolicyFor is the policy that governs the traffic of a cluster's callers to a
// service, if there is one: the most specific; among those the cluster's own
// before an operator's; among those the first accepted. Policies that cannot
// be carried out are passed over, with a finding.
func (c *Catalog) PolicyFor(s ServiceID, from ClusterID) (*Policy, bool) {
	for _, target := range [...]ServiceID{s, {Namespace: s.Namespace}, {}} {
		set, _ := c.orEmpty().targeting.get(target)
		var best *Policy
		for _, r := range set.all() {
			p := &r.value
			if p.ID.Origin != OriginController && p.ID.Origin != string(from) {
				continue
			}
			if p.Check() != nil {
				continue
			}
			if best == nil || p.before(best) {
				best = p
			}
		}
		if best != nil {
			return best, true
		}
	}
	return nil, false
}

// Sees reports whether cluster viewer may know of an export: its own, and those
// of others whose visibility chooses it and whose member is not deregistered.
func (c *Catalog) Sees(viewer ClusterID, e *Export) bool {
	if e.Cluster == viewer {
		return true
	}
	if m, ok := c.Member(e.Cluster); ok && m.State == MemberDeregistered {
		return false
	}
	return e.Visible.IsAll() || e.Visible.Selects(viewer, c.region(viewer))
}

// region of a cluster; empty if it is not known.
func (c *Catalog) region(id ClusterID) string {
	if m, ok := c.Member(id); ok {
		return m.Region
	}
	return ""
}

// View is the part of the catalog that cluster viewer may see: all members,
// the exports that Sees grants it, the operators' policies and its own. For
// callers in that cluster it makes the same plans as the whole.
func (c *Catalog) View(viewer ClusterID) *Catalog {
	v := &Catalog{revision: c.Revision(), members: c.orEmpty().members}
	for e := range c.Exports() {
		if c.Sees(viewer, e) {
			v.putExport(&record[Export]{value: *e})
		}
	}
	for p := range c.Policies() {
		if p.ID.Origin == OriginController || p.ID.Origin == string(viewer) {
			v.putPolicy(&record[Policy]{value: *p})
		}
	}
	return v
}
