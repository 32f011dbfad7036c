package xds

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcxds "google.golang.org/grpc/xds"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// TestGRPCClient: gRPC's own xDS client, which speaks the protocol without
// deltas and names all that it wants, follows the server.
func TestGRPCClient(t *testing.T) {
	dir, err := os.MkdirTemp("", "weft-grpc-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	server := NewServer(ServerConfig{Clock: clock.Real(), Logger: testLogger(t), OnNack: func(n Nack) { t.Errorf("%s: %s", n.Name, n.Cause) }})
	socket := filepath.Join(dir, "agent.sock")
	serveUnix(t, socket, func(g *grpc.Server) {
		server.Register(g, func(context.Context) (View, error) { return "grpc", nil })
	})
	resource := func(typ Type, name string, m proto.Message) *Resource {
		r, err := new(encoder).resource(typ, name, m)
		must(t, err)
		return r
	}
	e := new(encoder)
	endpoints := func(addr netip.AddrPort) *Resource {
		return resource(TypeEndpoints, "health", &endpointv3.ClusterLoadAssignment{ClusterName: "health", Endpoints: []*endpointv3.LocalityLbEndpoints{{
			Locality: &corev3.Locality{Zone: "eu-1"}, LoadBalancingWeight: u32(1),
			LbEndpoints: []*endpointv3.LbEndpoint{lbEndpoint(socketAddress(addr), nil, "")},
		}}})
	}
	first := healthServer(t, "first")
	server.Set("grpc", federation.Revision{Incarnation: "t", Number: 1}, Delta{Changed: []*Resource{
		resource(TypeListener, "health", &listenerv3.Listener{Name: "health", ApiListener: &listenerv3.ApiListener{ApiListener: e.any(&hcmv3.HttpConnectionManager{
			StatPrefix:     "health",
			RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: adsSource(), RouteConfigName: "health"}},
			HttpFilters:    []*hcmv3.HttpFilter{httpFilter(e, routerFilter, &routerv3.Router{})},
		})}}),
		resource(TypeRoutes, "health", &routev3.RouteConfiguration{Name: "health", VirtualHosts: []*routev3.VirtualHost{{
			Name: "health", Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: ""}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "health"}}},
			}},
		}}}),
		resource(TypeCluster, "health", &clusterv3.Cluster{
			Name:                 "health",
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		}),
		endpoints(first),
	}})

	builder, err := grpcxds.NewXDSResolverWithConfigForTesting([]byte(fmt.Sprintf(
		`{"xds_servers":[{"server_uri":"unix://%s","channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],"node":{"id":"app"}}`, socket)))
	must(t, err)
	conn, err := grpc.NewClient("xds:///health", grpc.WithResolvers(builder), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	serving := func(name string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: name})
		return err
	}
	eventually(t, "the first server answers", func() error { return serving("first") })

	// Endpoints alone change.
	server.Set("grpc", federation.Revision{Incarnation: "t", Number: 2}, Delta{Changed: []*Resource{endpoints(healthServer(t, "second"))}})
	eventually(t, "the second server answers", func() error { return serving("second") })
	eventually(t, "everything is acked", func() error {
		s := server.Streams()
		if len(s) != 1 || !s[0].InSync || s[0].Applied.Number != 2 || s[0].Protocol != "whole" || s[0].Node != "app" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// healthServer answers for one service name.
func healthServer(t *testing.T, name string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	g := grpc.NewServer()
	h := health.NewServer()
	h.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(g, h)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Serve(l)
	}()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}
