package xds

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
)

// message is an empty message of the type.
func (t Type) message() proto.Message {
	switch t {
	case TypeCluster:
		return &clusterv3.Cluster{}
	case TypeEndpoints:
		return &endpointv3.ClusterLoadAssignment{}
	case TypeListener:
		return &listenerv3.Listener{}
	case TypeRoutes:
		return &routev3.RouteConfiguration{}
	default:
		return &tlsv3.Secret{}
	}
}

// url is how the type is called in requests and responses.
func (t Type) url() string {
	switch t {
	case TypeCluster:
		return typePrefix + "envoy.config.cluster.v3.Cluster"
	case TypeEndpoints:
		return typePrefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	case TypeListener:
		return typePrefix + "envoy.config.listener.v3.Listener"
	case TypeRoutes:
		return typePrefix + "envoy.config.route.v3.RouteConfiguration"
	default:
		return typePrefix + "envoy.extensions.transport_sockets.tls.v3.Secret"
	}
}

// typeOf finds the type that a URL names.
func typeOf(url string) (Type, bool) {
	for t := range Type(typeCount) {
		if t.url() == url {
			return t, true
		}
	}
	return 0, false
}

// all reports whether a proxy that names no resources of the type means all of
// them.
func (t Type) all() bool { return t == TypeCluster || t == TypeListener }
