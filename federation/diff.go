package federation

import (
	"cmp"
	"reflect"
	"slices"
)

// ChangeKind says what a change is about.
type ChangeKind uint8

// The kinds of changes, in the order in which Diff lists them.
const (
	MemberChanged  ChangeKind = iota // a registration
	PolicyChanged                    // a policy
	ExportChanged                    // an export
	ServiceChanged                   // the plans of a service may differ, for whatever reason
)

func (k ChangeKind) String() string {
	return enumName(k, "member", "policy", "export", "service")
}

// ChangeOp says what became of it.
type ChangeOp uint8

// The operations.
const (
	Changed ChangeOp = iota
	Added
	Removed
)

func (o ChangeOp) String() string { return enumName(o, "changed", "added", "removed") }

// Change is one difference between two catalogs.
type Change struct {
	Kind    ChangeKind
	Op      ChangeOp
	Cluster ClusterID // MemberChanged and ExportChanged
	Policy  PolicyID  // PolicyChanged
	Service ServiceID // ExportChanged and ServiceChanged
}

// String is, for example, "export added eu-1/shop/payments".
func (c Change) String() string {
	s := c.Kind.String() + " " + c.Op.String() + " "
	switch c.Kind {
	case MemberChanged:
		return s + string(c.Cluster)
	case PolicyChanged:
		return s + c.Policy.Origin + "/" + c.Policy.String()
	case ExportChanged:
		return s + ExportID{c.Cluster, c.Service}.String()
	default:
		return s + c.Service.String()
	}
}

// Compare orders changes by kind, then name.
func (c Change) Compare(o Change) int {
	return cmp.Or(cmp.Compare(c.Kind, o.Kind), c.Service.Compare(o.Service), c.Cluster.Compare(o.Cluster),
		c.Policy.Compare(o.Policy), cmp.Compare(c.Op, o.Op))
}

// Diff lists what differs between two catalogs, sorted: members, policies,
// exports, and every service whose plans may differ by that. Its cost is that
// of what differs; a policy for the whole mesh, or a cluster that moves to
// another region, concerns every service.
func Diff(old, new *Catalog) []Change {
	old, new = old.orEmpty(), new.orEmpty()
	var changes []Change
	services := make(map[ServiceID]bool)
	both := func(list func(c *Catalog)) { list(old); list(new) }

	for d := range diff(old.members, new.members, sameMember) {
		changes = append(changes, Change{Kind: MemberChanged, Op: op(d.inOld, d.inNew), Cluster: d.key})
		if d.inOld && d.inNew && !matters(&d.old.value, &d.new.value) {
			continue
		}
		both(func(c *Catalog) {
			if region(d.old) != region(d.new) {
				// Its callers see every service from elsewhere now.
				c.addServices(services, ServiceID{})
				return
			}
			names, _ := c.offering.get(d.key)
			for s := range names.all() {
				services[s] = true
			}
		})
	}
	for d := range diff(old.policies, new.policies, samePolicy) {
		changes = append(changes, Change{Kind: PolicyChanged, Op: op(d.inOld, d.inNew), Policy: d.key})
		for _, r := range []*record[Policy]{d.old, d.new} {
			if r != nil {
				both(func(c *Catalog) { c.addServices(services, r.value.target()) })
			}
		}
	}
	for d := range diff(old.services, new.services, func(a, b offers) bool { return a == b }) {
		before := len(changes)
		for e := range diff(d.old, d.new, sameExport) {
			changes = append(changes, Change{Kind: ExportChanged, Op: op(e.inOld, e.inNew), Cluster: e.key, Service: d.key})
		}
		if len(changes) > before {
			services[d.key] = true
		}
	}
	return addServiceChanges(changes, services, old, new)
}

// DiffWorlds lists, sorted, the services of catalog c whose plans may differ
// between two worlds. Its cost is that of what differs.
func DiffWorlds(c *Catalog, old, new *World) []Change {
	c = c.orEmpty()
	old, new = old.clone(), new.clone()
	services := make(map[ServiceID]bool)
	for d := range diff(old.readiness, new.readiness, equal) {
		if _, ok := c.services.get(d.key); ok && !same(d.old, d.new) {
			services[d.key] = true
		}
	}
	offered := func(cluster ClusterID) {
		names, _ := c.offering.get(cluster)
		for s := range names.all() {
			services[s] = true
		}
	}
	for d := range diff(old.silence, new.silence, equal) {
		offered(d.key)
	}
	for d := range diff(old.probes, new.probes, equal) {
		offered(d.key)
	}
	for d := range diff(old.drains, new.drains, equal) {
		offered(d.key)
	}
	return addServiceChanges(nil, services, c, c)
}

func equal[T comparable](a, b T) bool { return a == b }

// same reports whether two maps hold the same.
func same[K key[K], V comparable](a, b pmap[K, V]) bool {
	for range diff(a, b, equal) {
		return false
	}
	return true
}

func addServiceChanges(changes []Change, services map[ServiceID]bool, old, new *Catalog) []Change {
	for s := range services {
		_, was := old.services.get(s)
		_, is := new.services.get(s)
		changes = append(changes, Change{Kind: ServiceChanged, Op: op(was, is), Service: s})
	}
	slices.SortFunc(changes, Change.Compare)
	return changes
}

// addServices adds the services that a policy's target covers.
func (c *Catalog) addServices(to map[ServiceID]bool, target ServiceID) {
	if target.Name != "" {
		if _, ok := c.services.get(target); ok {
			to[target] = true
		}
		return
	}
	for s := range c.services.from(func(s ServiceID) bool { return s.Compare(target) < 0 }) {
		if target.Namespace != "" && s.Namespace != target.Namespace {
			return
		}
		to[s] = true
	}
}

func op(inOld, inNew bool) ChangeOp {
	switch {
	case inOld && inNew:
		return Changed
	case inNew:
		return Added
	default:
		return Removed
	}
}

func region(r *record[Member]) string {
	if r == nil {
		return ""
	}
	return r.value.Region
}

// matters reports whether plans can tell two registrations apart.
func matters(a, b *Member) bool {
	return a.State != b.State || a.Region != b.Region || a.Zone != b.Zone ||
		!slices.Equal(a.Grants, b.Grants) || !slices.Equal(a.Gateways, b.Gateways)
}

func sameMember(a, b *record[Member]) bool {
	if a == b {
		return true
	}
	x, y := a.value, b.value
	same := !matters(&x, &y)
	x.Grants, y.Grants, x.Gateways, y.Gateways = nil, nil, nil, nil
	return same && a.contested == b.contested && reflect.DeepEqual(x, y)
}

func sameExport(a, b *record[Export]) bool {
	return a == b || a.contested == b.contested && reflect.DeepEqual(a.value, b.value)
}

func samePolicy(a, b *record[Policy]) bool {
	return a == b || a.contested == b.contested && reflect.DeepEqual(a.value, b.value)
}
