package agent

import (
	"net/netip"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// scene is one consistent moment of a mesh, immutable but for its maps' owner:
// what drive carries out.
type scene struct {
	catalog *federation.Catalog
	world   *federation.World
	touched map[federation.ServiceID]bool
	trust   bool
}

// scene takes the present moment, and what was touched since the one before.
func (m *mesh) scene() scene {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := scene{catalog: m.catalog, world: m.world, touched: m.touched, trust: m.trust}
	m.touched, m.trust = make(map[federation.ServiceID]bool), false
	return s
}

// present is the catalog and world of the moment.
func (m *mesh) present() (*federation.Catalog, *federation.World) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.catalog, m.world
}

// believed is whom the mesh trusts at the moment.
func (m *mesh) believed() (federation.Bundle, []federation.Denial, []*federationv1.Member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var members []*federationv1.Member
	for x := range m.catalog.Members() {
		members = append(members, federationv1.EncodeMember(*x))
	}
	return m.bundle, m.inForce(), members
}

// vip is the clusterset address of a service here, invalid if it has none.
func (m *mesh) vip(s federation.ServiceID) netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.vips[s]
}

// imported is how many services have an address here.
func (m *mesh) imported() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.vips)
}

// lookup implements directory: a service exists for DNS when it is in the
// catalog and has an address.
func (m *mesh) lookup(s federation.ServiceID) (netip.Addr, []federation.Port, bool) {
	m.mu.Lock()
	vip, catalog := m.vips[s], m.catalog
	m.mu.Unlock()
	svc, ok := catalog.ServiceFrom(s, m.self)
	if !ok {
		return netip.Addr{}, nil, false
	}
	return vip, svc.Ports, true
}

// hasNamespace implements directory.
func (m *mesh) hasNamespace(ns string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.namespaces[ns] > 0
}

// ownService is one service of the source.
func (m *mesh) ownService(s federation.ServiceID) (*service, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	svc, ok := m.own.services[s]
	return svc, ok
}

// thresholds are the ready fractions at which policies move traffic away from
// a service's clusters.
func (m *mesh) thresholds(s federation.ServiceID) []federation.PerMille {
	catalog, _ := m.present()
	var out []federation.PerMille
	for p := range catalog.Policies() {
		if p.SpillBelow > 0 &&
			(p.TargetNamespace == "" || p.TargetNamespace == s.Namespace) &&
			(p.TargetService == "" || p.TargetService == s.Name) {
			out = append(out, p.SpillBelow)
		}
	}
	return out
}

// service is a service as the own cluster sees it.
func (m *mesh) service(s federation.ServiceID) (*federation.Service, bool) {
	catalog, _ := m.present()
	return catalog.ServiceFrom(s, m.self)
}

// snapshot is what is persisted: the records, by key, and the revision.
func (m *mesh) snapshot() ([]*federationv1.Record, federation.Revision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held.sorted(), m.held.revision
}
