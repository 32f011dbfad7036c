package xds

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weftmesh/weft/federation"
)

// The data path's constants. Each is measured or derived; see DESIGN section 9.
const (
	inwardConnectTimeout = 250 * time.Millisecond
	remoteConnectTimeout = time.Second
	streamWindow         = 1 << 20
	connWindow           = 64 << 20
	// sourceStreams is how many streams a source puts into one tunnel: as many
	// as their windows fill the tunnel's, so that streams nobody reads cannot
	// stop the others. An engine that returns the tunnel's credit at receipt
	// has no such limit and may go up to what the far side allows.
	sourceStreams = connWindow / streamWindow
	serverStreams = 1024
	pingInterval  = 2 * time.Second
	pingTimeout   = 3 * time.Second
	// A tunnel without streams is closed by its source; the far side waits
	// longer, so that it never closes one just as a stream is opened.
	sourceTunnelIdle = 5 * time.Minute
	serverTunnelIdle = 10 * time.Minute
	tunnelMaxAge     = time.Hour

	ejectFailures = 3
	ejectBase     = 5 * time.Second
	ejectMax      = 30 * time.Second
	attempts      = 5
	firstBackoff  = 5 * time.Millisecond
	lastBackoff   = 10 * time.Millisecond
	helloTimeout  = 5 * time.Second
)

const (
	matchKey     = "weft" // in envoy.transport_socket_match
	matchSpace   = "envoy.transport_socket_match"
	labelSpace   = "weft"
	httpOptions  = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	unlimited    = 1 << 20 // for circuit breakers: Weft's limits are elsewhere
	maxPriority  = 128     // Envoy's
	noOverspill  = 100000  // a tier gives up traffic only when its last endpoint is gone
	panicPercent = 1
)

func boolValue(b bool) *wrapperspb.BoolValue { return wrapperspb.Bool(b) }

// baseCluster is what all clusters have in common: endpoints by EDS, ejection
// of what fails, and no limit that would refuse a connection.
func baseCluster(name string, connect time.Duration) *clusterv3.Cluster {
	threshold := func(p corev3.RoutingPriority) *clusterv3.CircuitBreakers_Thresholds {
		return &clusterv3.CircuitBreakers_Thresholds{
			Priority: p, MaxConnections: u32(unlimited), MaxPendingRequests: u32(unlimited),
			MaxRequests: u32(unlimited), MaxRetries: u32(unlimited),
		}
	}
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		ConnectTimeout:       seconds(connect),
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{
			threshold(corev3.RoutingPriority_DEFAULT),
		}},
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{
			HealthyPanicThreshold: &typev3.Percent{Value: panicPercent},
			// The default holds an ejection back for up to a second after a change
			// of endpoints, and every connection of that second fails.
			UpdateMergeWindow: seconds(0),
		},
		OutlierDetection: &clusterv3.OutlierDetection{
			SplitExternalLocalOriginErrors:  true,
			ConsecutiveLocalOriginFailure:   u32(ejectFailures),
			Interval:                        seconds(time.Second),
			BaseEjectionTime:                seconds(ejectBase),
			MaxEjectionTime:                 seconds(ejectMax),
			MaxEjectionPercent:              u32(100),
			EnforcingConsecutive_5Xx:        u32(0),
			EnforcingSuccessRate:            u32(0),
			EnforcingLocalOriginSuccessRate: u32(0),
		},
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{TcpKeepalive: keepalive()},
	}
}

// keepalive finds a dead peer of an idle plain connection in 5 s. (Not
// TCP_USER_TIMEOUT: it also cuts connections whose reader merely stalls.)
func keepalive() *corev3.TcpKeepalive {
	return &corev3.TcpKeepalive{KeepaliveTime: u32(2), KeepaliveInterval: u32(1), KeepaliveProbes: u32(3)}
}

func http2Options(streams uint32) *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		MaxConcurrentStreams:        u32(streams),
		InitialStreamWindowSize:     u32(streamWindow),
		InitialConnectionWindowSize: u32(connWindow),
		ConnectionKeepalive:         &corev3.KeepaliveSettings{Interval: seconds(pingInterval), Timeout: seconds(pingTimeout)},
	}
}

// inwardCluster holds own endpoints only, reached by plain TCP: for streams
// that were received, or bytes that pass through.
func inwardCluster(name string) (*Resource, error) {
	e := new(encoder)
	return e.resource(TypeCluster, name, baseCluster(name, inwardConnectTimeout))
}

// inwardEndpoints are evenly used.
func inwardEndpoints(name string, addrs []netip.AddrPort) (*Resource, error) {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	if len(addrs) > 0 {
		l := &endpointv3.LocalityLbEndpoints{}
		for _, a := range sortedAddrs(addrs) {
			l.LbEndpoints = append(l.LbEndpoints, lbEndpoint(socketAddress(a), nil, ""))
		}
		cla.Endpoints = []*endpointv3.LocalityLbEndpoints{l}
	}
	e := new(encoder)
	return e.resource(TypeEndpoints, name, cla)
}

// sortedAddrs is sorted and unique: the order of endpoints says nothing, so it
// must not make a new version.
func sortedAddrs(addrs []netip.AddrPort) []netip.AddrPort {
	s := slices.SortedFunc(slices.Values(addrs), netip.AddrPort.Compare)
	return slices.Compact(s)
}

func socketAddress(a netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: a.Addr().Unmap().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())},
	}}}
}

func pipeAddress(path string, mode uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: mode}}}
}

// lbEndpoint is one endpoint; match chooses its transport socket, "" where the
// cluster has only one.
func lbEndpoint(a *corev3.Address, labels map[string]string, match string) *endpointv3.LbEndpoint {
	ep := &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}}
	if match != "" {
		ep.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			matchSpace: stringStruct(map[string]string{matchKey: match}),
			labelSpace: stringStruct(labels),
		}}
	}
	return ep
}

func stringStruct(m map[string]string) *structpb.Struct {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(m))}
	for k, v := range m {
		s.Fields[k] = structpb.NewStringValue(v)
	}
	return s
}

// portName names a resource of one service port.
func portName(kind string, s federation.ServiceID, port uint16) string {
	return fmt.Sprintf("%s/%s/%s/%d", kind, s.Namespace, s.Name, port)
}

// The first parts of resource names.
const (
	importKind     = "imp"  // listener of an imported service port
	outKind        = "out"  // cluster of an imported service port
	inwardKind     = "in"   // cluster of an own service port, plain
	passKind       = "pass" // cluster of an own service port's proxies
	appKind        = "app"  // cluster of the workload that a proxy stands before
	eastWestName   = "east-west"
	inboundName    = "inbound"
	localName      = "local"
	terminateMatch = "t/"
	passMatch      = "p/"
)

// outCluster is how an imported service port is reached: one TLS context for
// each cluster that offers it.
func (n *Node) outCluster(i *Import) (*Resource, error) {
	name := portName(outKind, i.Plan.Service, i.Plan.Port)
	e := new(encoder)
	c := baseCluster(name, remoteConnectTimeout)
	c.CommonLbConfig.LocalityConfigSpecifier = &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
		LocalityWeightedLbConfig: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig{},
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptions: e.any(&httpv3.HttpProtocolOptions{
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: seconds(sourceTunnelIdle)},
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
					Http2ProtocolOptions: http2Options(sourceStreams),
				},
			},
		},
	})}
	// An endpoint whose name is not below must reach nobody; without this it
	// would be sent plain text.
	c.TransportSocket = clientSocket(e, "nobody.invalid")
	for key, socket := range n.outSockets(e, i) {
		c.TransportSocketMatches = append(c.TransportSocketMatches, &clusterv3.Cluster_TransportSocketMatch{
			Name: key, Match: stringStruct(map[string]string{matchKey: key}), TransportSocket: socket,
		})
	}
	slices.SortFunc(c.TransportSocketMatches, func(a, b *clusterv3.Cluster_TransportSocketMatch) int {
		return strings.Compare(a.Name, b.Name)
	})
	return e.resource(TypeCluster, name, c)
}

// outSockets are the transports of all candidates and of the plan's backends,
// by match key.
func (n *Node) outSockets(e *encoder, i *Import) map[string]*corev3.TransportSocket {
	p := &i.Plan
	sockets := make(map[string]*corev3.TransportSocket)
	add := func(c federation.ClusterID, mode federation.Mode, serves []spiffeid.ID) {
		key := n.match(c, mode)
		switch {
		case sockets[key] != nil:
		case key == localMatch:
			sockets[key] = plainSocket(e)
		case mode == federation.Passthrough:
			sans := make([]string, len(serves))
			for i, id := range serves {
				sans[i] = id.String()
			}
			slices.Sort(sans)
			sockets[key] = clientSocket(e, PassthroughName(c, p.Service, p.Port), slices.Compact(sans)...)
		default:
			sockets[key] = clientSocket(e, TerminateName(c), gatewayID(n.TrustDomain, c))
		}
	}
	for _, x := range i.Candidates {
		add(x.Cluster, x.Mode, x.Serves)
	}
	for _, t := range p.Tiers {
		for _, b := range t.Backends {
			add(b.Cluster, b.Mode, b.Serves)
		}
	}
	return sockets
}

// sameTransports reports whether i and o need the same cluster, as far as that
// can be seen at a glance: the same candidates, and nobody else in the plans.
func (i *Import) sameTransports(o *Import) bool {
	return slices.Equal(i.Candidates, o.Candidates) && i.onlyCandidates() && o.onlyCandidates()
}

func (i *Import) onlyCandidates() bool {
	for _, t := range i.Plan.Tiers {
		for _, b := range t.Backends {
			if !slices.ContainsFunc(i.Candidates, func(x *federation.Export) bool {
				return x.Cluster == b.Cluster && x.Mode == b.Mode
			}) {
				return false
			}
		}
	}
	return true
}

// match is the key of the transport into a cluster.
func (n *Node) match(c federation.ClusterID, mode federation.Mode) string {
	switch {
	case mode == federation.Passthrough:
		return passMatch + string(c)
	case c == n.Cluster:
		return localMatch
	default:
		return terminateMatch + string(c)
	}
}

// outEndpoints are the plan's tiers: one locality per cluster, its weight the
// share. A tier without any endpoint is left out, so that priorities have no
// gap. own are the proxies of the own cluster's endpoints.
func (n *Node) outEndpoints(p *federation.Plan, own []netip.AddrPort, last *Resource) (*Resource, error) {
	name := portName(outKind, p.Service, p.Port)
	body := func(revision string) (*Resource, error) {
		cla := &endpointv3.ClusterLoadAssignment{ClusterName: name}
		cla.Policy = &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: u32(noOverspill)}
		priority := uint32(0)
		for tier, t := range p.Tiers {
			before := len(cla.Endpoints)
			for _, b := range t.Backends {
				l, err := n.locality(p, tier, b, own, revision)
				if err != nil {
					return nil, err
				}
				if l == nil {
					continue
				}
				l.Priority = priority
				cla.Endpoints = append(cla.Endpoints, l)
			}
			if len(cla.Endpoints) > before {
				priority++
			}
		}
		if priority > maxPriority {
			return nil, fmt.Errorf("endpoints %s: %d tiers, Envoy takes %d", name, priority, maxPriority)
		}
		e := new(encoder)
		return e.resource(TypeEndpoints, name, cla)
	}
	plain, err := body("")
	if err != nil || last != nil && last.Version == plain.Version {
		return last, err
	}
	r, err := body(p.Revision.String())
	if err != nil {
		return nil, err
	}
	r.Version = plain.Version
	return r, nil
}

// locality is one backend of a tier, or nil if it has no share or no address:
// weight 0 is refused, and a locality without weight gets nothing.
func (n *Node) locality(p *federation.Plan, tier int, b federation.Backend, own []netip.AddrPort, revision string) (*endpointv3.LocalityLbEndpoints, error) {
	match := n.match(b.Cluster, b.Mode)
	addrs := own
	var err error
	if b.Cluster != n.Cluster {
		if addrs, err = gatewayAddrs(p, b); err != nil {
			return nil, err
		}
	}
	if b.Share <= 0 || match != localMatch && len(addrs) == 0 {
		return nil, nil
	}
	labels := map[string]string{
		LabelCluster:  string(b.Cluster),
		LabelTier:     strconv.Itoa(tier),
		LabelShare:    strconv.Itoa(int(b.Share)),
		LabelMode:     b.Mode.String(),
		LabelDecision: decision(p, tier, b),
	}
	if revision != "" {
		labels[LabelRevision] = revision
	}
	l := &endpointv3.LocalityLbEndpoints{
		Locality:            &corev3.Locality{Region: regionOf(p, b.Cluster), Zone: string(b.Cluster)},
		LoadBalancingWeight: u32(uint32(b.Share)),
	}
	if match == localMatch {
		l.LbEndpoints = []*endpointv3.LbEndpoint{lbEndpoint(pipeAddress(n.LocalPipe, 0), labels, match)}
		return l, nil
	}
	for _, a := range sortedAddrs(addrs) {
		l.LbEndpoints = append(l.LbEndpoints, lbEndpoint(socketAddress(a), labels, match))
	}
	return l, nil
}

func gatewayAddrs(p *federation.Plan, b federation.Backend) ([]netip.AddrPort, error) {
	var addrs []netip.AddrPort
	for _, g := range b.Gateways {
		ip, err := netip.ParseAddr(g.Host)
		if err != nil {
			return nil, fmt.Errorf("plan for %s: gateway %s of %s is a name; resolve it before", p.Service, g, b.Cluster)
		}
		addrs = append(addrs, netip.AddrPortFrom(ip, g.Port))
	}
	return addrs, nil
}

// decision says why a connection went where it did, in one header.
func decision(p *federation.Plan, tier int, b federation.Backend) string {
	policy := "default"
	if p.Policy != (federation.PolicyID{}) {
		policy = p.Policy.String()
	}
	return fmt.Sprintf("%s;tier=%d;share=%d", policy, tier, b.Share)
}

func regionOf(p *federation.Plan, c federation.ClusterID) string {
	for _, v := range p.Verdicts {
		if v.Cluster == c {
			return v.Region
		}
	}
	return ""
}
