package xds

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
)

// TestEmptyView: a view without resources is answered at once, or Envoy waits
// 15 s before it lives.
func TestEmptyView(t *testing.T) {
	f := newFixture(t)
	f.set(Delta{})
	r := f.raw(t)
	for _, typ := range []Type{TypeCluster, TypeListener} {
		r.ask(typ)
		m, names := r.expect(typ)
		if len(names) != 0 || len(m.GetRemovedResources()) != 0 || m.GetSystemVersionInfo() != "t/1" {
			t.Errorf("%s: %v", typ, m)
		}
		r.ack(m)
	}
}

// TestUnknownNames: endpoints and secrets that do not exist are said not to, at
// once, or a cold proxy keeps its port closed for 15 s.
func TestUnknownNames(t *testing.T) {
	f := newFixture(t)
	f.push(t)
	r := f.raw(t)
	r.ask(TypeEndpoints, "out/shop/none/80")
	m, names := r.expect(TypeEndpoints)
	if len(names) != 0 || !slices.Equal(m.GetRemovedResources(), []string{"out/shop/none/80"}) {
		t.Errorf("unknown endpoints: %v", m)
	}
	r.ack(m)
	r.ask(TypeSecret, SecretBundle, "other")
	m, names = r.expect(TypeSecret)
	if !slices.Equal(names, []string{SecretBundle}) || !slices.Equal(m.GetRemovedResources(), []string{"other"}) {
		t.Errorf("secrets: %v", m)
	}
	r.ack(m)
	// When they come into being, whoever asked is told.
	must(t, f.SetImport(Import{Listen: serviceImport(1).Listen, Plan: federation.Plan{Service: federation.ServiceID{Namespace: "shop", Name: "none"}}}))
	f.push(t)
	if _, names = r.expect(TypeEndpoints); !slices.Equal(names, []string{"out/shop/none/80"}) {
		t.Errorf("endpoints that came later: %v", names)
	}
}

// TestOrder: what is referred to is acked before what refers to it is sent, and
// goes after that is gone.
func TestOrder(t *testing.T) {
	f := newFixture(t)
	f.push(t)
	r := f.raw(t)
	r.ask(TypeCluster)
	m, _ := r.expect(TypeCluster)
	r.ack(m)
	r.ask(TypeListener)
	m, names := r.expect(TypeListener)
	if !slices.Equal(names, []string{"east-west", "local"}) {
		t.Fatalf("listeners %v", names)
	}
	r.ack(m)

	must(t, f.SetImport(serviceImport(1)))
	f.push(t)
	clusters, names := r.expect(TypeCluster)
	if !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("clusters %v", names)
	}
	// Envoy asks for the endpoints before it acks the cluster.
	r.ask(TypeEndpoints, names...)
	endpoints, _ := r.expect(TypeEndpoints)
	r.ack(clusters)
	r.ack(endpoints)
	listeners, names := r.expect(TypeListener)
	if !slices.Equal(names, []string{"imp/shop/s1/80"}) {
		t.Fatalf("listeners %v", names)
	}
	r.ack(listeners)

	f.RemoveImport(serviceImport(1).Plan.Service, 80)
	f.push(t)
	m, _ = r.expect(TypeListener)
	if !slices.Equal(m.GetRemovedResources(), []string{"imp/shop/s1/80"}) {
		t.Fatalf("first %v", m)
	}
	r.ack(m)
	m, _ = r.expect(TypeCluster)
	if !slices.Equal(m.GetRemovedResources(), []string{"out/shop/s1/80"}) {
		t.Fatalf("then %v", m)
	}
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeEndpoints.url(), ResourceNamesUnsubscribe: []string{"out/shop/s1/80"}})
	r.ack(m)
	f.inSync(t, 1, federation.Revision{Incarnation: "t", Number: f.rev})
}

// TestEndpointsFollowTheirCluster: Envoy does not ask again for the endpoints
// of a cluster that changed, and warms for 15 s without them.
func TestEndpointsFollowTheirCluster(t *testing.T) {
	f := newFixture(t)
	must(t, f.SetImport(serviceImport(1)))
	must(t, f.SetImport(serviceImport(2)))
	f.push(t)
	r := f.raw(t)
	r.ask(TypeCluster)
	m, names := r.expect(TypeCluster)
	r.ask(TypeEndpoints, names...)
	e, _ := r.expect(TypeEndpoints)
	r.ack(m)
	r.ack(e)

	i := serviceImport(1)
	i.Candidates = append(i.Candidates, &federation.Export{Cluster: "eu-3"})
	must(t, f.SetImport(i))
	f.push(t)
	if _, names = r.expect(TypeCluster); !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("clusters %v", names)
	}
	if _, names = r.expect(TypeEndpoints); !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("endpoints %v", names)
	}

	// After a reconnect the changed cluster is sent before its endpoints are
	// asked for, and the proxy has them in their present version.
	r.cancel()
	r = f.raw(t)
	versions := func(typ Type) map[string]string {
		v := map[string]string{}
		for _, x := range f.Resources() {
			if x.Type == typ {
				v[x.Name.Name] = x.Version
			}
		}
		return v
	}
	known := versions(TypeCluster)
	known["out/shop/s1/80"] = "older"
	r.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeCluster.url(), InitialResourceVersions: known})
	if _, names = r.expect(TypeCluster); !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("clusters %v", names)
	}
	r.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: TypeEndpoints.url(), InitialResourceVersions: versions(TypeEndpoints),
		ResourceNamesSubscribe: []string{"out/shop/s1/80", "out/shop/s2/80"},
	})
	if _, names = r.expect(TypeEndpoints); !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("endpoints %v", names)
	}
}

// TestWithdrawal: Envoy ignores the removal of endpoints that it has, so they
// are emptied.
func TestWithdrawal(t *testing.T) {
	f := newFixture(t)
	must(t, f.SetImport(serviceImport(1)))
	f.push(t)
	r := f.raw(t)
	r.ask(TypeEndpoints, "out/shop/s1/80")
	m, _ := r.expect(TypeEndpoints)
	r.ack(m)
	f.set(Delta{Removed: []Name{{TypeEndpoints, "out/shop/s1/80"}}})
	m, names := r.expect(TypeEndpoints)
	if !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Fatalf("%v", m)
	}
	var cla endpointv3.ClusterLoadAssignment
	must(t, proto.Unmarshal(m.GetResources()[0].GetResource().GetValue(), &cla))
	if cla.GetClusterName() != "out/shop/s1/80" || len(cla.GetEndpoints()) != 0 {
		t.Errorf("%v", &cla)
	}
	r.ack(m)

	// The same after a reconnect of a proxy that has them still.
	r.cancel()
	r = f.raw(t)
	r.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: TypeEndpoints.url(), ResourceNamesSubscribe: []string{"out/shop/s1/80"},
		InitialResourceVersions: map[string]string{"out/shop/s1/80": "older"},
	})
	if m, names = r.expect(TypeEndpoints); !slices.Equal(names, []string{"out/shop/s1/80"}) {
		t.Errorf("%v", m)
	}
}

// TestNackIsolation: a proxy that loses a whole response for one bad resource
// gets all others again.
func TestNackIsolation(t *testing.T) {
	for _, test := range []struct {
		name, cause string
		most        int // responses until the bad one is alone
	}{
		{"named", "Proto constraint validation failed: out/shop/s11/80: bad", 2},
		{"unnamed", "Proto constraint validation failed", 2 * 6},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			var names []string
			for n := range 32 {
				must(t, f.SetImport(serviceImport(n)))
				names = append(names, fmt.Sprintf("out/shop/s%d/80", n))
			}
			f.push(t)
			r := f.raw(t)
			r.ask(TypeEndpoints, names...)
			const bad = "out/shop/s11/80"
			taken := map[string]bool{}
			m, got := r.expect(TypeEndpoints)
			if len(got) != len(names) {
				t.Fatalf("%d endpoints", len(got))
			}
			r.nack(m, test.cause)
			responses := 0
			for len(taken) < len(names)-1 || !isRejected(f, bad) {
				if responses++; responses > test.most {
					t.Fatalf("%d responses, %d of %d taken", responses, len(taken), len(names))
				}
				m, got = r.expect(TypeEndpoints)
				if slices.Contains(got, bad) {
					r.nack(m, test.cause)
					if len(got) == 1 {
						eventually(t, "the bad one is known", func() error {
							if !isRejected(f, bad) {
								return fmt.Errorf("%+v", f.server.Streams())
							}
							return nil
						})
					}
					continue
				}
				for _, n := range got {
					taken[n] = true
				}
				r.ack(m)
			}
			eventually(t, "OnNack hears of it", func() error {
				f.mu.Lock()
				defer f.mu.Unlock()
				if len(f.nacks) != 1 || f.nacks[0].Name.Name != bad || f.nacks[0].Cause != test.cause {
					return fmt.Errorf("nacks %+v", f.nacks)
				}
				return nil
			})
			// It is not sent again until it changes.
			must(t, f.SetImport(serviceImport(3, []federation.Tier{}...)))
			f.push(t)
			if _, got = r.expect(TypeEndpoints); !slices.Equal(got, []string{"out/shop/s3/80"}) {
				t.Errorf("then %v", got)
			}
		})
	}
}

func isRejected(f *fixture, name string) bool {
	for _, s := range f.server.Streams() {
		for _, r := range s.Rejected {
			if r.Name.Name == name {
				return true
			}
		}
	}
	return false
}

// TestCoalescing: while a response waits for its answer nothing else of its
// type is sent; then each resource comes once, in its last version.
func TestCoalescing(t *testing.T) {
	f := newFixture(t)
	must(t, f.SetImport(serviceImport(1)))
	f.push(t)
	r := f.raw(t)
	r.ask(TypeEndpoints, "out/shop/s1/80")
	m, _ := r.expect(TypeEndpoints)
	for n := range 100 {
		i := serviceImport(1)
		i.Plan.Tiers[0].Backends[0].Gateways = []federation.Address{{Host: "127.0.2.2", Port: uint16(1000 + n)}}
		must(t, f.SetImport(i))
		f.push(t)
	}
	r.ack(m)
	m, names := r.expect(TypeEndpoints)
	if len(names) != 1 || !strings.Contains(m.String(), "1099") {
		t.Errorf("got %v", m)
	}
	r.ack(m)
	f.inSync(t, 1, federation.Revision{Incarnation: "t", Number: f.rev})
}

// TestPrune: removed resources are forgotten once every stream has passed them.
func TestPrune(t *testing.T) {
	f := newFixture(t)
	f.push(t)
	r := f.raw(t)
	r.ask(TypeCluster)
	m, _ := r.expect(TypeCluster)
	r.ack(m)
	v := f.server.view(testView)
	size := func() int {
		v.mu.Lock()
		defer v.mu.Unlock()
		return len(v.records[TypeCluster].byName)
	}
	must(t, f.SetImport(serviceImport(0)))
	f.push(t)
	r.expect(TypeCluster) // and no answer: the stream stays where it is
	for n := 1; n <= 100; n++ {
		must(t, f.SetImport(serviceImport(n)))
		f.push(t)
		f.RemoveImport(serviceImport(n).Plan.Service, 80)
		f.push(t)
	}
	if got := size(); got != 101 {
		t.Fatalf("%d clusters while a stream has not passed their removal", got)
	}
	r.cancel()
	eventually(t, "the stream is gone", func() error {
		if n := len(f.server.Streams()); n != 0 {
			return fmt.Errorf("%d streams", n)
		}
		return nil
	})
	f.set(Delta{})
	if got := size(); got != 1 {
		t.Errorf("%d clusters are kept, want the one that is there", got)
	}
}
