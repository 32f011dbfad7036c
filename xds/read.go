package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

// reader turns messages into Config. It is strict: a field that it does not
// know, or a value that the built-in engine would not carry out, refuses the
// resource, with the field's name, because an engine that ignores what it was
// told lies about what it does. It keeps the first complaint.
//
// What only concerns Envoy's own bookkeeping (statistics, access logs, the
// files' order of filters with one meaning) is accepted and dropped.
type reader struct{ err error }

// fail records why the field cannot be taken.
func (r *reader) fail(field, format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...))
	}
}

// must requires what the engine takes for granted.
func (r *reader) must(ok bool, field, format string, args ...any) {
	if !ok {
		r.fail(field, format, args...)
	}
}

// unpack decodes a into m and checks its fields.
func (r *reader) unpack(a *anypb.Any, m proto.Message, field string) bool {
	want := typePrefix + string(m.ProtoReflect().Descriptor().FullName())
	if a.GetTypeUrl() != want {
		r.fail(field, "type %q is not supported, want %q", a.GetTypeUrl(), want)
		return false
	}
	return r.parse(a.GetValue(), m, field)
}

func (r *reader) parse(body []byte, m proto.Message, field string) bool {
	if err := proto.Unmarshal(body, m); err != nil {
		r.fail(field, "cannot be decoded: %v", err)
		return false
	}
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			r.fail(field, "%v", err)
			return false
		}
	}
	r.known(m.ProtoReflect(), field)
	return r.err == nil
}

// known refuses every field that is set and that reading does not look at.
func (r *reader) known(m protoreflect.Message, path string) {
	if len(m.GetUnknown()) > 0 {
		r.fail(path, "has fields that are newer than this engine")
		return
	}
	switch m.Descriptor().FullName() {
	case "google.protobuf.Any", "google.protobuf.Struct", "google.protobuf.Duration":
		return // unpacked, or read as a whole
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := string(f.Name())
		if path != "" {
			name = path + "." + name
		}
		switch kind := understood(f.FullName()); {
		case kind == ignored:
			return true
		case kind == unsupported:
			r.fail(name, "is not supported by the built-in engine")
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
					r.known(v.Message(), fmt.Sprintf("%s[%s]", name, k))
					return r.err == nil
				})
			}
		case f.IsList():
			if f.Message() != nil {
				for i := range v.List().Len() {
					r.known(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", name, i))
				}
			}
		case f.Message() != nil:
			r.known(v.Message(), name)
		}
		return r.err == nil
	})
}

// support is how the engine takes a field.
type support uint8

const (
	unsupported support = iota
	read
	ignored
)

// understood says what becomes of a field: read below, or without meaning for
// the engine, or not supported.
func understood(f protoreflect.FullName) support {
	parent, field := string(f.Parent()), string(f.Name())
	var fields string
	switch strings.TrimPrefix(parent, "envoy.") {
	case "config.cluster.v3.Cluster":
		if field == "upstream_connection_options" {
			return ignored
		}
		fields = "name type eds_cluster_config connect_timeout circuit_breakers common_lb_config outlier_detection typed_extension_protocol_options transport_socket transport_socket_matches"
	case "config.cluster.v3.Cluster.EdsClusterConfig":
		fields = "eds_config"
	case "config.cluster.v3.Cluster.TransportSocketMatch":
		fields = "name match transport_socket"
	case "config.cluster.v3.Cluster.CommonLbConfig":
		if field == "update_merge_window" {
			return ignored
		}
		fields = "healthy_panic_threshold locality_weighted_lb_config"
	case "config.cluster.v3.CircuitBreakers":
		fields = "thresholds"
	case "config.cluster.v3.CircuitBreakers.Thresholds":
		fields = "max_connections max_pending_requests max_requests max_retries"
	case "config.cluster.v3.OutlierDetection":
		if field == "interval" {
			return ignored
		}
		fields = "split_external_local_origin_errors consecutive_local_origin_failure base_ejection_time max_ejection_time max_ejection_percent enforcing_consecutive_5xx enforcing_success_rate enforcing_local_origin_success_rate"
	case "config.core.v3.ConfigSource":
		fields = "ads api_config_source resource_api_version"
	case "config.core.v3.ApiConfigSource":
		return ignored // where Envoy fetches the leaf; the engine holds it
	case "config.core.v3.TransportSocket":
		if field == "name" {
			return ignored
		}
		fields = "typed_config"
	case "extensions.upstreams.http.v3.HttpProtocolOptions":
		fields = "common_http_protocol_options explicit_http_config"
	case "extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig":
		fields = "http2_protocol_options"
	case "config.core.v3.HttpProtocolOptions":
		fields = "idle_timeout max_connection_duration"
	case "config.core.v3.Http2ProtocolOptions":
		fields = "max_concurrent_streams initial_stream_window_size initial_connection_window_size connection_keepalive"
	case "config.core.v3.KeepaliveSettings":
		fields = "interval timeout"
	case "extensions.transport_sockets.tls.v3.UpstreamTlsContext":
		fields = "common_tls_context sni max_session_keys"
	case "extensions.transport_sockets.tls.v3.DownstreamTlsContext":
		fields = "common_tls_context require_client_certificate disable_stateless_session_resumption disable_stateful_session_resumption"
	case "extensions.transport_sockets.tls.v3.CommonTlsContext":
		fields = "tls_params alpn_protocols tls_certificate_sds_secret_configs combined_validation_context validation_context_sds_secret_config"
	case "extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext":
		fields = "default_validation_context validation_context_sds_secret_config"
	case "extensions.transport_sockets.tls.v3.TlsParameters":
		fields = "tls_minimum_protocol_version tls_maximum_protocol_version"
	case "extensions.transport_sockets.tls.v3.SdsSecretConfig":
		fields = "name sds_config"
	case "extensions.transport_sockets.tls.v3.CertificateValidationContext":
		fields = "trusted_ca match_typed_subject_alt_names"
	case "extensions.transport_sockets.tls.v3.SubjectAltNameMatcher":
		fields = "san_type matcher"
	case "extensions.transport_sockets.tls.v3.Secret":
		fields = "name validation_context"
	case "type.matcher.v3.StringMatcher":
		fields = "exact prefix"
	case "config.core.v3.DataSource":
		fields = "inline_bytes inline_string"
	case "config.endpoint.v3.ClusterLoadAssignment":
		fields = "cluster_name endpoints policy"
	case "config.endpoint.v3.ClusterLoadAssignment.Policy":
		fields = "overprovisioning_factor"
	case "config.endpoint.v3.LocalityLbEndpoints":
		fields = "locality lb_endpoints load_balancing_weight priority"
	case "config.endpoint.v3.LbEndpoint":
		fields = "endpoint metadata"
	case "config.endpoint.v3.Endpoint":
		fields = "address"
	case "config.core.v3.Locality":
		fields = "region zone"
	case "config.core.v3.Metadata":
		fields = "filter_metadata"
	case "config.core.v3.Address":
		fields = "socket_address pipe"
	case "config.core.v3.SocketAddress":
		fields = "address port_value"
	case "config.core.v3.Pipe":
		fields = "path mode"
	case "config.listener.v3.Listener":
		if field == "tcp_keepalive" {
			return ignored
		}
		fields = "name address filter_chains listener_filters listener_filters_timeout"
	case "config.listener.v3.ListenerFilter", "config.listener.v3.Filter":
		fields = "name typed_config"
	case "config.listener.v3.FilterChain":
		fields = "name filter_chain_match filters transport_socket"
	case "config.listener.v3.FilterChainMatch":
		fields = "server_names application_protocols"
	case "extensions.filters.network.tcp_proxy.v3.TcpProxy":
		if field == "stat_prefix" || field == "access_log" {
			return ignored
		}
		fields = "cluster idle_timeout max_connect_attempts backoff_options tunneling_config"
	case "extensions.filters.network.tcp_proxy.v3.TcpProxy.TunnelingConfig":
		fields = "hostname headers_to_add"
	case "config.core.v3.BackoffStrategy":
		fields = "base_interval max_interval"
	case "config.core.v3.HeaderValueOption":
		fields = "header append_action"
	case "config.core.v3.HeaderValue":
		fields = "key value"
	case "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":
		switch field {
		case "stat_prefix", "access_log", "generate_request_id", "skip_xff_append", "local_reply_config", "request_headers_timeout":
			return ignored
		}
		fields = "codec_type rds http2_protocol_options common_http_protocol_options stream_idle_timeout upgrade_configs http_filters"
	case "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig":
		fields = "upgrade_type"
	case "extensions.filters.network.http_connection_manager.v3.Rds":
		fields = "config_source route_config_name"
	case "extensions.filters.network.http_connection_manager.v3.HttpFilter":
		fields = "name typed_config"
	case "extensions.filters.http.router.v3.Router":
		return ignored
	case "config.route.v3.RouteConfiguration":
		fields = "name virtual_hosts typed_per_filter_config"
	case "config.route.v3.VirtualHost":
		fields = "name domains routes typed_per_filter_config"
	case "config.route.v3.Route":
		if field == "response_headers_to_add" {
			return ignored // the engine's answers have them always
		}
		fields = "match route direct_response"
	case "config.route.v3.RouteMatch":
		fields = "connect_matcher"
	case "config.route.v3.DirectResponseAction":
		fields = "status"
	case "config.route.v3.RouteAction":
		fields = "cluster timeout idle_timeout upgrade_configs retry_policy"
	case "config.route.v3.RouteAction.UpgradeConfig":
		fields = "upgrade_type connect_config"
	case "config.route.v3.RetryPolicy":
		switch field {
		case "retry_host_predicate", "host_selection_retry_max_attempts", "retry_back_off":
			return ignored // the engine never tries an endpoint twice while there are others
		}
		fields = "retry_on num_retries"
	case "extensions.filters.http.rbac.v3.RBACPerRoute":
		fields = "rbac"
	case "extensions.filters.http.rbac.v3.RBAC":
		fields = "rules"
	case "config.rbac.v3.RBAC":
		fields = "action policies"
	case "config.rbac.v3.Policy":
		fields = "permissions principals"
	case "config.rbac.v3.Permission":
		fields = "any"
	case "config.rbac.v3.Principal":
		fields = "and_ids or_ids any authenticated header not_id"
	case "config.rbac.v3.Principal.Set":
		fields = "ids"
	case "config.rbac.v3.Principal.Authenticated":
		fields = "principal_name"
	case "config.route.v3.HeaderMatcher":
		fields = "name present_match string_match"
	case "type.v3.Percent", "google.protobuf.UInt32Value", "google.protobuf.BoolValue":
		return read
	}
	for name := range strings.FieldsSeq(fields) {
		if name == field {
			return read
		}
	}
	return unsupported
}

func (r *reader) duration(d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	return d.AsDuration()
}

// ads requires that a resource comes from the stream that names it.
func (r *reader) ads(c *corev3.ConfigSource, field string) {
	r.must(c.GetAds() != nil, field, "only resources of the same ADS stream are supported")
}

func (r *reader) socketAddress(a *corev3.SocketAddress, field string) netip.AddrPort {
	ip, err := netip.ParseAddr(a.GetAddress())
	port := a.GetPortValue()
	if err != nil || port == 0 || port > 65535 {
		r.fail(field, "%s:%d is no IP address and port", a.GetAddress(), port)
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port))
}

// stringFields reads a struct whose values are all strings.
func (r *reader) stringFields(s *structpb.Struct, field string) map[string]string {
	m := make(map[string]string, len(s.GetFields()))
	for k, v := range s.GetFields() {
		text, ok := v.GetKind().(*structpb.Value_StringValue)
		if !ok {
			r.fail(field+"."+k, "only strings are supported")
			return nil
		}
		m[k] = text.StringValue
	}
	return m
}
