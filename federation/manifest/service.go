package manifest

import (
	"net/netip"
	"time"

	"github.com/weftmesh/weft/federation"
)

// Service is a service of a cluster without Kubernetes: what it offers, and
// where its endpoints are.
type Service struct {
	ID     federation.ServiceID
	Export bool // to the mesh; otherwise its own cluster alone knows it
	Mode   federation.Mode
	// Visible chooses the clusters that may import it.
	Visible federation.Selector
	// ServiceAccounts are those that its proxies run as, in the service's
	// namespace: the identities that callers must see in passthrough mode.
	ServiceAccounts []string // sorted, unique
	Ports           []federation.Port
	Endpoints       []Endpoint
	HealthCheck     *HealthCheck // nil: endpoints count as ready
}

// Endpoint is one place that serves a service.
type Endpoint struct {
	Address netip.Addr
	// Ports has, for every port of the service, the port at this address.
	Ports map[federation.Port]uint16
	Zone  string // empty: the cluster's
	// Proxy is where the endpoint's own proxy takes tunnels; every endpoint has
	// one in passthrough mode.
	Proxy netip.AddrPort
}

// At is where an endpoint serves a port of its service.
func (e Endpoint) At(p federation.Port) netip.AddrPort {
	return netip.AddrPortFrom(e.Address, e.Ports[p])
}

// HealthCheck is how an agent finds out whether an endpoint can serve: by an
// HTTP request where Path is set, else by a TCP connection.
type HealthCheck struct {
	Port           federation.Port // of the service
	Path           string          // HTTP GET; a status from 200 to 399 is healthy
	Interval       time.Duration
	Timeout        time.Duration // of one check
	UnhealthyAfter int           // failures in a row
	HealthyAfter   int           // successes in a row
}

// What a health check has where it does not say.
const (
	DefaultInterval       = time.Second
	DefaultTimeout        = 500 * time.Millisecond
	DefaultUnhealthyAfter = 2
	DefaultHealthyAfter   = 1
)
