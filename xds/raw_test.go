package xds

import (
	"context"
	"sync"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
)

// raw is a delta stream whose every message the test writes itself.
type raw struct {
	t      testing.TB
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	cancel context.CancelFunc
}

func (f *fixture) raw(t testing.TB) *raw {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(f.conn(t)).DeltaAggregatedResources(ctx)
	must(t, err)
	t.Cleanup(cancel)
	return &raw{t: t, stream: s, cancel: cancel}
}

func (r *raw) send(m *discoveryv3.DeltaDiscoveryRequest) {
	r.t.Helper()
	must(r.t, r.stream.Send(m))
}

func (r *raw) ask(t Type, names ...string) {
	r.t.Helper()
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: t.url(), ResourceNamesSubscribe: names})
}

func (r *raw) recv() *discoveryv3.DeltaDiscoveryResponse {
	r.t.Helper()
	m, err := r.stream.Recv()
	must(r.t, err)
	return m
}

// expect receives a response of type t and returns its names, sorted as they
// came, and the removed ones.
func (r *raw) expect(t Type) (m *discoveryv3.DeltaDiscoveryResponse, names []string) {
	r.t.Helper()
	m = r.recv()
	if m.GetTypeUrl() != t.url() {
		r.t.Fatalf("a response of %s, want %s", m.GetTypeUrl(), t)
	}
	for _, x := range m.GetResources() {
		names = append(names, x.GetName())
	}
	return m, names
}

func (r *raw) ack(m *discoveryv3.DeltaDiscoveryResponse) {
	r.t.Helper()
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResponseNonce: m.GetNonce()})
}

func (r *raw) nack(m *discoveryv3.DeltaDiscoveryResponse, cause string) {
	r.t.Helper()
	r.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: m.GetTypeUrl(), ResponseNonce: m.GetNonce(),
		ErrorDetail: &statuspb.Status{Code: 13, Message: cause},
	})
}

// follow runs n streams that ask for all clusters, their endpoints and all
// listeners as Envoy does, and take everything at once, without decoding it.
func (f *fixture) follow(t testing.TB, n int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var streams sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		streams.Wait()
	})
	var conn *grpc.ClientConn
	for i := range n {
		if i%50 == 0 {
			conn = f.conn(t)
		}
		s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
		must(t, err)
		streams.Go(func() {
			for _, typ := range []Type{TypeCluster, TypeListener} {
				if s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ.url()}) != nil {
					return
				}
			}
			known := map[string]bool{}
			for {
				m, err := s.Recv()
				if err != nil {
					return
				}
				if m.GetTypeUrl() == TypeCluster.url() {
					ask := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints.url()}
					for _, r := range m.GetResources() {
						if !known[r.GetName()] {
							known[r.GetName()] = true
							ask.ResourceNamesSubscribe = append(ask.ResourceNamesSubscribe, r.GetName())
						}
					}
					if len(ask.ResourceNamesSubscribe) > 0 && s.Send(ask) != nil {
						return
					}
				}
				if s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: m.GetTypeUrl(), ResponseNonce: m.GetNonce()}) != nil {
					return
				}
			}
		})
	}
}
