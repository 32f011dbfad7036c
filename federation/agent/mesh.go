package agent

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// mesh is what the agent knows: the records that the controller sent or the
// disk kept, with the cluster's own services, readiness and probes laid over
// them, since of those the agent knows more, and earlier, than anybody. It
// turns changes into the next catalog and world; drive carries those out.
//
// It is safe for concurrent use. Its catalogs and worlds are immutable.
type mesh struct {
	trustDomain string
	self        federation.ClusterID
	log         *slog.Logger

	changed chan struct{} // room for one: there is something to carry out
	dirty   chan struct{} // room for one: there is something to persist
	// selfChanged is called, without the lock, when the registration of the own
	// cluster has changed.
	selfChanged func()
	// onFull is called, without the lock, when a full set is complete.
	onFull func()

	mu         sync.Mutex
	held       *held
	catalog    *federation.Catalog
	world      *federation.World
	vips       map[federation.ServiceID]netip.Addr
	namespaces map[string]int // how many services each has
	own        ownServices
	denials    map[string]federation.Denial // by key
	bundle     federation.Bundle            // the newest
	synced     bool                         // a full set has been complete in this process
	// touched are services whose plans stay the same, but of which something
	// else changed that proxies are told: addresses, endpoints.
	touched map[federation.ServiceID]bool
	trust   bool // members, bundle or denials changed since the last scene
}

func newMesh(trustDomain string, self federation.ClusterID, log *slog.Logger) *mesh {
	return &mesh{
		trustDomain: trustDomain,
		self:        self,
		log:         log,
		changed:     make(chan struct{}, 1),
		dirty:       make(chan struct{}, 1),
		selfChanged: func() {},
		onFull:      func() {},
		held:        newHeld(),
		world:       new(federation.World),
		vips:        make(map[federation.ServiceID]netip.Addr),
		namespaces:  make(map[string]int),
		denials:     make(map[string]federation.Denial),
		touched:     make(map[federation.ServiceID]bool),
		trust:       true,
	}
}

// restore puts the records of an earlier process in place.
func (m *mesh) restore(records []*federationv1.Record, rev federation.Revision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := make(map[string]*federationv1.Record)
	for _, r := range records {
		if m.held.put(r) {
			changed[r.GetKey()] = r
		}
	}
	m.held.revision = rev
	m.take(changed)
}

// add puts one record in place that came by another way than a session.
func (m *mesh) add(r *federationv1.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held.put(r) {
		m.take(map[string]*federationv1.Record{r.GetKey(): r})
	}
}

// hello is what the agent says it has.
func (m *mesh) hello() *federationv1.Hello {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &federationv1.Hello{
		Have:    federationv1.EncodeRevision(m.held.revision),
		Digest:  m.held.sums.Encode(),
		Denials: m.denialMessages(),
	}
}

// denialMessages are the denials in force.
func (m *mesh) denialMessages() []*federationv1.Denial {
	var out []*federationv1.Denial
	for _, d := range m.inForce() {
		out = append(out, federationv1.EncodeDenial(d))
	}
	return out
}

// inForce are the denials that count, sorted: those of a generation that a
// later, active registration has taken the place of do not. A store that was
// restored from a backup knows no later generation than the denied one.
func (m *mesh) inForce() []federation.Denial {
	var out []federation.Denial
	for _, d := range m.denials {
		x, ok := m.catalog.Member(d.Cluster)
		if ok && x.State == federation.MemberActive && x.Generation > d.Generation {
			continue
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b federation.Denial) int {
		return cmp.Or(a.Cluster.Compare(b.Cluster), cmp.Compare(a.Generation, b.Generation))
	})
	return out
}

// begin starts a session with what the controller said at its begin.
func (m *mesh) begin(w *federationv1.Welcome) error {
	if td := w.GetTrustDomain(); td != m.trustDomain {
		return fmt.Errorf("the controller is of trust domain %q, this agent of %q: check the controllers' addresses", td, m.trustDomain)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if have, now := m.held.revision, w.GetRevision(); have.Number > 0 &&
		(have.Incarnation != now.GetIncarnation() || have.Number > now.GetNumber()) {
		m.log.Warn("the controller's state is older than this agent's, or another: everything is kept until its full set is complete",
			"have", have.String(), "controllerHas", revisionText(now))
	}
	m.held.begin(w.GetDiffering())
	return nil
}

// end forgets a session that broke off.
func (m *mesh) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held.end()
}

// known says whether a full set has been complete in this process, and whether
// the controller stores exports of this cluster.
func (m *mesh) known() (synced, stored bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key := range m.held.records {
		if k, err := federationv1.ParseKey(key); err == nil && k.Kind == federationv1.KindExport && k.Cluster == m.self {
			stored = true
			break
		}
	}
	return m.synced, stored
}

// update takes one update of the session.
func (m *mesh) update(u *federationv1.Update) {
	m.mu.Lock()
	old := m.held.revision
	selfBefore := m.held.records[federationv1.MemberKey(m.self).String()]
	changed := m.held.apply(u)
	m.take(changed)
	if m.held.revision != old {
		m.catalog = m.catalog.Apply(m.held.revision)
		m.wake() // a number alone is not worth a write: the digest says what is held
	}
	m.synced = m.synced || u.GetFull()
	self := m.held.records[federationv1.MemberKey(m.self).String()]
	m.mu.Unlock()
	if self != selfBefore {
		m.selfChanged()
	}
	if u.GetFull() {
		m.onFull()
	}
}

// take carries changed records into catalog, world and the rest. A record that
// this version cannot read changes nothing: what was there before stays.
func (m *mesh) take(changed map[string]*federationv1.Record) {
	if len(changed) == 0 {
		return
	}
	var events []federation.Event
	for key, r := range changed {
		k, err := federationv1.ParseKey(key)
		var body any
		if err == nil && r != nil {
			var f federationv1.Fact
			f, err = r.Decode()
			body = f.Body
		}
		if err != nil {
			m.log.Warn("a record from the controller cannot be used: what was known before stays", "error", err)
			continue
		}
		if e := m.takeOne(k, body); e != nil {
			events = append(events, e)
		}
	}
	m.catalog = m.catalog.Apply(m.held.revision, events...)
	m.notify()
}

// takeOne carries one record, or its removal where body is nil, into the world
// and the rest, and returns what it means for the catalog.
func (m *mesh) takeOne(k federationv1.Key, body any) federation.Event {
	switch k.Kind {
	case federationv1.KindMember:
		m.trust = true
		if b, ok := body.(federation.Member); ok {
			return federation.PutMember{Member: b}
		}
		return federation.DeleteMember{Cluster: k.Cluster}
	case federationv1.KindExport:
		if k.Cluster == m.self && m.own.known {
			return m.ownExport(k.Service)
		}
		if b, ok := body.(federation.Export); ok {
			return federation.PutExport{Export: b}
		}
		return federation.DeleteExport{Export: k.Export()}
	case federationv1.KindPolicy:
		if k.Policy.Origin == string(m.self) && m.own.known {
			return m.ownPolicy(k.Policy)
		}
		if b, ok := body.(federation.Policy); ok {
			return federation.PutPolicy{Policy: b}
		}
		return federation.DeletePolicy{Policy: k.Policy}
	case federationv1.KindReadiness:
		if k.Cluster == m.self {
			m.ownReadiness(k.Service)
		} else if b, ok := body.(federation.Readiness); ok {
			m.world = m.world.WithReadiness(k.Export(), b)
		} else {
			m.world = m.world.WithoutReadiness(k.Export())
		}
	case federationv1.KindSilence:
		// That the own link is silent says nothing about the own endpoints.
		if d, _ := body.(time.Duration); k.Cluster != m.self {
			m.world = m.world.WithSilence(k.Cluster, d)
		}
	case federationv1.KindDrain:
		left := federation.All
		if b, ok := body.(federation.Drain); ok {
			left = b.Remaining
		}
		m.world = m.world.WithDrain(k.Cluster, left)
	case federationv1.KindVIP:
		if k.Cluster == m.self {
			b, _ := body.(federation.VIP)
			m.setVIP(k.Service, b)
		}
	case federationv1.KindDenial:
		m.trust = true
		if b, ok := body.(federation.Denial); ok {
			m.denials[k.String()] = b
		} else {
			delete(m.denials, k.String())
		}
	case federationv1.KindBundle:
		// A bundle that is gone leaves the last one in force.
		if b, ok := body.(federation.Bundle); ok && b.Sequence >= m.bundle.Sequence {
			m.bundle, m.trust = b, true
		}
	}
	return nil
}

func (m *mesh) setVIP(s federation.ServiceID, v federation.VIP) {
	_, had := m.vips[s]
	has := v.Address.IsValid() && v.Released.IsZero()
	switch {
	case has:
		m.vips[s] = v.Address
		if !had {
			m.namespaces[s.Namespace]++
		}
	case had:
		delete(m.vips, s)
		if m.namespaces[s.Namespace]--; m.namespaces[s.Namespace] == 0 {
			delete(m.namespaces, s.Namespace)
		}
	}
	m.touched[s] = true
}

// setProbes replaces what the own gateways see of other clusters.
func (m *mesh) setProbes(before, now map[federation.ClusterID]federation.Probe) {
	m.mu.Lock()
	defer m.mu.Unlock()
	world := m.world
	for c := range before {
		if _, ok := now[c]; !ok {
			world = world.WithProbe(c, federation.ProbeUnknown)
		}
	}
	for c, p := range now {
		if c != m.self {
			world = world.WithProbe(c, p)
		}
	}
	if world != m.world {
		m.world = world
		m.notify()
	}
}

// touchAll has every service carried out anew: something that all plans need,
// such as a gateway's address, was resolved anew.
func (m *mesh) touchAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := range m.vips {
		m.touched[s] = true
	}
	m.notify()
}

func (m *mesh) notify() {
	m.wake()
	m.persist()
}

// wake has the present moment carried out, and persist has it written to disk.
func (m *mesh) wake()    { raise(m.changed) }
func (m *mesh) persist() { raise(m.dirty) }

// raise sets a flag: a channel with room for one.
func raise(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
