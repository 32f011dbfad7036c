package xds

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weftmesh/weft/federation"
)

// readCluster reads a cluster; its endpoints come apart from it.
func readCluster(body []byte) (*Cluster, error) {
	r, m := new(reader), new(clusterv3.Cluster)
	if !r.parse(body, m, "") {
		return nil, r.err
	}
	c := &Cluster{Name: m.GetName(), ConnectTimeout: r.duration(m.GetConnectTimeout())}
	r.must(m.GetType() == clusterv3.Cluster_EDS, "type", "only EDS is supported")
	r.ads(m.GetEdsClusterConfig().GetEdsConfig(), "eds_cluster_config.eds_config")
	r.must(c.ConnectTimeout > 0, "connect_timeout", "must be positive")
	if p := m.GetCommonLbConfig().GetHealthyPanicThreshold(); p != nil {
		r.must(p.GetValue() <= panicPercent, "common_lb_config.healthy_panic_threshold", "%v %% is not supported: endpoints are used in spite of ejection only when all are ejected", p.GetValue())
	}
	for _, t := range m.GetCircuitBreakers().GetThresholds() {
		for _, n := range []uint32{t.GetMaxConnections().GetValue(), t.GetMaxPendingRequests().GetValue(), t.GetMaxRequests().GetValue(), t.GetMaxRetries().GetValue()} {
			r.must(n >= unlimited, "circuit_breakers.thresholds", "limits below %d are not supported", unlimited)
		}
	}
	c.Ejection = r.ejection(m.GetOutlierDetection())
	for key, options := range m.GetTypedExtensionProtocolOptions() {
		if key != httpOptions {
			r.fail("typed_extension_protocol_options", "%s is not supported", key)
			continue
		}
		var o httpv3.HttpProtocolOptions
		if r.unpack(options, &o, key) {
			c.Tunnels = &Tunnels{
				HTTP2:       r.http2(o.GetExplicitHttpConfig().GetHttp2ProtocolOptions()),
				IdleTimeout: r.duration(o.GetCommonHttpProtocolOptions().GetIdleTimeout()),
			}
			r.must(o.GetExplicitHttpConfig().GetHttp2ProtocolOptions() != nil, key, "only HTTP/2 is supported")
			r.must(o.GetCommonHttpProtocolOptions().GetMaxConnectionDuration() == nil, key+".max_connection_duration", "is the server's to set")
		}
	}
	c.TLS = r.clientSockets(m)
	return c, r.err
}

func (r *reader) ejection(o *clusterv3.OutlierDetection) Ejection {
	if o == nil {
		return Ejection{}
	}
	const field = "outlier_detection"
	r.must(o.GetSplitExternalLocalOriginErrors(), field+".split_external_local_origin_errors", "must be true")
	r.must(o.GetMaxEjectionPercent().GetValue() == 100, field+".max_ejection_percent", "must be 100")
	for name, w := range map[string]interface{ GetValue() uint32 }{
		"enforcing_consecutive_5xx":           o.GetEnforcingConsecutive_5Xx(),
		"enforcing_success_rate":              o.GetEnforcingSuccessRate(),
		"enforcing_local_origin_success_rate": o.GetEnforcingLocalOriginSuccessRate(),
	} {
		r.must(w.GetValue() == 0, field+"."+name, "must be 0")
	}
	return Ejection{
		Failures: int(o.GetConsecutiveLocalOriginFailure().GetValue()),
		BaseTime: r.duration(o.GetBaseEjectionTime()),
		MaxTime:  r.duration(o.GetMaxEjectionTime()),
	}
}

func (r *reader) http2(o *corev3.Http2ProtocolOptions) HTTP2 {
	return HTTP2{
		StreamWindow: o.GetInitialStreamWindowSize().GetValue(),
		ConnWindow:   o.GetInitialConnectionWindowSize().GetValue(),
		MaxStreams:   o.GetMaxConcurrentStreams().GetValue(),
		PingInterval: r.duration(o.GetConnectionKeepalive().GetInterval()),
		PingTimeout:  r.duration(o.GetConnectionKeepalive().GetTimeout()),
	}
}

// clientSockets are a cluster's transports by match key; nil for plain
// clusters.
func (r *reader) clientSockets(m *clusterv3.Cluster) map[string]*ClientTLS {
	if m.GetTransportSocket() == nil && len(m.GetTransportSocketMatches()) == 0 {
		return nil
	}
	// An endpoint whose key is unknown must reach nobody, whatever engine reads
	// this.
	fallback, plain := r.clientSocket(m.GetTransportSocket(), "transport_socket")
	if r.err == nil {
		r.must(!plain && slices.Equal(fallback.SANs, []string{nobody}), "transport_socket", "must be a TLS context that matches nobody")
	}
	sockets := make(map[string]*ClientTLS, len(m.GetTransportSocketMatches()))
	for _, s := range m.GetTransportSocketMatches() {
		field := "transport_socket_matches[" + s.GetName() + "]"
		match := r.stringFields(s.GetMatch(), field+".match")
		r.must(len(match) == 1 && match[matchKey] != "", field+".match", "only the key %q is supported", matchKey)
		key := match[matchKey]
		_, twice := sockets[key]
		r.must(!twice, field+".match", "the first of two equal matches would win")
		socket, plain := r.clientSocket(s.GetTransportSocket(), field)
		r.must(!plain || key == localMatch, field, "plain text is for the local listener only")
		sockets[key] = socket
	}
	return sockets
}

func (r *reader) clientSocket(s *corev3.TransportSocket, field string) (socket *ClientTLS, plain bool) {
	if s.GetTypedConfig().MessageIs(&rawv3.RawBuffer{}) {
		return nil, true
	}
	var m tlsv3.UpstreamTlsContext
	if !r.unpack(s.GetTypedConfig(), &m, field) {
		return &ClientTLS{}, false
	}
	common := m.GetCommonTlsContext()
	r.must(m.GetMaxSessionKeys() != nil && m.GetMaxSessionKeys().GetValue() == 0, field+".max_session_keys", "must be 0: sessions are never resumed")
	combined := common.GetCombinedValidationContext()
	r.must(combined != nil, field+".combined_validation_context", "is missing")
	c := &ClientTLS{SNI: m.GetSni(), ALPN: common.GetAlpnProtocols(), Certificate: r.leafName(common, field)}
	c.Trust = r.trustName(combined.GetValidationContextSdsSecretConfig(), field)
	for _, san := range r.sans(combined.GetDefaultValidationContext(), field) {
		r.must(san.Exact != "", field+".match_typed_subject_alt_names", "a server's identity must be exact")
		c.SANs = append(c.SANs, san.Exact)
	}
	r.must(len(c.SANs) > 0, field+".match_typed_subject_alt_names", "is missing: any server would match")
	return c, false
}

func (r *reader) leafName(c *tlsv3.CommonTlsContext, field string) string {
	p := c.GetTlsParams()
	r.must(p.GetTlsMinimumProtocolVersion() == tlsv3.TlsParameters_TLSv1_3 && p.GetTlsMaximumProtocolVersion() == tlsv3.TlsParameters_TLSv1_3,
		field+".tls_params", "must be TLS 1.3 alone")
	r.must(len(c.GetAlpnProtocols()) > 0, field+".alpn_protocols", "is missing")
	leaves := c.GetTlsCertificateSdsSecretConfigs()
	r.must(len(leaves) == 1, field+".tls_certificate_sds_secret_configs", "must be one")
	if len(leaves) != 1 {
		return ""
	}
	return leaves[0].GetName()
}

func (r *reader) trustName(s *tlsv3.SdsSecretConfig, field string) string {
	r.must(s.GetName() != "", field+".validation_context_sds_secret_config", "is missing")
	r.ads(s.GetSdsConfig(), field+".validation_context_sds_secret_config.sds_config")
	return s.GetName()
}

func (r *reader) sans(v *tlsv3.CertificateValidationContext, field string) []Match {
	var sans []Match
	for _, m := range v.GetMatchTypedSubjectAltNames() {
		r.must(m.GetSanType() == tlsv3.SubjectAltNameMatcher_URI, field+".match_typed_subject_alt_names.san_type", "only URI is supported")
		sans = append(sans, r.match(m.GetMatcher(), field+".match_typed_subject_alt_names.matcher"))
	}
	return sans
}

func (r *reader) match(m *matcherv3.StringMatcher, field string) Match {
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		r.must(p.Exact != "", field+".exact", "is empty")
		return Match{Exact: p.Exact}
	case *matcherv3.StringMatcher_Prefix:
		return Match{Prefix: p.Prefix}
	default:
		r.fail(field, "only exact and prefix are supported")
		return Match{}
	}
}

// readEndpoints reads the localities of a cluster.
func readEndpoints(body []byte) (name string, localities []*Locality, err error) {
	r, m := new(reader), new(endpointv3.ClusterLoadAssignment)
	if !r.parse(body, m, "") {
		return "", nil, r.err
	}
	if p := m.GetPolicy().GetOverprovisioningFactor(); p != nil {
		r.must(p.GetValue() == noOverspill, "policy.overprovisioning_factor", "must be %d: a priority keeps its traffic until its last endpoint is gone", noOverspill)
	}
	for _, l := range m.GetEndpoints() {
		w := int(l.GetLoadBalancingWeight().GetValue())
		if len(m.GetEndpoints()) == 1 && l.GetLoadBalancingWeight() == nil {
			w = 1
		}
		r.must(w > 0, "endpoints.load_balancing_weight", "is missing in a locality: it would get nothing")
		r.must(l.GetPriority() == 0 || m.GetPolicy().GetOverprovisioningFactor() != nil, "policy.overprovisioning_factor", "is missing beside priorities")
		locality := &Locality{
			Region:   l.GetLocality().GetRegion(),
			Cluster:  federation.ClusterID(l.GetLocality().GetZone()),
			Priority: int(l.GetPriority()),
			Weight:   w,
		}
		for _, e := range l.GetLbEndpoints() {
			locality.Endpoints = append(locality.Endpoints, r.endpoint(e))
		}
		localities = append(localities, locality)
	}
	slices.SortStableFunc(localities, func(a, b *Locality) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Cluster, b.Cluster))
	})
	return m.GetClusterName(), localities, r.err
}

func (r *reader) endpoint(m *endpointv3.LbEndpoint) *Endpoint {
	const field = "endpoints.lb_endpoints"
	e := &Endpoint{Labels: map[string]string{}}
	a := m.GetEndpoint().GetAddress()
	if pipe := a.GetPipe(); pipe != nil {
		e.Pipe = pipe.GetPath()
	} else {
		e.Addr = r.socketAddress(a.GetSocketAddress(), field+".endpoint.address")
	}
	for space, s := range m.GetMetadata().GetFilterMetadata() {
		switch space {
		case matchSpace:
			match := r.stringFields(s, field+".metadata."+space)
			r.must(len(match) == 1 && match[matchKey] != "", field+".metadata."+space, "only the key %q is supported", matchKey)
			e.TLS = match[matchKey]
		case labelSpace:
			e.Labels = r.stringFields(s, field+".metadata."+space)
		default:
			r.fail(field+".metadata", "%s is not supported", space)
		}
	}
	return e
}

// readTrust reads a secret that holds no key.
func readTrust(body []byte) (*Trust, error) {
	r, m := new(reader), new(tlsv3.Secret)
	if !r.parse(body, m, "") {
		return nil, r.err
	}
	v := m.GetValidationContext()
	r.must(v != nil, "validation_context", "is missing: other secrets are not taken from the network")
	t := &Trust{Name: m.GetName()}
	rest := v.GetTrustedCa().GetInlineBytes()
	if s := v.GetTrustedCa().GetInlineString(); s != "" {
		rest = []byte(s)
	}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			r.fail("validation_context.trusted_ca", "%v", err)
			break
		}
		t.Roots = append(t.Roots, root)
	}
	r.must(len(t.Roots) > 0, "validation_context.trusted_ca", "holds no certificate")
	t.SANs = r.sans(v, "validation_context")
	return t, r.err
}
