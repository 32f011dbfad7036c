package xds

import (
	"crypto/x509"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// Kind is the part that a proxy plays in its cluster.
type Kind uint8

// The kinds of proxies.
const (
	// Gateway carries the cluster's traffic to and from other clusters: it has
	// an import listener for each imported service port and, if it has a Bind
	// address, an east-west listener.
	Gateway Kind = iota
	// Proxy stands beside a workload: it has import listeners for the
	// workload's calls and, if it has a Bind address, an inbound listener.
	Proxy
)

func (k Kind) String() string {
	if k == Proxy {
		return "proxy"
	}
	return "gateway"
}

// Node is what stays the same for as long as a view lives: whom its resources
// are for.
type Node struct {
	TrustDomain spiffeid.TrustDomain
	Cluster     federation.ClusterID // own cluster
	Kind        Kind
	// Bind is where the east-west or the inbound listener listens; invalid if
	// there is none.
	Bind netip.AddrPort
	// LocalPipe is the path at which the local listener makes its unix socket,
	// at most 107 bytes long. It is the proxy's alone.
	LocalPipe string
}

// Import is one service port that the proxy's callers can reach.
type Import struct {
	// Listen is the service's clusterset address and the port that callers
	// use.
	Listen netip.AddrPort
	// Plan is for the one port of Listen. Its gateways are IP addresses: names
	// are resolved before. A plan without tiers refuses every connection.
	Plan federation.Plan
	// Candidates are all exports of the service that the catalog shows this
	// cluster. How to authenticate them is configured whether the plan uses them
	// or not, so that a failover or a drain changes endpoints alone: a changed
	// cluster would have to warm again and forget whom it has ejected.
	Candidates []*federation.Export
}

// Export is one own service, as this cluster serves it to others and to itself.
type Export struct {
	Service federation.ServiceID
	Mode    federation.Mode
	// Callers are the clusters that may call it, the own one included where it
	// may; AllCallers means every member.
	Callers    []federation.ClusterID
	AllCallers bool
	Ports      []ExportPort
}

// ExportPort is one TCP port of an own service.
type ExportPort struct {
	Number    uint16
	Endpoints []Backend
}

// Backend is one own endpoint. Each address that is valid is used while the
// endpoint is ready: both ways of reaching an endpoint are open while a service
// changes its mode.
type Backend struct {
	Ready bool
	// Addr takes plain connections from the gateway (terminate).
	Addr netip.AddrPort
	// Proxy is the inbound listener of the weft-proxy that stands before the
	// endpoint (passthrough).
	Proxy netip.AddrPort
	// App is set in a proxy's own view, for the workload that it stands before:
	// where the proxy itself connects to.
	App netip.AddrPort
}

// passes reports whether tunnels to the port are passed through. Readiness has
// no say: a chain that is removed cuts its connections.
func (x *Export) passes(p ExportPort) bool {
	return x.Mode == federation.Passthrough ||
		slices.ContainsFunc(p.Endpoints, func(b Backend) bool { return b.Proxy.IsValid() })
}

// fronts reports whether the proxy stands before an endpoint of the port.
func (p *ExportPort) fronts() bool {
	return slices.ContainsFunc(p.Endpoints, func(b Backend) bool { return b.App.IsValid() })
}

// addrs are the ready endpoints' addresses of one kind.
func (p *ExportPort) addrs(kind func(Backend) netip.AddrPort) []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, b := range p.Endpoints {
		if a := kind(b); b.Ready && a.IsValid() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

func plainAddr(b Backend) netip.AddrPort { return b.Addr }
func proxyAddr(b Backend) netip.AddrPort { return b.Proxy }
func appAddr(b Backend) netip.AddrPort   { return b.App }

// Members is whom a proxy believes.
type Members struct {
	// Roots are the trust domain's, all that are valid at present.
	Roots []*x509.Certificate
	// Clusters are the active members, the own one included: identities of any
	// other cluster are refused.
	Clusters []federation.ClusterID
}
