package agent

import (
	"net/netip"
	"reflect"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/manifest"
	"github.com/weftmesh/weft/identity"
)

// service is one of the cluster's own services, as the source describes it. It
// is immutable.
type service struct {
	id        federation.ServiceID
	export    bool
	ports     []federation.Port
	mode      federation.Mode
	visible   federation.Selector
	serves    []spiffeid.ID
	gateways  []federation.Address
	endpoints []endpoint
}

// endpoint is one place where a service runs.
type endpoint struct {
	name  string // unique in its service: its address at each port
	ports []endpointPort
	check *check // nil: it counts as ready
}

// endpointPort is where an endpoint takes connections for one port of its
// service.
type endpointPort struct {
	number uint16         // of the service's port
	plain  netip.AddrPort // the workload
	proxy  netip.AddrPort // the weft-proxy before it; invalid if there is none
}

// newService makes the service of a manifest. Its service accounts become
// identities of the own cluster; a name that no identity can have is left out
// (the manifest was checked).
func newService(td spiffeid.TrustDomain, c federation.ClusterID, m *manifest.Service) *service {
	s := &service{id: m.ID, export: m.Export, ports: m.Ports, mode: m.Mode, visible: m.Visible}
	for _, account := range m.ServiceAccounts {
		if id, err := identity.WorkloadID(td, c, m.ID.Namespace, account); err == nil {
			s.serves = append(s.serves, id)
		}
	}
	for _, e := range m.Endpoints {
		var out endpoint
		for _, p := range m.Ports {
			if p.Protocol == federation.TCP {
				out.ports = append(out.ports, endpointPort{number: p.Number, plain: e.At(p), proxy: e.Proxy})
			}
			if out.name != "" {
				out.name += " "
			}
			out.name += e.At(p).String()
		}
		if h := m.HealthCheck; h != nil {
			out.check = &check{
				http: h.Path != "", path: h.Path, address: e.At(h.Port).String(),
				interval: h.Interval, timeout: h.Timeout,
				unhealthyAfter: h.UnhealthyAfter, healthyAfter: h.HealthyAfter,
			}
		}
		s.endpoints = append(s.endpoints, out)
	}
	return s
}

func (s *service) equal(o *service) bool { return reflect.DeepEqual(s, o) }

// offer is the export that the service makes in cluster c.
func (s *service) offer(c federation.ClusterID) federation.Export {
	return federation.Export{
		Cluster:  c,
		Service:  s.id,
		Ports:    s.ports,
		Gateways: s.gateways,
		Mode:     s.mode,
		Serves:   s.serves,
		Visible:  s.visible,
	}
}

// behind is the service with the gateways that its export names.
func (s *service) behind(gateways []federation.Address) *service {
	c := *s
	c.gateways = gateways
	return &c
}

// endpointKey names an endpoint among all of the source's.
type endpointKey struct {
	service  federation.ServiceID
	endpoint string
}

// checks are all the checks that the services ask for.
func checks(services map[federation.ServiceID]*service) map[endpointKey]check {
	out := make(map[endpointKey]check)
	for id, s := range services {
		for _, e := range s.endpoints {
			if e.check != nil && s.export {
				out[endpointKey{id, e.name}] = *e.check
			}
		}
	}
	return out
}

// readiness counts the endpoints that can serve. settled is false while a
// check has had no outcome yet.
func (s *service) readiness(state func(endpointKey) health) (r federation.Readiness, settled bool) {
	settled = true
	for _, e := range s.endpoints {
		r.Total++
		switch s.health(e, state) {
		case healthReady:
			r.Ready++
		case healthUnknown:
			settled = false
		}
	}
	return r, settled
}

// health of one endpoint: without a check it is ready.
func (s *service) health(e endpoint, state func(endpointKey) health) health {
	if e.check == nil {
		return healthReady
	}
	return state(endpointKey{s.id, e.name})
}
