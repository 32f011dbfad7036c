package xds

import (
	"fmt"
	"slices"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
)

// Headers of weft/1.
const (
	HeaderCaller   = "weft-caller"   // SPIFFE ID of who called the source; absent if unattested
	HeaderSource   = "weft-source"   // cluster of the source
	HeaderRevision = "weft-revision" // of the plan that chose the endpoint
	HeaderDecision = "weft-decision" // policy, tier and share that chose it
	HeaderEndpoint = "weft-endpoint" // of the answer: the backend's address
	HeaderAttempts = "weft-attempts" // of the answer: how many endpoints were tried
	HeaderReason   = "weft-reason"   // of a refusal
)

// The names of filters. Those of the two RBAC filters are also the keys under
// which a route table configures them.
const (
	tcpProxyFilter  = "envoy.filters.network.tcp_proxy"
	hcmFilter       = "envoy.filters.network.http_connection_manager"
	inspectorFilter = "envoy.filters.listener.tls_inspector"
	routerFilter    = "envoy.filters.http.router"
	peersFilter     = "weft.peers"   // who may open streams, and whom it may speak for
	callersFilter   = "weft.callers" // who may use a route
)

// importListener takes the plain connections of local callers. Nothing in it
// comes from the plan: a listener's change drains its connections.
func (n *Node) importListener(i *Import) (*Resource, error) {
	p := &i.Plan
	name := portName(importKind, p.Service, p.Port)
	e := new(encoder)
	forward := tcpProxy(name, portName(outKind, p.Service, p.Port))
	forward.AccessLog = accessLog(e, tcpLogFields())
	forward.TunnelingConfig = &tcpv3.TcpProxy_TunnelingConfig{
		Hostname: Authority(p.Service, p.Port),
		// Not the revision and the decision, which are labels of the endpoint:
		// Envoy evaluates these headers before it knows the endpoint, and after a
		// failed attempt with that attempt's. The built-in engine adds them.
		HeadersToAdd: []*corev3.HeaderValueOption{header(HeaderSource, string(n.Cluster))},
	}
	return e.resource(TypeListener, name, &listenerv3.Listener{
		Name:         name,
		Address:      socketAddress(i.Listen),
		TcpKeepalive: keepalive(),
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{networkFilter(e, tcpProxyFilter, forward)}}},
	})
}

// endpointLabel is the format, in an access log, of a label of the endpoint that
// was chosen.
func endpointLabel(key string) string {
	return "%METADATA(UPSTREAM_HOST:" + labelSpace + ":" + key + ")%"
}

func header(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// tcpProxy forwards a connection for as long as its ends keep it. It tries the
// next candidate soon: ejection, which follows three failures, must win the
// race against the attempts that are left.
func tcpProxy(stat, cluster string) *tcpv3.TcpProxy {
	return &tcpv3.TcpProxy{
		StatPrefix:         stat,
		ClusterSpecifier:   &tcpv3.TcpProxy_Cluster{Cluster: cluster},
		IdleTimeout:        seconds(0),
		MaxConnectAttempts: u32(attempts),
		BackoffOptions:     &corev3.BackoffStrategy{BaseInterval: seconds(firstBackoff), MaxInterval: seconds(lastBackoff)},
	}
}

func networkFilter(e *encoder, name string, config proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: e.any(config)}}
}

func httpFilter(e *encoder, name string, config proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: e.any(config)}}
}

// tlsListener is a listener whose chains are chosen by SNI. There is no default
// chain: what no chain takes is reset.
func (n *Node) tlsListener(name string, chains []*listenerv3.FilterChain) (*Resource, error) {
	e := new(encoder)
	return e.resource(TypeListener, name, &listenerv3.Listener{
		Name:         name,
		Address:      socketAddress(n.Bind),
		TcpKeepalive: keepalive(),
		ListenerFilters: []*listenerv3.ListenerFilter{{
			Name:       inspectorFilter,
			ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: e.any(&inspectorv3.TlsInspector{})},
		}},
		ListenerFiltersTimeout: seconds(helloTimeout),
		FilterChains:           chains,
	})
}

func chainMatch(sni string) *listenerv3.FilterChainMatch {
	return &listenerv3.FilterChainMatch{ServerNames: []string{sni}, ApplicationProtocols: []string{ALPN}}
}

// terminateChain ends tunnels for one SNI and serves their streams by a route
// table.
func terminateChain(e *encoder, sni, routes string) *listenerv3.FilterChain {
	return &listenerv3.FilterChain{
		Name:             sni,
		FilterChainMatch: chainMatch(sni),
		TransportSocket:  serverSocket(e),
		Filters:          []*listenerv3.Filter{networkFilter(e, hcmFilter, connectManager(e, routes, true))},
	}
}

// passChain forwards tunnels to the proxies of one own service port as they
// are.
func passChain(e *encoder, sni, cluster string) *listenerv3.FilterChain {
	forward := tcpProxy(cluster, cluster)
	forward.AccessLog = accessLog(e, tcpLogFields())
	return &listenerv3.FilterChain{
		Name:             sni,
		FilterChainMatch: chainMatch(sni),
		Filters:          []*listenerv3.Filter{networkFilter(e, tcpProxyFilter, forward)},
	}
}

// buildLocal is the way to the own cluster's plain backends for an engine that
// can only tunnel: a pipe that nobody else may open.
func (n *Node) buildLocal() (*Resource, error) {
	e := new(encoder)
	return e.resource(TypeListener, localName, &listenerv3.Listener{
		Name:    localName,
		Address: pipeAddress(n.LocalPipe, 0o600),
		FilterChains: []*listenerv3.FilterChain{{
			Filters: []*listenerv3.Filter{networkFilter(e, hcmFilter, connectManager(e, localName, false))},
		}},
	})
}

// connectManager serves the streams of a tunnel by a route table of its own, so
// that who may call what changes without touching the listener.
func connectManager(e *encoder, routes string, checked bool) *hcmv3.HttpConnectionManager {
	m := &hcmv3.HttpConnectionManager{
		CodecType:  hcmv3.HttpConnectionManager_HTTP2,
		StatPrefix: routes,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource: adsSource(), RouteConfigName: routes,
		}},
		Http2ProtocolOptions: http2Options(serverStreams),
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout:           seconds(serverTunnelIdle),
			MaxConnectionDuration: seconds(tunnelMaxAge),
		},
		StreamIdleTimeout:     seconds(0),
		RequestHeadersTimeout: seconds(helloTimeout),
		UpgradeConfigs:        []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT"}},
		GenerateRequestId:     boolValue(false),
		SkipXffAppend:         true,
		LocalReplyConfig:      &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{refusalReason()}},
	}
	if checked {
		m.AccessLog = accessLog(e, streamLogFields())
		// Both admit nobody until the route table says otherwise.
		deny := &rbacfilterv3.RBAC{Rules: &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW}}
		m.HttpFilters = append(m.HttpFilters, httpFilter(e, peersFilter, deny), httpFilter(e, callersFilter, deny))
	}
	m.HttpFilters = append(m.HttpFilters, httpFilter(e, routerFilter, &routerv3.Router{SuppressEnvoyHeaders: true}))
	return m
}

// refusalReason tells the source why it must try the next candidate.
func refusalReason() *hcmv3.ResponseMapper {
	return &hcmv3.ResponseMapper{
		Filter: &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
			StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
				Op:    accesslogv3.ComparisonFilter_GE,
				Value: &corev3.RuntimeUInt32{DefaultValue: 400, RuntimeKey: "weft.refusal"},
			}},
		}},
		HeadersToAdd: []*corev3.HeaderValueOption{header(HeaderReason, "%RESPONSE_CODE_DETAILS%")},
	}
}

// buildBound is the listener at the node's Bind address.
func (n *Node) buildBound(exports []*Export) (*Resource, error) {
	if n.Kind == Proxy {
		return n.buildInbound(exports)
	}
	return n.buildEastWest(exports)
}

// buildEastWest has a chain that terminates, and one for each service port that
// has proxies.
func (n *Node) buildEastWest(exports []*Export) (*Resource, error) {
	e := new(encoder)
	chains := []*listenerv3.FilterChain{terminateChain(e, TerminateName(n.Cluster), eastWestName)}
	for _, x := range exports {
		for _, p := range x.Ports {
			if x.passes(p) {
				chains = append(chains, passChain(e, PassthroughName(n.Cluster, x.Service, p.Number), portName(passKind, x.Service, p.Number)))
			}
		}
	}
	return n.sealed(e, eastWestName, chains)
}

// buildInbound has a chain for each service port of the workload: one chain for
// all of them would be drained when a port is added.
func (n *Node) buildInbound(exports []*Export) (*Resource, error) {
	e := new(encoder)
	var chains []*listenerv3.FilterChain
	for _, x := range exports {
		for _, p := range x.Ports {
			if p.fronts() {
				chains = append(chains, terminateChain(e, PassthroughName(n.Cluster, x.Service, p.Number), inboundName))
			}
		}
	}
	if len(chains) == 0 {
		// A listener must have a chain. This one is for a name that no plan uses.
		chains = append(chains, terminateChain(e, "none."+string(n.Cluster)+".p.weft", inboundName))
	}
	return n.sealed(e, inboundName, chains)
}

func (n *Node) sealed(e *encoder, name string, chains []*listenerv3.FilterChain) (*Resource, error) {
	if e.err != nil {
		return nil, fmt.Errorf("listener %s: %w", name, e.err)
	}
	slices.SortFunc(chains, func(a, b *listenerv3.FilterChain) int { return strings.Compare(a.Name, b.Name) })
	return n.tlsListener(name, chains)
}
