package agent

import (
	"maps"
	"math"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// ownServices is what the source and the checks say. Until the source has been
// readable once, or the disk had its last good state, nothing is known, and
// what the controller stores of the own cluster counts.
type ownServices struct {
	known     bool
	services  map[federation.ServiceID]*service
	policies  map[federation.PolicyID]federation.Policy
	readiness map[federation.ServiceID]federation.Readiness // of the services whose checks have all had an outcome
}

// knownOwn are the own records as the controller stores them, if it is certain
// that it stores just those: its digest of them is the same as that of what
// this agent holds. Else it is nil.
func (m *mesh) knownOwn(w *federationv1.Welcome) map[string]*federationv1.Record {
	theirs, err := w.GetReported().Decode()
	if err != nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var ours federationv1.Sums
	known := make(map[string]*federationv1.Record)
	for key, r := range m.held.records {
		k, err := federationv1.ParseKey(key)
		if err != nil {
			continue
		}
		switch {
		case k.Cluster == m.self && (k.Kind == federationv1.KindExport || k.Kind == federationv1.KindReadiness):
			if value, err := unaccepted(r).Value(); err == nil {
				ours.Add(key, value)
			}
			known[key] = r
		case k.Kind == federationv1.KindPolicy && k.Policy.Origin == string(m.self):
			known[key] = r
		}
	}
	if ours != theirs {
		return nil
	}
	return known
}

// unaccepted is an own record as it was reported: without the revision of its
// acceptance, which the controller adds and leaves out of the digest.
func unaccepted(r *federationv1.Record) *federationv1.Record {
	if r.GetExport().GetAccepted() == 0 {
		return r
	}
	r = proto.CloneOf(r)
	r.GetExport().Accepted = 0
	return r
}

// ownExport is what the own offer of a service is in the catalog: what the
// source says now, with what the controller alone decides taken from its last
// word. An export that it has not accepted yet loses every conflict.
func (m *mesh) ownExport(s federation.ServiceID) federation.Event {
	id := federation.ExportID{Cluster: m.self, Service: s}
	svc, ok := m.own.services[s]
	if !ok || !svc.export {
		return federation.DeleteExport{Export: id}
	}
	e := svc.offer(m.self)
	e.Accepted = math.MaxInt64
	if r, ok := m.held.records[federationv1.ExportKey(id).String()]; ok {
		if stored, err := r.GetExport().Decode(); err == nil {
			e.Accepted, e.Network = stored.Accepted, stored.Network
		}
	}
	return federation.PutExport{Export: e}
}

// ownPolicy is the same for a policy of the source.
func (m *mesh) ownPolicy(id federation.PolicyID) federation.Event {
	p, ok := m.own.policies[id]
	if !ok {
		return federation.DeletePolicy{Policy: id}
	}
	p.Accepted = math.MaxInt64
	if r, ok := m.held.records[federationv1.PolicyKey(id).String()]; ok {
		if stored, err := r.GetPolicy().Decode(); err == nil {
			p.Accepted = stored.Accepted
		}
	}
	return federation.PutPolicy{Policy: p}
}

// ownReadiness puts the own readiness of a service into the world: what the
// checks say, or, until they do, what was known before.
func (m *mesh) ownReadiness(s federation.ServiceID) {
	id := federation.ExportID{Cluster: m.self, Service: s}
	if r, ok := m.own.readiness[s]; ok {
		m.world = m.world.WithReadiness(id, r)
		return
	}
	if svc, ok := m.own.services[s]; !m.own.known || ok && svc.export {
		if r, err := m.held.records[federationv1.ReadinessKey(id).String()].GetReadiness().Decode(); err == nil && r.Total > 0 {
			m.world = m.world.WithReadiness(id, r)
			return
		}
	}
	m.world = m.world.WithoutReadiness(id)
}

// setOwn replaces what the source says.
func (m *mesh) setOwn(services map[federation.ServiceID]*service, policies map[federation.PolicyID]federation.Policy) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.own
	m.own.known, m.own.services, m.own.policies = true, services, policies
	m.own.readiness = maps.Clone(before.readiness)
	var events []federation.Event
	concerned := make(map[federation.ServiceID]bool)
	for s, now := range services {
		if old, ok := before.services[s]; !ok || !old.equal(now) || !before.known {
			concerned[s] = true
		}
	}
	for s := range before.services {
		if _, ok := services[s]; !ok {
			concerned[s] = true
			delete(m.own.readiness, s)
		}
	}
	names := make(map[federation.PolicyID]bool)
	for id := range policies {
		names[id] = true
	}
	for id := range before.policies {
		names[id] = true
	}
	if !before.known { // what an earlier process offered, and this source does not
		for e := range m.catalog.ExportsOf(m.self) {
			concerned[e.Service] = true
		}
		for p := range m.catalog.Policies() {
			if p.ID.Origin == string(m.self) {
				names[p.ID] = true
			}
		}
	}
	for s := range concerned {
		events = append(events, m.ownExport(s))
		m.ownReadiness(s)
		m.touched[s] = true
	}
	for id := range names {
		events = append(events, m.ownPolicy(id))
	}
	m.catalog = m.catalog.Apply(m.held.revision, events...)
	m.notify()
}

// setReadiness takes what the checks say of services: their endpoints may have
// changed even where the count did not. A service without a count keeps what
// was known before.
func (m *mesh) setReadiness(counts map[federation.ServiceID]federation.Readiness, touched ...federation.ServiceID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.own.readiness == nil {
		m.own.readiness = make(map[federation.ServiceID]federation.Readiness)
	}
	for s, r := range counts {
		m.own.readiness[s] = r
		m.ownReadiness(s)
	}
	for _, s := range touched {
		m.touched[s] = true
	}
	m.notify()
}

// sameReport reports whether a stored record says what the agent reports: what
// the controller decides alone does not count.
func sameReport(stored, own *federationv1.Record) bool {
	strip := func(r *federationv1.Record) ([]byte, error) {
		switch r.GetBody().(type) {
		case *federationv1.Record_Export:
			e, err := r.GetExport().Decode()
			if err != nil {
				return nil, err
			}
			e.Accepted, e.Network = 0, ""
			return federationv1.ExportRecord(e).Value()
		case *federationv1.Record_Policy:
			p, err := r.GetPolicy().Decode()
			if err != nil {
				return nil, err
			}
			p.Accepted = 0
			return federationv1.PolicyRecord(p).Value()
		}
		return r.Value()
	}
	a, errA := strip(stored)
	b, errB := strip(own)
	return errA == nil && errB == nil && string(a) == string(b)
}
