package federation

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Merge makes a catalog from everything that is known. The order of the
// arguments does not matter. Where two of them have one name and differ, one is
// taken by a rule (of members the highest generation, else the first accepted),
// with a finding. Merge copies what it is given.
func Merge(rev Revision, members []Member, exports []Export, policies []Policy) *Catalog {
	c := &Catalog{revision: rev}
	for m := range taken(members, normalMember, Member.order) {
		c.putMember(m)
	}
	for e := range taken(exports, normalExport, Export.order) {
		c.putExport(e)
	}
	for p := range taken(policies, normalPolicy, Policy.order) {
		c.putPolicy(p)
	}
	return c
}

// taken sorts copies of a list and goes through the first of each name.
// Differing ones of the same name contest it; order is total on what differs.
func taken[T any](list []T, normal func(T) T, order func(a, b T) (name, rest int)) func(func(*record[T]) bool) {
	sorted := make([]*record[T], len(list))
	for i, t := range list {
		sorted[i] = &record[T]{value: normal(t)}
	}
	slices.SortFunc(sorted, func(a, b *record[T]) int { return cmp.Or(order(a.value, b.value)) })
	return func(yield func(*record[T]) bool) {
		for i := 0; i < len(sorted); {
			r := sorted[i]
			for i++; i < len(sorted); i++ {
				name, rest := order(r.value, sorted[i].value)
				if name != 0 {
					break
				}
				r.contested = r.contested || rest != 0
			}
			if !yield(r) {
				return
			}
		}
	}
}

// text is a total order on things of one name that differ: by how they print.
func text(a, b any) int { return cmp.Compare(fmt.Sprintf("%#v", a), fmt.Sprintf("%#v", b)) }

func (m Member) order(o Member) (name, rest int) {
	if name = m.Cluster.Compare(o.Cluster); name != 0 {
		return name, 0
	}
	if rest = cmp.Compare(o.Generation, m.Generation); rest != 0 {
		return 0, rest
	}
	return 0, text(m, o)
}

func (e Export) order(o Export) (name, rest int) {
	if name = e.ID().Compare(o.ID()); name != 0 {
		return name, 0
	}
	if rest = cmp.Compare(e.Accepted, o.Accepted); rest != 0 {
		return 0, rest
	}
	return 0, text(e, o)
}

func (p Policy) order(o Policy) (name, rest int) {
	if name = p.ID.Compare(o.ID); name != 0 {
		return name, 0
	}
	if rest = cmp.Compare(p.Accepted, o.Accepted); rest != 0 {
		return 0, rest
	}
	return 0, text(p, o)
}

// set is a sorted copy of a list without repetition; nil if it is empty.
func set[T comparable](list []T, compare func(T, T) int) []T {
	if len(list) == 0 {
		return nil
	}
	s := slices.SortedFunc(slices.Values(list), compare)
	return slices.Compact(s)
}

func normalMember(m Member) Member {
	m.Grants = set(m.Grants, func(a, b Grant) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	m.Gateways = set(m.Gateways, Address.Compare)
	return m
}

func normalExport(e Export) Export {
	e.Ports = set(e.Ports, Port.Compare)
	e.Gateways = set(e.Gateways, Address.Compare)
	e.Serves = set(e.Serves, func(a, b spiffeid.ID) int { return cmp.Compare(a.String(), b.String()) })
	e.Visible.Clusters = set(e.Visible.Clusters, ClusterID.Compare)
	e.Visible.Regions = set(e.Visible.Regions, cmp.Compare[string])
	return e
}

func normalPolicy(p Policy) Policy {
	p.Deny.Clusters = copied(p.Deny.Clusters)
	p.Deny.Regions = copied(p.Deny.Regions)
	p.Order = copied(p.Order)
	for i, s := range p.Order {
		p.Order[i] = Step{Kind: s.Kind, Clusters: copied(s.Clusters), Regions: copied(s.Regions), Split: copied(s.Split)}
	}
	return p
}

// copied is a copy of a list; nil if it is empty.
func copied[T any](list []T) []T { return append([]T(nil), list...) }

// The putters and the droppers below change a catalog that nobody else has
// seen yet.

func (c *Catalog) putMember(r *record[Member]) { c.members = c.members.set(r.value.Cluster, r) }

func (c *Catalog) dropMember(id ClusterID) { c.members = c.members.without(id) }

func (c *Catalog) putExport(r *record[Export]) {
	id := r.value.ID()
	o, _ := c.services.get(id.Service)
	if _, known := o.get(id.Cluster); !known {
		names, _ := c.offering.get(id.Cluster)
		c.offering = c.offering.set(id.Cluster, names.set(id.Service, struct{}{}))
	}
	c.services = c.services.set(id.Service, o.set(id.Cluster, r))
}

func (c *Catalog) dropExport(id ExportID) {
	o, _ := c.services.get(id.Service)
	if _, known := o.get(id.Cluster); !known {
		return
	}
	if o = o.without(id.Cluster); o.len() > 0 {
		c.services = c.services.set(id.Service, o)
	} else {
		c.services = c.services.without(id.Service)
	}
	names, _ := c.offering.get(id.Cluster)
	if names = names.without(id.Service); names.len() > 0 {
		c.offering = c.offering.set(id.Cluster, names)
	} else {
		c.offering = c.offering.without(id.Cluster)
	}
}

func (c *Catalog) putPolicy(r *record[Policy]) {
	c.dropPolicy(r.value.ID)
	c.policies = c.policies.set(r.value.ID, r)
	target := r.value.target()
	set, _ := c.targeting.get(target)
	c.targeting = c.targeting.set(target, set.set(r.value.ID, r))
}

func (c *Catalog) dropPolicy(id PolicyID) {
	r, known := c.policies.get(id)
	if !known {
		return
	}
	c.policies = c.policies.without(id)
	target := r.value.target()
	set, _ := c.targeting.get(target)
	if set = set.without(id); set.len() > 0 {
		c.targeting = c.targeting.set(target, set)
	} else {
		c.targeting = c.targeting.without(target)
	}
}
