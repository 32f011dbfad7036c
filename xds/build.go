package xds

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftmesh/weft/federation"
)

// Builder translates what one kind of proxy must know into Envoy resources. It
// works on one service at a time and keeps what it built, so that a change
// costs what changed. It does no I/O; its user serialises calls.
//
// A part that cannot be translated is refused as a whole, with an error, and
// its last good resources stay.
type Builder struct {
	node    Node
	imports map[servicePort]*Import
	exports map[federation.ServiceID]*Export
	members Members

	built   map[Name]*Resource
	changed map[Name]bool
	owned   map[federation.ServiceID][]Name // of exports: what goes when they go
	// The tables and the listener that list every export are built once for all
	// changes, by Take.
	tablesStale bool
}

type servicePort struct {
	service federation.ServiceID
	port    uint16
}

// NewBuilder starts with nothing but the node's own listeners.
func NewBuilder(n Node) (*Builder, error) {
	switch {
	case n.TrustDomain.IsZero():
		return nil, errors.New("xds builder: no trust domain")
	case n.Cluster == "":
		return nil, errors.New("xds builder: no own cluster")
	case len(n.LocalPipe) > 107:
		return nil, fmt.Errorf("xds builder: local pipe %q has %d bytes; a unix socket's path has at most 107", n.LocalPipe, len(n.LocalPipe))
	}
	return &Builder{
		node:        n,
		imports:     make(map[servicePort]*Import),
		exports:     make(map[federation.ServiceID]*Export),
		built:       make(map[Name]*Resource),
		changed:     make(map[Name]bool),
		owned:       make(map[federation.ServiceID][]Name),
		tablesStale: true,
	}, nil
}

// SetImport adds or changes one imported service port.
func (b *Builder) SetImport(i Import) error {
	if i.Plan.Port == 0 {
		i.Plan.Port = i.Listen.Port()
	}
	p := &i.Plan
	switch {
	case !i.Listen.IsValid() || i.Listen.Port() == 0:
		return fmt.Errorf("import %s: no address to listen on", p.Service)
	case p.Port != i.Listen.Port():
		return fmt.Errorf("import %s: the plan is for port %d, the address is %s", p.Service, p.Port, i.Listen)
	}
	key := servicePort{p.Service, p.Port}
	endpoints, err := b.outEndpoints(&i)
	if err != nil {
		return err
	}
	// Plans change often, what else there is to an import rarely.
	resources := []*Resource{endpoints}
	old := b.imports[key]
	if old == nil || !old.sameTransports(&i) {
		cluster, err := b.node.outCluster(&i)
		if err != nil {
			return err
		}
		resources = append(resources, cluster)
	}
	if old == nil || old.Listen != i.Listen {
		listener, err := b.node.importListener(&i)
		if err != nil {
			return err
		}
		resources = append(resources, listener)
	}
	b.imports[key] = &i
	for _, r := range resources {
		b.put(r)
	}
	return nil
}

// outEndpoints takes the own cluster's proxies from its export.
func (b *Builder) outEndpoints(i *Import) (*Resource, error) {
	var own []netip.AddrPort
	if x := b.exports[i.Plan.Service]; x != nil {
		for _, p := range x.Ports {
			if p.Number == i.Plan.Port {
				own = p.addrs(proxyAddr)
			}
		}
	}
	last := b.built[Name{TypeEndpoints, portName(outKind, i.Plan.Service, i.Plan.Port)}]
	return b.node.outEndpoints(&i.Plan, own, last)
}

// RemoveImport takes one imported service port away.
func (b *Builder) RemoveImport(s federation.ServiceID, port uint16) {
	key := servicePort{s, port}
	if b.imports[key] == nil {
		return
	}
	delete(b.imports, key)
	b.remove(Name{TypeListener, portName(importKind, s, port)})
	b.remove(Name{TypeCluster, portName(outKind, s, port)})
	b.remove(Name{TypeEndpoints, portName(outKind, s, port)})
}

// SetExport adds or changes one own service.
func (b *Builder) SetExport(x Export) error {
	resources, err := b.node.exportResources(&x)
	if err != nil {
		return err
	}
	// What lists every export is built later; it must not fail then.
	if err := b.node.checkTables(&x); err != nil {
		return err
	}
	if old := b.exports[x.Service]; old == nil || !old.sameTables(&x) {
		b.tablesStale = true
	}
	b.exports[x.Service] = &x
	gone := b.owned[x.Service]
	names := make([]Name, 0, len(resources))
	for _, r := range resources {
		names = append(names, r.Name)
		b.put(r)
	}
	for _, n := range gone {
		if !slices.Contains(names, n) {
			b.remove(n)
		}
	}
	b.owned[x.Service] = names
	return b.rebuildOwn(x.Service)
}

// RemoveExport takes one own service away.
func (b *Builder) RemoveExport(s federation.ServiceID) error {
	if b.exports[s] == nil {
		return nil
	}
	delete(b.exports, s)
	for _, n := range b.owned[s] {
		b.remove(n)
	}
	delete(b.owned, s)
	b.tablesStale = true
	return b.rebuildOwn(s)
}

// rebuildOwn follows a change of own endpoints in the plans that use them.
func (b *Builder) rebuildOwn(s federation.ServiceID) error {
	for key, i := range b.imports {
		if key.service != s {
			continue
		}
		endpoints, err := b.outEndpoints(i)
		if err != nil {
			return err
		}
		b.put(endpoints)
	}
	return nil
}

// SetMembers says whom to believe.
func (b *Builder) SetMembers(m Members) error {
	m.Clusters = slices.Compact(slices.Sorted(slices.Values(m.Clusters)))
	secrets, err := buildSecrets(b.node.TrustDomain, m)
	if err != nil {
		return err
	}
	if !slices.Equal(m.Clusters, b.members.Clusters) {
		b.tablesStale = true
	}
	b.members = m
	for _, r := range secrets {
		b.put(r)
	}
	return nil
}

// Take returns what changed since it was called last; at first, everything. An
// error says which of the listeners and tables that list every export could
// not be built: their last good versions stay, and the Delta is valid.
func (b *Builder) Take() (Delta, error) {
	var err error
	if b.tablesStale {
		b.tablesStale = false
		err = b.buildTables()
	}
	var d Delta
	for n := range b.changed {
		if r := b.built[n]; r != nil {
			d.Changed = append(d.Changed, r)
		} else {
			d.Removed = append(d.Removed, n)
		}
	}
	clear(b.changed)
	slices.SortFunc(d.Changed, func(a, b *Resource) int { return a.Compare(b.Name) })
	slices.SortFunc(d.Removed, Name.Compare)
	return d, err
}

// Resources are all that are in force, sorted by type and name.
func (b *Builder) Resources() []*Resource {
	return slices.SortedFunc(maps.Values(b.built), func(x, y *Resource) int { return x.Compare(y.Name) })
}

func (b *Builder) buildTables() error {
	exports := slices.SortedFunc(maps.Values(b.exports), func(x, y *Export) int { return x.Service.Compare(y.Service) })
	resources, err := b.node.tables(exports, b.members.Clusters)
	for _, r := range resources {
		b.put(r)
	}
	return err
}

func (b *Builder) put(r *Resource) {
	if old := b.built[r.Name]; old != nil && old.Version == r.Version {
		return
	}
	b.built[r.Name] = r
	b.changed[r.Name] = true
}

func (b *Builder) remove(n Name) {
	if b.built[n] != nil {
		delete(b.built, n)
		b.changed[n] = true
	}
}
