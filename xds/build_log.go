package xds

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
)

const stdoutLog = "envoy.access_loggers.stdout"

// tcpLogFields are the fields of the access line of a connection that leaves
// this cluster or passes through.
func tcpLogFields() map[string]string {
	return map[string]string{
		"time":        "%START_TIME%",
		"source":      "%DOWNSTREAM_REMOTE_ADDRESS%",
		"cluster":     endpointLabel(LabelCluster),
		"upstream":    "%UPSTREAM_CLUSTER%",
		"endpoint":    "%UPSTREAM_HOST%",
		"tier":        endpointLabel(LabelTier),
		"attempts":    "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
		"peer":        "%UPSTREAM_PEER_URI_SAN%",
		"bytesIn":     "%BYTES_RECEIVED%",
		"bytesOut":    "%BYTES_SENT%",
		"millis":      "%DURATION%",
		"revision":    endpointLabel(LabelRevision),
		"decision":    endpointLabel(LabelDecision),
		"end":         "%RESPONSE_FLAGS%",
		"endUpstream": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
	}
}

// streamLogFields are the fields of the access line of a stream that ends here.
func streamLogFields() map[string]string {
	return map[string]string{
		"time":     "%START_TIME%",
		"source":   "%DOWNSTREAM_REMOTE_ADDRESS%",
		"service":  "%REQ(:AUTHORITY)%",
		"caller":   "%REQ(WEFT-CALLER)%",
		"from":     "%REQ(WEFT-SOURCE)%",
		"endpoint": "%UPSTREAM_HOST%",
		"attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
		"peer":     "%DOWNSTREAM_PEER_URI_SAN%",
		"status":   "%RESPONSE_CODE%",
		"bytesIn":  "%BYTES_RECEIVED%",
		"bytesOut": "%BYTES_SENT%",
		"millis":   "%DURATION%",
		"revision": "%REQ(WEFT-REVISION)%",
		"decision": "%REQ(WEFT-DECISION)%",
		"end":      "%RESPONSE_CODE_DETAILS%",
	}
}

// accessLog writes a line per connection or stream to standard output, from
// where the process that supervises Envoy takes it.
func accessLog(e *encoder, fields map[string]string) []*accesslogv3.AccessLog {
	return []*accesslogv3.AccessLog{{
		Name: stdoutLog,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: e.any(&streamv3.StdoutAccessLog{
			AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format:          &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: stringStruct(fields)},
				OmitEmptyValues: true,
			}},
		})},
	}}
}
