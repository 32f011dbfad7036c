package xds

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// ALPN is what both ends of every tunnel must agree on.
const ALPN = "weft/1"

// The SDS names. The leaf comes from the process beside the proxy, over a unix
// socket; the others come over ADS and hold no secret.
const (
	SecretLeaf   = "default"
	SecretBundle = "bundle"
	SecretPeers  = "peers/mesh"
)

// The clusters that a bootstrap must define: the agent, and the process that
// holds the key.
const (
	agentCluster = "weft-agent"
	leafCluster  = "weft-leaf"
)

const (
	tlsSocket = "envoy.transport_sockets.tls"
	rawSocket = "envoy.transport_sockets.raw_buffer"
)

// nobody is a URI SAN that no authority of the mesh can issue: it is no SPIFFE
// ID. It stands wherever a list of identities would be empty, because Envoy
// takes an empty list for "anyone under the roots".
const nobody = "weft:nobody"

// TerminateName is the SNI of a gateway that ends tunnels itself.
func TerminateName(c federation.ClusterID) string { return string(c) + ".t.weft" }

// PassthroughName is the SNI of one service port behind a gateway that passes
// tunnels through to the service's own proxies.
func PassthroughName(c federation.ClusterID, s federation.ServiceID, port uint16) string {
	return fmt.Sprintf("%d.%s.%s.%s.p.weft", port, s.Name, s.Namespace, c)
}

// Authority names a service port inside a tunnel.
func Authority(s federation.ServiceID, port uint16) string {
	return fmt.Sprintf("%s.%s.svc.clusterset.local:%d", s.Name, s.Namespace, port)
}

// ParseAuthority reads what Authority writes.
func ParseAuthority(a string) (s federation.ServiceID, port uint16, ok bool) {
	host, digits, found := strings.Cut(a, ":")
	n, err := strconv.ParseUint(digits, 10, 16)
	name, rest, _ := strings.Cut(host, ".")
	ns, suffix, _ := strings.Cut(rest, ".")
	if !found || err != nil || n == 0 || suffix != "svc.clusterset.local" {
		return federation.ServiceID{}, 0, false
	}
	s, err = federation.ParseServiceID(ns + "/" + name)
	return s, uint16(n), err == nil
}

func gatewayID(td spiffeid.TrustDomain, c federation.ClusterID) string {
	return "spiffe://" + td.Name() + "/cluster/" + string(c) + "/gateway"
}

// workloadPrefix is what the IDs of a cluster's workloads begin with.
func workloadPrefix(td spiffeid.TrustDomain, c federation.ClusterID) string {
	return "spiffe://" + td.Name() + "/cluster/" + string(c) + "/ns/"
}

func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

// leafSource is the SDS server of the process that holds the key.
func leafSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType:                   corev3.ApiConfigSource_DELTA_GRPC,
			TransportApiVersion:       corev3.ApiVersion_V3,
			SetNodeOnFirstMessageOnly: true,
			GrpcServices:              []*corev3.GrpcService{grpcService(leafCluster)},
		}},
	}
}

// grpcService reconnects within a fifth of a second: Envoy's own back-off
// leaves a proxy without its agent for up to 6 s after the agent is back.
func grpcService(cluster string) *corev3.GrpcService {
	return &corev3.GrpcService{
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{
			ClusterName: cluster,
			RetryPolicy: &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{
				BaseInterval: seconds(50 * time.Millisecond),
				MaxInterval:  seconds(200 * time.Millisecond),
			}},
		}},
	}
}

func secret(name string, source *corev3.ConfigSource) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: source}
}

func tls13() *tlsv3.TlsParameters {
	return &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
	}
}

func sanMatcher(m Match) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: stringMatcher(m)}
}

func stringMatcher(m Match) *matcherv3.StringMatcher {
	if m.Prefix != "" {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: m.Prefix}}
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: m.Exact}}
}

// orNobody makes an empty list one that matches nobody.
func orNobody(sans []Match) []Match {
	if len(sans) == 0 {
		return []Match{{Exact: nobody}}
	}
	return sans
}

// clientSocket is the transport of a tunnel's client: its server must present
// exactly one of sans, which are URI SANs.
func clientSocket(e *encoder, sni string, sans ...string) *corev3.TransportSocket {
	exact := make([]Match, len(sans))
	for i, s := range sans {
		exact[i] = Match{Exact: s}
	}
	var matchers []*tlsv3.SubjectAltNameMatcher
	for _, m := range orNobody(exact) {
		matchers = append(matchers, sanMatcher(m))
	}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: e.any(&tlsv3.UpstreamTlsContext{
		Sni:            sni,
		MaxSessionKeys: u32(0), // no session is resumed past a change of trust
		CommonTlsContext: &tlsv3.CommonTlsContext{
			TlsParams:                      tls13(),
			AlpnProtocols:                  []string{ALPN},
			TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(SecretLeaf, leafSource())},
			ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
				CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
					DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: matchers},
					ValidationContextSdsSecretConfig: secret(SecretBundle, adsSource()),
				},
			},
		},
	})}}
}

// plainSocket is for the pipe of the proxy's own local listener.
func plainSocket(e *encoder) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: rawSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: e.any(&rawv3.RawBuffer{})}}
}

// serverSocket is the transport of a tunnel's server. Whom it admits is in a
// secret: a change in the listener itself would drain its connections.
func serverSocket(e *encoder) *corev3.TransportSocket {
	yes := boolValue(true)
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: e.any(&tlsv3.DownstreamTlsContext{
		RequireClientCertificate:         yes,
		DisableStatefulSessionResumption: true,
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
		CommonTlsContext: &tlsv3.CommonTlsContext{
			TlsParams:                      tls13(),
			AlpnProtocols:                  []string{ALPN},
			TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(SecretLeaf, leafSource())},
			ValidationContextType: &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{
				ValidationContextSdsSecretConfig: secret(SecretPeers, adsSource()),
			},
		},
	})}}
}

// buildSecrets makes the secrets that hold no secret: the roots alone, and the
// roots with everyone who may open a tunnel to this proxy.
func buildSecrets(td spiffeid.TrustDomain, m Members) ([]*Resource, error) {
	if len(m.Roots) == 0 {
		return nil, errNoTrustRoots
	}
	var roots bytes.Buffer
	for _, c := range m.Roots {
		if err := pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return nil, fmt.Errorf("root %s: %w", c.Subject, err)
		}
	}
	var peers []Match
	for _, c := range m.Clusters {
		peers = append(peers, clusterSANs(td, c)...)
	}
	bundle, err := trustSecret(SecretBundle, roots.Bytes(), nil)
	if err != nil {
		return nil, err
	}
	mesh, err := trustSecret(SecretPeers, roots.Bytes(), orNobody(peers))
	if err != nil {
		return nil, err
	}
	return []*Resource{bundle, mesh}, nil
}

// clusterSANs are the identities of a cluster that open tunnels: its gateways
// and its workloads.
func clusterSANs(td spiffeid.TrustDomain, c federation.ClusterID) []Match {
	return []Match{{Exact: gatewayID(td, c)}, {Prefix: workloadPrefix(td, c)}}
}

func trustSecret(name string, roots []byte, sans []Match) (*Resource, error) {
	v := &tlsv3.CertificateValidationContext{
		TrustedCa: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: roots}},
	}
	for _, m := range sans {
		v.MatchTypedSubjectAltNames = append(v.MatchTypedSubjectAltNames, sanMatcher(m))
	}
	e := new(encoder)
	return e.resource(TypeSecret, name, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}})
}
