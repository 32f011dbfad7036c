package xds

import (
	"fmt"
	"maps"
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/weftmesh/weft/federation"
)

// state is what a client has taken over, and its versions.
type state struct {
	config    *Config
	versions  [typeCount]map[string]string
	bases     map[string]*Cluster    // clusters without their endpoints
	endpoints map[string][]*Locality // as far as they are known
}

func newState() state {
	s := state{
		config: &Config{
			Listeners: map[string]*Listener{}, Clusters: map[string]*Cluster{},
			Routes: map[string]*RouteTable{}, Trust: map[string]*Trust{},
		},
		bases: map[string]*Cluster{}, endpoints: map[string][]*Locality{},
	}
	for t := range s.versions {
		s.versions[t] = map[string]string{}
	}
	return s
}

// have are the versions of a type, for a request that is sent later.
func (s *state) have(t Type) map[string]string { return maps.Clone(s.versions[t]) }

// references are the names that clusters and listeners refer to.
func (s *state) references() map[Type]map[string]bool {
	endpoints, routes, trust := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for name, c := range s.bases {
		endpoints[name] = true
		for _, t := range c.TLS {
			if t != nil {
				trust[t.Trust] = true
			}
		}
	}
	for _, l := range s.config.Listeners {
		if l.Local != nil {
			routes[l.Local.Routes] = true
		}
		for _, c := range l.Chains {
			if c.Terminate != nil {
				routes[c.Terminate.Routes] = true
				trust[c.Terminate.TLS.Trust] = true
			}
		}
	}
	return map[Type]map[string]bool{TypeEndpoints: endpoints, TypeRoutes: routes, TypeSecret: trust}
}

// step is one response on its way into the state. A name with a nil value is
// removed.
type step struct {
	state   *state
	typ     Type
	next    *Config
	staged  map[string]staged
	refused []Refusal // that could not be read
}

type staged struct {
	version string
	value   any // *Cluster, []*Locality, *Listener, *RouteTable, *Trust; nil: removed
}

// step reads a response. The state stays as it is until commit.
func (s *state) step(t Type, m *discoveryv3.DeltaDiscoveryResponse) *step {
	st := &step{state: s, typ: t, staged: make(map[string]staged, len(m.GetResources()))}
	next := *s.config
	st.next = &next
	if rev, err := federation.ParseRevision(m.GetSystemVersionInfo()); err == nil {
		next.Revision = rev
	}
	for _, r := range m.GetResources() {
		name := r.GetName()
		if v, ok := s.versions[t][name]; ok && v == r.GetVersion() {
			continue
		}
		value, err := readResource(t, name, r)
		if err != nil {
			st.refused = append(st.refused, Refusal{Name: Name{t, name}, Reason: err.Error()})
			continue
		}
		st.staged[name] = staged{r.GetVersion(), value}
	}
	for _, name := range m.GetRemovedResources() {
		st.staged[name] = staged{}
	}
	if len(st.staged) > 0 {
		st.own(st.next, s.config)
	}
	for name, v := range st.staged {
		st.put(name, v.value)
	}
	return st
}

func readResource(t Type, name string, r *discoveryv3.Resource) (value any, err error) {
	if url := r.GetResource().GetTypeUrl(); url != t.url() {
		return nil, fmt.Errorf("type %q in a response of %s", url, t)
	}
	body := r.GetResource().GetValue()
	own := name
	switch t {
	case TypeCluster:
		var c *Cluster
		if c, err = readCluster(body); err == nil {
			own, value = c.Name, c
		}
	case TypeEndpoints:
		own, value, err = readNamedEndpoints(body)
	case TypeListener:
		var l *Listener
		if l, err = readListener(body); err == nil {
			own, value = l.Name, l
		}
	case TypeRoutes:
		var t *RouteTable
		if t, err = readRoutes(body); err == nil {
			own, value = t.Name, t
		}
	default:
		var s *Trust
		if s, err = readTrust(body); err == nil {
			own, value = s.Name, s
		}
	}
	if err == nil && own != name {
		err = fmt.Errorf("name: %q in a resource of this name", own)
	}
	return value, err
}

func readNamedEndpoints(body []byte) (string, any, error) {
	name, localities, err := readEndpoints(body)
	if localities == nil {
		localities = []*Locality{}
	}
	return name, localities, err
}

// put changes next.
func (st *step) put(name string, value any) {
	s, next := st.state, st.next
	switch st.typ {
	case TypeCluster, TypeEndpoints:
		base, localities := s.bases[name], s.endpoints[name]
		if st.typ == TypeCluster {
			base, _ = value.(*Cluster)
		} else if localities, _ = value.([]*Locality); localities == nil {
			localities = []*Locality{} // they do not exist: nothing to connect to
		}
		if base == nil || localities == nil {
			delete(next.Clusters, name)
			return
		}
		c := *base
		c.Localities = localities
		next.Clusters[name] = &c
	case TypeListener:
		set(next.Listeners, name, value)
	case TypeRoutes:
		set(next.Routes, name, value)
	case TypeSecret:
		set(next.Trust, name, value)
	}
}

func set[V any](m map[string]*V, name string, value any) {
	if v, ok := value.(*V); ok {
		m[name] = v
	} else {
		delete(m, name)
	}
}

// restore puts back what was there before, or nothing.
func (st *step) restore(name string) {
	next, old := st.next, st.state.config
	switch st.typ {
	case TypeCluster, TypeEndpoints:
		back(next.Clusters, old.Clusters, name)
	case TypeListener:
		back(next.Listeners, old.Listeners, name)
	case TypeRoutes:
		back(next.Routes, old.Routes, name)
	case TypeSecret:
		back(next.Trust, old.Trust, name)
	}
}

func back[V any](next, old map[string]*V, name string) {
	if v, ok := old[name]; ok {
		next[name] = v
	} else {
		delete(next, name)
	}
}

// own gives next a copy of the map of old that the step changes.
func (st *step) own(next, old *Config) {
	switch st.typ {
	case TypeCluster, TypeEndpoints:
		next.Clusters = maps.Clone(old.Clusters)
	case TypeListener:
		next.Listeners = maps.Clone(old.Listeners)
	case TypeRoutes:
		next.Routes = maps.Clone(old.Routes)
	case TypeSecret:
		next.Trust = maps.Clone(old.Trust)
	}
}

// update is what the engine must take over, or nil if nothing changed.
func (st *step) update() *Update {
	if len(st.staged) == 0 {
		return nil
	}
	u := &Update{Config: st.next, Previous: st.state.config}
	names := slices.Sorted(maps.Keys(st.staged))
	switch st.typ {
	case TypeCluster, TypeEndpoints:
		u.Clusters = names
	case TypeListener:
		u.Listeners = names
	case TypeRoutes:
		u.Routes = names
	case TypeSecret:
		u.Trust = names
	}
	return u
}

// commit makes next the state, without what the engine refused. It returns
// those refusals, by the names of the response.
func (st *step) commit(refused []Refusal) []Refusal {
	s := st.state
	var told []Refusal
	for _, r := range refused {
		v, ok := st.staged[r.Name.Name]
		if !ok || v.value == nil || !st.concerns(r.Name.Type) {
			continue // nothing of this response, or a removal, which always happens
		}
		if len(told) == 0 {
			// The engine has st.next, and what was handed out is never changed.
			next := *st.next
			st.own(&next, st.next)
			st.next = &next
		}
		st.restore(r.Name.Name)
		delete(st.staged, r.Name.Name)
		told = append(told, Refusal{Name: Name{st.typ, r.Name.Name}, Reason: r.Reason})
	}
	for name, v := range st.staged {
		if v.value == nil {
			delete(s.versions[st.typ], name)
		} else {
			s.versions[st.typ][name] = v.version
		}
		switch st.typ {
		case TypeCluster:
			if c, ok := v.value.(*Cluster); ok {
				s.bases[name] = c
			} else {
				delete(s.bases, name)
				delete(s.endpoints, name)
				delete(s.versions[TypeEndpoints], name)
			}
		case TypeEndpoints:
			l, _ := v.value.([]*Locality)
			if l == nil {
				l = []*Locality{}
			}
			s.endpoints[name] = l
		}
	}
	s.config = st.next
	return told
}

// concerns reports whether the engine may mean a resource of this response by
// one of type t: it knows clusters with their endpoints only.
func (st *step) concerns(t Type) bool {
	return t == st.typ || t == TypeCluster && st.typ == TypeEndpoints
}
