package xds

import (
	"context"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
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
