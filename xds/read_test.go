package xds

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/federation"
)

// sample are the resources of a gateway with one import and two exports.
func sample(t testing.TB) map[Name]*Resource {
	t.Helper()
	b, err := NewBuilder(Node{TrustDomain: testDomain, Cluster: "eu-1", Bind: netip.MustParseAddrPort("127.0.1.1:15443"), LocalPipe: "/run/weft/local.sock"})
	must(t, err)
	must(t, b.SetMembers(Members{Roots: testRoots(t), Clusters: []federation.ClusterID{"eu-1", "eu-2"}}))
	must(t, b.SetImport(serviceImport(1)))
	must(t, b.SetExport(Export{Service: payments, Callers: []federation.ClusterID{"eu-2"}, Ports: []ExportPort{{Number: 80, Endpoints: []Backend{{Ready: true, Addr: netip.MustParseAddrPort("127.0.1.5:80")}}}}}))
	must(t, b.SetExport(Export{Service: federation.ServiceID{Namespace: "shop", Name: "stock"}, Mode: federation.Passthrough, AllCallers: true, Ports: []ExportPort{{Number: 81}}}))
	_, err = b.Take()
	must(t, err)
	resources := map[Name]*Resource{}
	for _, r := range b.Resources() {
		resources[r.Name] = r
	}
	return resources
}

// repack changes the message in an Any.
func repack[M proto.Message](t testing.TB, a *anypb.Any, m M, change func(M)) {
	t.Helper()
	must(t, proto.Unmarshal(a.GetValue(), m))
	change(m)
	var err error
	a.Value, err = proto.Marshal(m)
	must(t, err)
}

// TestStrict: whatever the engine would not carry out is refused, with the name
// of the field; what is accepted unchanged is shown by TestBuild.
func TestStrict(t *testing.T) {
	const out, imp = "out/shop/s1/80", "imp/shop/s1/80"
	cluster := func(change func(*clusterv3.Cluster)) func(proto.Message) {
		return func(m proto.Message) { change(m.(*clusterv3.Cluster)) }
	}
	endpoints := func(change func(*endpointv3.ClusterLoadAssignment)) func(proto.Message) {
		return func(m proto.Message) { change(m.(*endpointv3.ClusterLoadAssignment)) }
	}
	listener := func(change func(*listenerv3.Listener)) func(proto.Message) {
		return func(m proto.Message) { change(m.(*listenerv3.Listener)) }
	}
	routes := func(change func(*routev3.RouteConfiguration)) func(proto.Message) {
		return func(m proto.Message) { change(m.(*routev3.RouteConfiguration)) }
	}
	client := func(change func(*tlsv3.UpstreamTlsContext)) func(proto.Message) {
		return cluster(func(c *clusterv3.Cluster) {
			repack(t, c.TransportSocketMatches[0].TransportSocket.GetTypedConfig(), new(tlsv3.UpstreamTlsContext), change)
		})
	}
	manager := func(change func(*hcmv3.HttpConnectionManager)) func(proto.Message) {
		return listener(func(l *listenerv3.Listener) {
			repack(t, l.FilterChains[0].Filters[0].GetTypedConfig(), new(hcmv3.HttpConnectionManager), change)
		})
	}
	proxy := func(change func(*tcpv3.TcpProxy)) func(proto.Message) {
		return listener(func(l *listenerv3.Listener) {
			repack(t, l.FilterChains[0].Filters[0].GetTypedConfig(), new(tcpv3.TcpProxy), change)
		})
	}
	server := func(change func(*tlsv3.DownstreamTlsContext)) func(proto.Message) {
		return listener(func(l *listenerv3.Listener) {
			for _, c := range l.FilterChains {
				if c.TransportSocket != nil {
					repack(t, c.TransportSocket.GetTypedConfig(), new(tlsv3.DownstreamTlsContext), change)
				}
			}
		})
	}
	peers := func(change func(*rbacv3.RBAC)) func(proto.Message) {
		return routes(func(c *routev3.RouteConfiguration) {
			repack(t, c.TypedPerFilterConfig[peersFilter], new(rbacfilterv3.RBACPerRoute), func(p *rbacfilterv3.RBACPerRoute) { change(p.Rbac.Rules) })
		})
	}
	for _, test := range []struct {
		name   string
		typ    Type
		of     string
		change func(proto.Message)
		want   string // part of the refusal
	}{
		{"another balancer", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.LbPolicy = clusterv3.Cluster_RANDOM }), "lb_policy"},
		{"static endpoints", TypeCluster, out, cluster(func(c *clusterv3.Cluster) {
			c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		}), "type"},
		{"health checks", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.CloseConnectionsOnHostHealthFailure = true }), "close_connections_on_host_health_failure"},
		{"a low limit", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.CircuitBreakers.Thresholds[0].MaxRequests = u32(10) }), "circuit_breakers"},
		{"ejection of few", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.OutlierDetection.MaxEjectionPercent = u32(10) }), "max_ejection_percent"},
		{"panic", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.CommonLbConfig.HealthyPanicThreshold.Value = 50 }), "healthy_panic_threshold"},
		{"no default socket", TypeCluster, out, cluster(func(c *clusterv3.Cluster) { c.TransportSocket = nil }), "transport_socket"},
		{"a default socket that matches someone", TypeCluster, out, cluster(func(c *clusterv3.Cluster) {
			c.TransportSocket = c.TransportSocketMatches[0].TransportSocket
		}), "matches nobody"},
		{"two equal matches", TypeCluster, out, cluster(func(c *clusterv3.Cluster) {
			c.TransportSocketMatches = append(c.TransportSocketMatches, c.TransportSocketMatches[0])
		}), "match"},
		{"plain text to a remote", TypeCluster, out, cluster(func(c *clusterv3.Cluster) {
			c.TransportSocketMatches[0].TransportSocket = plainSocket(new(encoder))
		}), "plain text"},
		{"TLS 1.2", TypeCluster, out, client(func(c *tlsv3.UpstreamTlsContext) {
			c.CommonTlsContext.TlsParams.TlsMinimumProtocolVersion = tlsv3.TlsParameters_TLSv1_2
		}), "tls_params"},
		{"resumption", TypeCluster, out, client(func(c *tlsv3.UpstreamTlsContext) { c.MaxSessionKeys = nil }), "max_session_keys"},
		{"any server", TypeCluster, out, client(func(c *tlsv3.UpstreamTlsContext) {
			c.CommonTlsContext.GetCombinedValidationContext().DefaultValidationContext.MatchTypedSubjectAltNames = nil
		}), "match_typed_subject_alt_names"},
		{"a server by prefix", TypeCluster, out, client(func(c *tlsv3.UpstreamTlsContext) {
			c.CommonTlsContext.GetCombinedValidationContext().DefaultValidationContext.MatchTypedSubjectAltNames[0].Matcher = stringMatcher(Match{Prefix: "spiffe://"})
		}), "exact"},
		{"a field from the future", TypeCluster, out, cluster(func(c *clusterv3.Cluster) {
			c.ProtoReflect().SetUnknown([]byte{0xf8, 0x7f, 0x01})
		}), "newer"},

		{"health by EDS", TypeEndpoints, out, endpoints(func(c *endpointv3.ClusterLoadAssignment) {
			c.Endpoints[0].LbEndpoints[0].HealthStatus = corev3.HealthStatus_UNHEALTHY
		}), "health_status"},
		{"no weight beside another", TypeEndpoints, out, endpoints(func(c *endpointv3.ClusterLoadAssignment) {
			c.Endpoints = append(c.Endpoints, &endpointv3.LocalityLbEndpoints{})
		}), "load_balancing_weight"},
		{"overprovisioning", TypeEndpoints, out, endpoints(func(c *endpointv3.ClusterLoadAssignment) {
			c.Policy.OverprovisioningFactor = u32(140)
		}), "overprovisioning_factor"},
		{"a host name", TypeEndpoints, out, endpoints(func(c *endpointv3.ClusterLoadAssignment) {
			c.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetSocketAddress().Address = "gw.example"
		}), "gw.example"},
		{"foreign metadata", TypeEndpoints, out, endpoints(func(c *endpointv3.ClusterLoadAssignment) {
			m := c.Endpoints[0].LbEndpoints[0].Metadata.FilterMetadata
			m["envoy.lb"] = m[labelSpace]
		}), "envoy.lb"},

		{"an unknown listener", TypeListener, imp, listener(func(l *listenerv3.Listener) { l.Name = "other" }), "name"},
		{"an access log of the listener", TypeListener, imp, listener(func(l *listenerv3.Listener) { l.Freebind = boolValue(true) }), "freebind"},
		{"a default chain", TypeListener, eastWestName, listener(func(l *listenerv3.Listener) { l.DefaultFilterChain = l.FilterChains[0] }), "default_filter_chain"},
		{"a wildcard SNI", TypeListener, eastWestName, listener(func(l *listenerv3.Listener) {
			l.FilterChains[0].FilterChainMatch.ServerNames = []string{"*.weft"}
		}), "server_names"},
		{"any SNI", TypeListener, eastWestName, listener(func(l *listenerv3.Listener) { l.FilterChains[0].FilterChainMatch.ServerNames = nil }), "server_names"},
		{"one SNI twice", TypeListener, eastWestName, listener(func(l *listenerv3.Listener) {
			l.FilterChains[0].FilterChainMatch.ServerNames = l.FilterChains[1].FilterChainMatch.ServerNames
		}), "two chains"},
		{"any ALPN", TypeListener, eastWestName, listener(func(l *listenerv3.Listener) {
			l.FilterChains[0].FilterChainMatch.ApplicationProtocols = nil
		}), "application_protocols"},
		{"no client certificate", TypeListener, eastWestName, server(func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = nil }), "require_client_certificate"},
		{"tickets", TypeListener, eastWestName, server(func(c *tlsv3.DownstreamTlsContext) { c.SessionTicketKeysType = nil }), "stateless"},
		{"HTTP/1", TypeListener, localName, manager(func(m *hcmv3.HttpConnectionManager) { m.CodecType = hcmv3.HttpConnectionManager_AUTO }), "codec_type"},
		{"another filter", TypeListener, localName, manager(func(m *hcmv3.HttpConnectionManager) { m.HttpFilters[0].Name = "x" }), "http_filters"},
		{"an idle stream cut", TypeListener, localName, manager(func(m *hcmv3.HttpConnectionManager) { m.StreamIdleTimeout = nil }), "stream_idle_timeout"},
		{"checked streams without a check", TypeListener, localName, manager(func(m *hcmv3.HttpConnectionManager) {
			m.GetRds().RouteConfigName = eastWestName
		}), "route_config_name"},
		{"Envoy's idle hour", TypeListener, imp, proxy(func(p *tcpv3.TcpProxy) { p.IdleTimeout = nil }), "idle_timeout"},
		{"no tunnel", TypeListener, imp, proxy(func(p *tcpv3.TcpProxy) { p.TunnelingConfig = nil }), "tunneling_config"},
		{"POST", TypeListener, imp, proxy(func(p *tcpv3.TcpProxy) { p.TunnelingConfig.UsePost = true }), "use_post"},
		{"a formatted header", TypeListener, imp, proxy(func(p *tcpv3.TcpProxy) {
			p.TunnelingConfig.HeadersToAdd[0].Header.Value = "%START_TIME%"
		}), "headers_to_add"},
		{"weighted clusters", TypeListener, imp, proxy(func(p *tcpv3.TcpProxy) {
			p.ClusterSpecifier = &tcpv3.TcpProxy_WeightedClusters{WeightedClusters: &tcpv3.TcpProxy_WeightedCluster{
				Clusters: []*tcpv3.TcpProxy_WeightedCluster_ClusterWeight{{Name: out, Weight: 1}},
			}}
		}), "weighted_clusters"},

		{"a wildcard authority", TypeRoutes, eastWestName, routes(func(c *routev3.RouteConfiguration) {
			c.VirtualHosts[0].Domains = []string{"*.local"}
		}), "domains"},
		{"unknown authorities let in", TypeRoutes, eastWestName, routes(func(c *routev3.RouteConfiguration) {
			last := c.VirtualHosts[len(c.VirtualHosts)-1]
			last.Routes[0].Action = c.VirtualHosts[0].Routes[0].Action
		}), "404"},
		{"a cluster by header", TypeRoutes, eastWestName, routes(func(c *routev3.RouteConfiguration) {
			c.VirtualHosts[0].Routes[0].GetRoute().ClusterSpecifier = &routev3.RouteAction_ClusterHeader{ClusterHeader: ":authority"}
		}), "cluster_header"},
		{"retries of what may have been done", TypeRoutes, eastWestName, routes(func(c *routev3.RouteConfiguration) {
			c.VirtualHosts[0].Routes[0].GetRoute().RetryPolicy.RetryOn = "5xx"
		}), "retry_on"},
		{"rules that deny", TypeRoutes, eastWestName, peers(func(r *rbacv3.RBAC) { r.Action = rbacv3.RBAC_DENY }), "allow"},
		{"peers by address", TypeRoutes, eastWestName, peers(func(r *rbacv3.RBAC) {
			r.Policies["eu-2"].Principals[0] = &rbacv3.Principal{Identifier: &rbacv3.Principal_DirectRemoteIp{DirectRemoteIp: &corev3.CidrRange{AddressPrefix: "127.0.0.1"}}}
		}), "direct_remote_ip"},
		{"peers that speak for anyone", TypeRoutes, eastWestName, peers(func(r *rbacv3.RBAC) {
			r.Policies["eu-2"].Principals[0] = authenticated(Match{Exact: "spiffe://mesh.example/cluster/eu-2/gateway"})
		}), "speaks for"},
		{"rules for one path", TypeRoutes, eastWestName, peers(func(r *rbacv3.RBAC) {
			r.Policies["eu-2"].Permissions = []*rbacv3.Permission{{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: 1}}}
		}), "destination_port"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := sample(t)[Name{test.typ, test.of}]
			if r == nil {
				t.Fatalf("no %s %s", test.typ, test.of)
			}
			m := test.typ.message()
			must(t, proto.Unmarshal(r.Body, m))
			test.change(m)
			body, err := proto.Marshal(m)
			must(t, err)
			changed := &Resource{Name: r.Name, Body: body}
			_, err = readResource(test.typ, test.of, wire(changed))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("refusal %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestSecretFromTheNetwork: a private key that comes over the network is
// refused, not used.
func TestSecretFromTheNetwork(t *testing.T) {
	ca := newAuthority(t)
	r, err := leafSecret(ca.issue(t, "/cluster/eu-1/gateway"))
	must(t, err)
	if _, err := readResource(TypeSecret, SecretLeaf, wire(r)); err == nil || !strings.Contains(err.Error(), "tls_certificate") {
		t.Errorf("refusal %v", err)
	}
	if strings.Contains(r.String()+r.GoString(), "PRIVATE") {
		t.Error("a secret prints")
	}
}

// TestMatch runs the scripts in testdata/match: a builder's input, then calls
// that a proxy with its resources would get, and what it would do.
func TestMatch(t *testing.T) {
	datadriven.Walk(t, "testdata/match", func(t *testing.T, path string) {
		var b *Builder
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "node":
				var n scriptNode
				n.read(t, d.Input)
				var err error
				b, err = NewBuilder(n.node)
				must(t, err)
				return ""
			case "call":
				return call(t, b, d)
			default:
				must(t, runScript(t, b, d))
				return ""
			}
		})
	})
}

// call says what becomes of one call, by the resources that b has built.
func call(t *testing.T, b *Builder, d *datadriven.TestData) string {
	t.Helper()
	_, err := b.Take()
	must(t, err)
	c := readAll(t, b.Resources())
	arg := func(key string) (value string) {
		if d.HasArg(key) {
			d.ScanArgs(t, key, &value)
		}
		return value
	}
	l := c.Listeners[arg("listener")]
	if l == nil {
		return "no such listener\n"
	}
	if l.Kind == ImportListener {
		return "tunnel for " + l.Forward.Tunnel.Authority + " by\n" + describeCluster(c, l.Forward.Cluster)
	}
	term := l.Local
	if term == nil {
		chain := matchChain(l, arg("sni"), arg("alpn"))
		switch {
		case chain == nil:
			return "closed: no chain\n"
		case chain.Passthrough != nil:
			return "passed through to\n" + describeCluster(c, chain.Passthrough.Cluster)
		}
		term = chain.Terminate
		if !c.Trust[term.TLS.Trust].Admits(arg("peer")) {
			return "closed: certificate\n"
		}
	}
	table := c.Routes[term.Routes]
	switch route := table.Routes[arg("authority")]; {
	case !table.Admits(arg("peer"), arg("caller")):
		return "403: peer\n"
	case route == nil:
		return "404\n"
	case !route.Admits(arg("peer")):
		return "403: caller\n"
	default:
		return "connected to\n" + describeCluster(c, route.Cluster)
	}
}

func matchChain(l *Listener, sni, alpn string) *Chain {
	for _, c := range l.Chains {
		for _, n := range c.ServerNames {
			if n == sni && c.ALPN[0] == alpn {
				return c
			}
		}
	}
	return nil
}

func describeCluster(c *Config, name string) string {
	cluster := c.Clusters[name]
	if cluster == nil || len(cluster.Localities) == 0 {
		return "  nothing\n"
	}
	var out strings.Builder
	for _, l := range cluster.Localities {
		for _, e := range l.Endpoints {
			out.WriteString("  ")
			if l.Cluster != "" {
				out.WriteString(string(l.Cluster) + " priority " + string(rune('0'+l.Priority)) + " ")
			}
			switch tls := cluster.TLS[e.TLS]; {
			case e.IsLocal():
				out.WriteString("own backends")
			case tls != nil:
				out.WriteString(e.Addr.String() + " as " + tls.SNI + " for " + strings.Join(tls.SANs, " "))
			default:
				out.WriteString(e.Addr.String())
			}
			if d := e.Labels[LabelDecision]; d != "" {
				out.WriteString(" (" + d + ")")
			}
			out.WriteString("\n")
		}
	}
	return out.String()
}

// readAll is the Config of a proxy that was sent these resources.
func readAll(t testing.TB, resources []*Resource) *Config {
	t.Helper()
	s := newState()
	for typ := range Type(typeCount) {
		m := response(typ, resources)
		st := s.step(typ, m)
		if len(st.refused) > 0 {
			t.Fatalf("refused: %v", st.refused)
		}
		st.commit(nil)
	}
	return s.config
}
