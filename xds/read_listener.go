package xds

import (
	"io/fs"
	"maps"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

func readListener(body []byte) (*Listener, error) {
	r, m := new(reader), new(listenerv3.Listener)
	if !r.parse(body, m, "") {
		return nil, r.err
	}
	l := &Listener{Name: m.GetName()}
	if pipe := m.GetAddress().GetPipe(); pipe != nil {
		l.Pipe, l.Mode = pipe.GetPath(), fs.FileMode(pipe.GetMode())
	} else {
		l.Addr = r.socketAddress(m.GetAddress().GetSocketAddress(), "address")
	}
	switch {
	case strings.HasPrefix(l.Name, importKind+"/"):
		l.Kind = ImportListener
	case l.Name == eastWestName:
		l.Kind = EastWestListener
	case l.Name == inboundName:
		l.Kind = InboundListener
	case l.Name == localName:
		l.Kind = LocalListener
	default:
		r.fail("name", "listeners of this name have no meaning for the built-in engine")
		return nil, r.err
	}
	if l.Kind == EastWestListener || l.Kind == InboundListener {
		r.tlsListener(m, l)
	} else {
		r.plainListener(m, l)
	}
	return l, r.err
}

// plainListener has one chain that takes everything.
func (r *reader) plainListener(m *listenerv3.Listener, l *Listener) {
	r.must(len(m.GetListenerFilters()) == 0, "listener_filters", "are not supported here")
	chains := m.GetFilterChains()
	if len(chains) != 1 {
		r.fail("filter_chains", "%d chains, want 1", len(chains))
		return
	}
	c := chains[0]
	r.must(c.GetFilterChainMatch() == nil, "filter_chains[0].filter_chain_match", "is not supported here")
	r.must(c.GetTransportSocket() == nil, "filter_chains[0].transport_socket", "is not supported here")
	filter := r.onlyFilter(c, "filter_chains[0]")
	if l.Kind == LocalListener {
		r.must(l.Pipe != "", "address", "a listener that checks nobody must be a pipe")
		l.Local = r.terminate(filter, "filter_chains[0].filters[0]", false)
	} else {
		l.Forward = r.forward(filter, "filter_chains[0].filters[0]")
		r.must(r.err != nil || l.Forward.Tunnel != nil, "filter_chains[0].filters[0].tunneling_config", "is missing")
	}
}

// tlsListener chooses a chain by SNI.
func (r *reader) tlsListener(m *listenerv3.Listener, l *Listener) {
	l.HelloTimeout = r.duration(m.GetListenerFiltersTimeout())
	filters := m.GetListenerFilters()
	if len(filters) != 1 {
		r.fail("listener_filters", "want the TLS inspector alone")
		return
	}
	r.unpack(filters[0].GetTypedConfig(), &inspectorv3.TlsInspector{}, "listener_filters[0]")
	taken := make(map[string]bool)
	for _, c := range m.GetFilterChains() {
		field := "filter_chains[" + c.GetName() + "]"
		match := c.GetFilterChainMatch()
		chain := &Chain{Name: c.GetName(), ALPN: match.GetApplicationProtocols()}
		r.must(len(chain.ALPN) > 0, field+".filter_chain_match.application_protocols", "is missing: any protocol would match")
		r.must(len(match.GetServerNames()) > 0, field+".filter_chain_match.server_names", "is missing: any name would match")
		for _, n := range match.GetServerNames() {
			n = strings.ToLower(n)
			r.must(!strings.HasPrefix(n, "*"), field+".filter_chain_match.server_names", "%s: only whole names are supported", n)
			r.must(!taken[n], field+".filter_chain_match.server_names", "%s has two chains", n)
			taken[n] = true
			chain.ServerNames = append(chain.ServerNames, n)
		}
		slices.Sort(chain.ServerNames)
		filter := r.onlyFilter(c, field)
		if c.GetTransportSocket() == nil {
			r.must(l.Kind == EastWestListener, field+".transport_socket", "is missing")
			chain.Passthrough = r.forward(filter, field+".filters[0]")
			r.must(r.err != nil || chain.Passthrough.Tunnel == nil, field+".filters[0].tunneling_config", "is not supported here")
		} else {
			chain.Terminate = r.terminate(filter, field+".filters[0]", true)
			tls := r.serverSocket(c.GetTransportSocket().GetTypedConfig(), field+".transport_socket")
			if r.err != nil {
				return
			}
			chain.Terminate.TLS = tls
		}
		l.Chains = append(l.Chains, chain)
	}
	slices.SortFunc(l.Chains, func(a, b *Chain) int { return strings.Compare(a.Name, b.Name) })
}

func (r *reader) onlyFilter(c *listenerv3.FilterChain, field string) *anypb.Any {
	if len(c.GetFilters()) != 1 {
		r.fail(field+".filters", "%d filters, want 1", len(c.GetFilters()))
		return nil
	}
	return c.GetFilters()[0].GetTypedConfig()
}

func (r *reader) serverSocket(a *anypb.Any, field string) *ServerTLS {
	var m tlsv3.DownstreamTlsContext
	if !r.unpack(a, &m, field) {
		return nil
	}
	r.must(m.GetRequireClientCertificate().GetValue(), field+".require_client_certificate", "must be true")
	r.must(m.GetDisableStatelessSessionResumption(), field+".disable_stateless_session_resumption", "must be true: sessions are never resumed")
	common := m.GetCommonTlsContext()
	r.must(common.GetCombinedValidationContext() == nil, field+".combined_validation_context", "is not supported here: whom to admit is in a secret")
	return &ServerTLS{
		Certificate: r.leafName(common, field),
		Trust:       r.trustName(common.GetValidationContextSdsSecretConfig(), field),
		ALPN:        common.GetAlpnProtocols(),
	}
}

func (r *reader) forward(a *anypb.Any, field string) *Forward {
	var m tcpv3.TcpProxy
	if !r.unpack(a, &m, field) {
		return nil
	}
	r.must(m.GetIdleTimeout() != nil, field+".idle_timeout", "is missing: one hour would be meant")
	f := &Forward{
		Cluster:     m.GetCluster(),
		Attempts:    max(1, int(m.GetMaxConnectAttempts().GetValue())),
		BackoffMin:  r.duration(m.GetBackoffOptions().GetBaseInterval()),
		BackoffMax:  r.duration(m.GetBackoffOptions().GetMaxInterval()),
		IdleTimeout: r.duration(m.GetIdleTimeout()),
	}
	t := m.GetTunnelingConfig()
	if t == nil {
		return f
	}
	r.must(!strings.Contains(t.GetHostname(), "%"), field+".tunneling_config.hostname", "formats are not supported")
	f.Tunnel = &Tunnel{Authority: t.GetHostname()}
	for _, h := range t.GetHeadersToAdd() {
		name, value := strings.ToLower(h.GetHeader().GetKey()), h.GetHeader().GetValue()
		r.must(!strings.Contains(value, "%"), field+".tunneling_config.headers_to_add", "%s: formats are not supported", name)
		f.Tunnel.Headers = append(f.Tunnel.Headers, Header{Name: name, Value: value})
	}
	// Envoy cannot say these when it asks; an engine that can always does.
	f.Tunnel.Headers = append(f.Tunnel.Headers,
		Header{Name: HeaderRevision, EndpointKey: LabelRevision},
		Header{Name: HeaderDecision, EndpointKey: LabelDecision})
	return f
}

// terminate reads a manager of CONNECT streams; checked ones ask a route table
// who may open them.
func (r *reader) terminate(a *anypb.Any, field string, checked bool) *Terminate {
	var m hcmv3.HttpConnectionManager
	if !r.unpack(a, &m, field) {
		return nil
	}
	r.must(m.GetCodecType() == hcmv3.HttpConnectionManager_HTTP2, field+".codec_type", "must be HTTP2")
	r.must(len(m.GetUpgradeConfigs()) == 1 && m.GetUpgradeConfigs()[0].GetUpgradeType() == "CONNECT", field+".upgrade_configs", "must be CONNECT")
	r.must(m.GetStreamIdleTimeout() != nil && r.duration(m.GetStreamIdleTimeout()) == 0, field+".stream_idle_timeout", "must be 0: streams live as long as their ends")
	r.ads(m.GetRds().GetConfigSource(), field+".rds.config_source")
	t := &Terminate{
		Routes:      m.GetRds().GetRouteConfigName(),
		HTTP2:       r.http2(m.GetHttp2ProtocolOptions()),
		MaxAge:      r.duration(m.GetCommonHttpProtocolOptions().GetMaxConnectionDuration()),
		IdleTimeout: r.duration(m.GetCommonHttpProtocolOptions().GetIdleTimeout()),
	}
	r.must((t.Routes == localName) == !checked, field+".rds.route_config_name", "%s is not for this listener", t.Routes)
	want := []string{routerFilter}
	if checked {
		want = []string{peersFilter, callersFilter, routerFilter}
	}
	var have []string
	for _, f := range m.GetHttpFilters() {
		have = append(have, f.GetName())
		if f.GetName() == routerFilter {
			r.unpack(f.GetTypedConfig(), &routerv3.Router{}, field+".http_filters["+routerFilter+"]")
			continue
		}
		var base rbacfilterv3.RBAC
		if r.unpack(f.GetTypedConfig(), &base, field+".http_filters["+f.GetName()+"]") {
			r.must(base.GetRules() != nil && base.GetRules().GetAction() == rbacv3.RBAC_ALLOW && len(base.GetRules().GetPolicies()) == 0,
				field+".http_filters["+f.GetName()+"]", "must admit nobody by itself")
		}
	}
	r.must(slices.Equal(have, want), field+".http_filters", "are %v, want %v", have, want)
	return t
}

func readRoutes(body []byte) (*RouteTable, error) {
	r, m := new(reader), new(routev3.RouteConfiguration)
	if !r.parse(body, m, "") {
		return nil, r.err
	}
	t := &RouteTable{Name: m.GetName(), Open: m.GetName() == localName, Routes: make(map[string]*Route, len(m.GetVirtualHosts()))}
	for key, a := range m.GetTypedPerFilterConfig() {
		r.must(key == peersFilter, "typed_per_filter_config", "%s is not supported", key)
		for _, p := range r.principals(a, "typed_per_filter_config["+key+"]") {
			t.Peers = append(t.Peers, r.peer(p, "typed_per_filter_config["+key+"]"))
		}
	}
	for _, h := range m.GetVirtualHosts() {
		field := "virtual_hosts[" + h.GetName() + "]"
		if len(h.GetDomains()) != 1 || len(h.GetRoutes()) != 1 || h.GetRoutes()[0].GetMatch().GetConnectMatcher() == nil {
			r.fail(field, "want one domain, and one route that matches CONNECT")
			break
		}
		domain := h.GetDomains()[0]
		if domain == "*" {
			r.must(h.GetRoutes()[0].GetDirectResponse().GetStatus() == 404, field, "unknown authorities must be answered 404")
			continue
		}
		r.must(!strings.Contains(domain, "*"), field+".domains", "%s: only whole authorities are supported", domain)
		r.must(t.Routes[domain] == nil, field+".domains", "%s occurs twice", domain)
		route := r.route(h.GetRoutes()[0].GetRoute(), field+".routes[0]")
		route.Authority = domain
		route.Callers = r.callers(h.GetTypedPerFilterConfig(), t.Open, field)
		t.Routes[domain] = route
	}
	return t, r.err
}

func (r *reader) route(m *routev3.RouteAction, field string) *Route {
	r.must(m.GetTimeout() != nil && r.duration(m.GetTimeout()) == 0, field+".timeout", "must be 0")
	r.must(m.GetIdleTimeout() != nil && r.duration(m.GetIdleTimeout()) == 0, field+".idle_timeout", "must be 0")
	u := m.GetUpgradeConfigs()
	r.must(len(u) == 1 && u[0].GetUpgradeType() == "CONNECT" && u[0].GetConnectConfig() != nil, field+".upgrade_configs", "must be CONNECT, ended here")
	r.must(m.GetCluster() != "", field+".cluster", "is missing")
	if p := m.GetRetryPolicy(); p != nil {
		r.must(p.GetRetryOn() == "connect-failure", field+".retry_policy.retry_on", "%q is not supported, want connect-failure", p.GetRetryOn())
	}
	return &Route{Cluster: m.GetCluster(), Attempts: 1 + int(m.GetRetryPolicy().GetNumRetries().GetValue())}
}

// callers is nil where everyone whom the table admits may use the route.
func (r *reader) callers(config map[string]*anypb.Any, open bool, field string) []Match {
	if open {
		r.must(len(config) == 0, field+".typed_per_filter_config", "is not supported here")
		return nil
	}
	callers := []Match{}
	for key, a := range config {
		r.must(key == callersFilter, field+".typed_per_filter_config", "%s is not supported", key)
		for _, p := range r.principals(a, field) {
			if p.GetAny() {
				return nil
			}
			callers = append(callers, r.authenticated(p, field))
		}
	}
	return callers
}

// principals are whom rules admit, in the order of the policies' names.
func (r *reader) principals(a *anypb.Any, field string) []*rbacv3.Principal {
	var m rbacfilterv3.RBACPerRoute
	if !r.unpack(a, &m, field) {
		return nil
	}
	rules := m.GetRbac().GetRules()
	r.must(rules != nil && rules.GetAction() == rbacv3.RBAC_ALLOW, field, "only rules that allow are supported")
	var principals []*rbacv3.Principal
	for _, name := range slices.Sorted(maps.Keys(rules.GetPolicies())) {
		p := rules.GetPolicies()[name]
		r.must(len(p.GetPermissions()) == 1 && p.GetPermissions()[0].GetAny(), field+"["+name+"].permissions", "must be any")
		principals = append(principals, p.GetPrincipals()...)
	}
	return principals
}

func (r *reader) authenticated(p *rbacv3.Principal, field string) Match {
	name := p.GetAuthenticated().GetPrincipalName()
	if name == nil {
		r.fail(field, "a principal must be a certificate's name")
		return Match{}
	}
	return r.match(name, field)
}

// peer reads "this certificate, and no asserted caller", or "this certificate,
// and no asserted caller or one that begins so".
func (r *reader) peer(p *rbacv3.Principal, field string) Peer {
	ids := p.GetAndIds().GetIds()
	if len(ids) != 2 {
		r.fail(field, "a peer must be a certificate and whom it speaks for")
		return Peer{}
	}
	peer := Peer{SAN: r.authenticated(ids[0], field)}
	if ids[1].GetNotId() != nil {
		r.asserted(ids[1].GetNotId(), true, field)
		return peer
	}
	either := ids[1].GetOrIds().GetIds()
	if len(either) != 2 {
		r.fail(field, "a peer must be a certificate and whom it speaks for")
		return Peer{}
	}
	r.asserted(either[0].GetNotId(), true, field)
	peer.Asserts = r.asserted(either[1], false, field)
	return peer
}

// asserted reads a match of the header that names the caller.
func (r *reader) asserted(p *rbacv3.Principal, present bool, field string) (prefix string) {
	h := p.GetHeader()
	r.must(strings.EqualFold(h.GetName(), HeaderCaller), field, "only the header %s is supported", HeaderCaller)
	if present {
		r.must(h.GetPresentMatch(), field, "the header %s must be matched by its presence", HeaderCaller)
		return ""
	}
	m := r.match(h.GetStringMatch(), field)
	r.must(m.Prefix != "", field, "the header %s must be matched by its beginning", HeaderCaller)
	return m.Prefix
}
