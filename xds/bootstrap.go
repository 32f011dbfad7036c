package xds

import (
	"fmt"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

// Bootstrap is all that an Envoy is told other than by xDS.
type Bootstrap struct {
	// NodeID and NodeCluster appear in the agent's status. They are no identity:
	// that is the socket's.
	NodeID, NodeCluster string
	// AgentPipe is the agent's unix socket for this proxy's identity, LeafPipe
	// the socket of the process that holds its key, and AdminPipe the one that
	// Envoy makes for its admin interface. At most 107 bytes each.
	AgentPipe, LeafPipe, AdminPipe string
}

// Marshal is the file for Envoy's --config-path, whose name must end in
// ".json". It holds no secret.
func (b Bootstrap) Marshal() ([]byte, error) {
	e := new(encoder)
	m := &bootstrapv3.Bootstrap{
		Node:  &corev3.Node{Id: b.NodeID, Cluster: b.NodeCluster},
		Admin: &bootstrapv3.Admin{Address: pipeAddress(b.AdminPipe, 0o600)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			LdsConfig: adsSource(),
			CdsConfig: adsSource(),
			AdsConfig: &corev3.ApiConfigSource{
				ApiType:             corev3.ApiConfigSource_DELTA_GRPC,
				TransportApiVersion: corev3.ApiVersion_V3,
				// The node is 61 KB; once is enough.
				SetNodeOnFirstMessageOnly: true,
				GrpcServices:              []*corev3.GrpcService{grpcService(agentCluster)},
			},
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{
			pipeCluster(e, agentCluster, b.AgentPipe),
			pipeCluster(e, leafCluster, b.LeafPipe),
		}},
	}
	e.bytes(m)
	if e.err != nil {
		return nil, fmt.Errorf("envoy bootstrap: %w", e.err)
	}
	return protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
}

func pipeCluster(e *encoder, name, path string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       seconds(time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{lbEndpoint(pipeAddress(path, 0), nil, "")}}},
		},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{httpOptions: e.any(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
						Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
							ConnectionKeepalive: &corev3.KeepaliveSettings{Interval: seconds(10 * time.Second), Timeout: seconds(5 * time.Second)},
						},
					},
				},
			},
		})},
	}
}
