package xds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// wire is a resource as a response carries it.
func wire(r *Resource) *discoveryv3.Resource {
	return &discoveryv3.Resource{Name: r.Name.Name, Version: r.Version, Resource: &anypb.Any{TypeUrl: r.Type.url(), Value: r.Body}}
}

// fixture is a server with one view, filled by a builder, and a way to connect.
type fixture struct {
	*Builder
	server *Server
	rev    int64

	mu    sync.Mutex
	acks  []Ack
	nacks []Nack
	stop  func() // ends the gRPC server and its connections
	dial  func(context.Context, string) (net.Conn, error)
}

const testView View = "gateway"

func newFixture(t testing.TB) *fixture {
	t.Helper()
	b, err := NewBuilder(Node{
		TrustDomain: testDomain, Cluster: "eu-1", Bind: netip.MustParseAddrPort("127.0.1.1:15443"), LocalPipe: "/run/weft/local.sock",
	})
	must(t, err)
	f := &fixture{Builder: b}
	f.server = NewServer(ServerConfig{
		Clock: clock.Real(), Logger: testLogger(t),
		OnAck:  func(a Ack) { f.mu.Lock(); f.acks = append(f.acks, a); f.mu.Unlock() },
		OnNack: func(n Nack) { f.mu.Lock(); f.nacks = append(f.nacks, n); f.mu.Unlock() },
	})
	must(t, b.SetMembers(Members{Roots: testRoots(t), Clusters: []federation.ClusterID{"eu-1", "eu-2", "us-1"}}))
	f.listen(t)
	t.Cleanup(func() { f.stop() })
	return f
}

// listen starts a gRPC server in front of the xDS server.
func (f *fixture) listen(t testing.TB) {
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	f.server.Register(g, func(context.Context) (View, error) { return testView, nil })
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Serve(l)
	}()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dial = func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }
	f.stop = func() {
		g.Stop()
		<-done
	}
}

func (f *fixture) conn(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			f.mu.Lock()
			dial := f.dial
			f.mu.Unlock()
			return dial(ctx, addr)
		}))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// push sets what the builder has changed, at the next revision.
func (f *fixture) push(t testing.TB) federation.Revision {
	t.Helper()
	d, err := f.Take()
	must(t, err)
	return f.set(d)
}

func (f *fixture) set(d Delta) federation.Revision {
	f.rev++
	rev := federation.Revision{Incarnation: "t", Number: f.rev}
	f.server.Set(testView, rev, d)
	return rev
}

// serviceImport is the n-th of many imports.
func serviceImport(n int, tiers ...federation.Tier) Import {
	if tiers == nil {
		tiers = []federation.Tier{{Backends: []federation.Backend{{
			Cluster: "eu-2", Share: 1000, Gateways: []federation.Address{{Host: "127.0.2.1", Port: 15443}},
		}}}}
	}
	return Import{
		Listen: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)}), 80),
		Plan: federation.Plan{
			Service: federation.ServiceID{Namespace: "shop", Name: fmt.Sprintf("s%d", n)}, Port: 80, Tiers: tiers,
		},
		Candidates: []*federation.Export{{Cluster: "eu-2"}, {Cluster: "us-1"}},
	}
}

// engine records what a client hands it.
type engine struct {
	mu      sync.Mutex
	updates []*Update
	refuse  func(*Update) []Refusal
	client  *Client
}

func (e *engine) apply(u *Update) []Refusal {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.updates = append(e.updates, u)
	if e.refuse == nil {
		return nil
	}
	return e.refuse(u)
}

func (e *engine) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.updates)
}

func (f *fixture) client(t testing.TB, refuse func(*Update) []Refusal) *engine {
	t.Helper()
	e := &engine{refuse: refuse}
	e.client = NewClient(ClientConfig{
		Conn: f.conn(t), NodeID: "gateway-0", NodeCluster: "eu-1", Apply: e.apply,
		Clock: clock.Real(), Logger: testLogger(t), BackoffMin: time.Millisecond, BackoffMax: 5 * time.Millisecond,
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- e.client.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("client ended with %v", err)
		}
	})
	return e
}

// inSync waits until n streams have applied the revision.
func (f *fixture) inSync(t testing.TB, n int, rev federation.Revision) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d streams apply %s", n, rev), func() error {
		streams := f.server.Streams()
		if len(streams) != n {
			return fmt.Errorf("%d streams", len(streams))
		}
		for _, s := range streams {
			if !s.InSync || s.Applied != rev {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
}

func TestClientFollows(t *testing.T) {
	f := newFixture(t)
	must(t, f.SetImport(serviceImport(1)))
	rev := f.push(t)
	e := f.client(t, nil)
	<-e.client.Ready()
	f.inSync(t, 1, rev)
	c := e.client.Config()
	l := c.Listeners["imp/shop/s1/80"]
	if l == nil || l.Kind != ImportListener || l.Forward.Cluster != "out/shop/s1/80" || l.Forward.Tunnel.Authority != "s1.shop.svc.clusterset.local:80" {
		t.Fatalf("listener %+v", l)
	}
	cluster := c.Clusters[l.Forward.Cluster]
	if cluster == nil || len(cluster.Localities) != 1 || cluster.Localities[0].Cluster != "eu-2" || cluster.Localities[0].Weight != 1000 {
		t.Fatalf("cluster %+v", cluster)
	}
	if tls := cluster.TLS[cluster.Localities[0].Endpoints[0].TLS]; tls == nil || tls.SNI != "eu-2.t.weft" || !slices.Equal(tls.SANs, []string{"spiffe://mesh.example/cluster/eu-2/gateway"}) {
		t.Fatalf("tls %+v", tls)
	}
	if c.Trust[SecretPeers] == nil || c.Trust[SecretBundle] == nil || c.Routes[eastWestName] == nil || c.Routes[localName] == nil {
		t.Fatalf("trust %v routes %v", c.Trust, c.Routes)
	}

	// A change of endpoints is one update of one cluster; all else is shared.
	before, updates := c, e.count()
	must(t, f.SetImport(serviceImport(1, federation.Tier{Backends: []federation.Backend{{
		Cluster: "us-1", Share: 1000, Gateways: []federation.Address{{Host: "127.0.3.1", Port: 15443}},
	}}})))
	rev = f.push(t)
	f.inSync(t, 1, rev)
	c = e.client.Config()
	if got := c.Clusters["out/shop/s1/80"].Localities[0].Cluster; got != "us-1" {
		t.Errorf("the cluster leads to %s", got)
	}
	if before.Clusters["out/shop/s1/80"].Localities[0].Cluster != "eu-2" {
		t.Error("a Config that was handed out has changed")
	}
	if c.Listeners["imp/shop/s1/80"] != l || e.count() != updates+1 {
		t.Errorf("more than the cluster has changed, in %d updates", e.count()-updates)
	}

	f.RemoveImport(federation.ServiceID{Namespace: "shop", Name: "s1"}, 80)
	f.inSync(t, 1, f.push(t))
	c = e.client.Config()
	if c.Listeners["imp/shop/s1/80"] != nil || c.Clusters["out/shop/s1/80"] != nil {
		t.Errorf("a removed import is still there: %v %v", c.Listeners, c.Clusters)
	}
	// The listener went before its cluster did.
	for _, u := range e.updates {
		for name, l := range u.Config.Listeners {
			if l.Kind == ImportListener && u.Config.Clusters[l.Forward.Cluster] == nil {
				t.Errorf("%s was there without its cluster", name)
			}
		}
	}
}

// TestReconnect: a proxy that comes back, to the same server or to another one
// with the same content, is sent nothing again.
func TestReconnect(t *testing.T) {
	f := newFixture(t)
	for n := range 20 {
		must(t, f.SetImport(serviceImport(n)))
	}
	rev := f.push(t)
	e := f.client(t, nil)
	f.inSync(t, 1, rev)
	updates := e.count()
	config := e.client.Config()

	f.stop()
	eventually(t, "the stream is gone", func() error {
		if n := len(f.server.Streams()); n != 0 {
			return fmt.Errorf("%d streams", n)
		}
		return nil
	})
	// A new process: another server, and the same resources in another order.
	f.server = NewServer(f.server.cfg)
	d := Delta{Changed: f.Resources()}
	slices.Reverse(d.Changed)
	f.listen(t)
	eventually(t, "the client is back", func() error {
		if n := len(f.server.Streams()); n != 1 {
			return fmt.Errorf("%d streams", n)
		}
		return nil
	})
	// The view is not complete yet: the client keeps what it has.
	if c := e.client.Config(); len(c.Listeners) != len(config.Listeners) {
		t.Fatalf("a server without a view has removed listeners: %v", c.Listeners)
	}
	rev = f.set(d)
	f.inSync(t, 1, rev)
	if n := e.count() - updates; n != 0 {
		t.Errorf("%d updates after a reconnect that changed nothing: %+v", n, e.updates[updates:])
	}

	// What changed and what was removed meanwhile is all that comes.
	f.stop()
	f.server = NewServer(f.server.cfg)
	f.listen(t)
	f.RemoveImport(serviceImport(3).Plan.Service, 80)
	must(t, f.SetImport(Import{Listen: serviceImport(5).Listen, Plan: federation.Plan{Service: serviceImport(5).Plan.Service}, Candidates: serviceImport(5).Candidates}))
	rev = f.set(Delta{Changed: f.Resources()})
	f.inSync(t, 1, rev)
	var changed []string
	for _, u := range e.updates[updates:] {
		changed = append(changed, u.Clusters...)
		changed = append(changed, u.Listeners...)
	}
	slices.Sort(changed)
	changed = slices.Compact(changed)
	if want := []string{"imp/shop/s3/80", "out/shop/s3/80", "out/shop/s5/80"}; !slices.Equal(changed, want) {
		t.Errorf("changed after a reconnect: %v, want %v", changed, want)
	}
	if got := e.client.Config().Clusters["out/shop/s5/80"].Localities; len(got) != 0 {
		t.Errorf("endpoints that were withdrawn are still there: %v", got)
	}
}

// TestRefusal: what the engine or the reader refuses is known to the server by
// name; the last good version stays, and everything else goes on.
func TestRefusal(t *testing.T) {
	f := newFixture(t)
	for n := range 40 {
		must(t, f.SetImport(serviceImport(n)))
	}
	var mu sync.Mutex
	bad := "imp/shop/s7/80"
	e := f.client(t, func(u *Update) []Refusal {
		mu.Lock()
		defer mu.Unlock()
		if slices.Contains(u.Listeners, bad) {
			return []Refusal{{Name: Name{TypeListener, bad}, Reason: "address in use"}}
		}
		return nil
	})
	rev := f.push(t)
	eventually(t, "the refusal is known", func() error {
		s := f.server.Streams()
		if len(s) != 1 || len(s[0].Rejected) != 1 {
			return fmt.Errorf("%+v", s)
		}
		r := s[0].Rejected[0]
		if r.Name != (Name{TypeListener, bad}) || !strings.Contains(r.Cause, "address in use") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if s := f.server.Streams()[0]; s.InSync || s.Applied == rev {
		t.Errorf("a stream that refused a resource has applied everything: %+v", s)
	}
	c := e.client.Config()
	if c.Listeners[bad] != nil || len(c.Listeners) != 39+2 {
		t.Errorf("%d listeners, the refused one: %v", len(c.Listeners), c.Listeners[bad])
	}
	// Another service goes on changing.
	must(t, f.SetImport(serviceImport(100)))
	f.push(t)
	eventually(t, "another service arrives", func() error {
		if e.client.Config().Listeners["imp/shop/s100/80"] == nil {
			return errors.New("not yet")
		}
		return nil
	})
	// A version that can be used mends it.
	mu.Lock()
	bad = ""
	mu.Unlock()
	i := serviceImport(7)
	i.Listen = netip.MustParseAddrPort("127.2.2.2:80")
	must(t, f.SetImport(i))
	f.inSync(t, 1, f.push(t))
	if got := e.client.Config().Listeners["imp/shop/s7/80"].Addr; got != i.Listen {
		t.Errorf("the mended listener is at %s", got)
	}
	eventually(t, "OnNack hears of one refusal", func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.nacks) != 1 {
			return fmt.Errorf("%d nacks: %+v", len(f.nacks), f.nacks)
		}
		return nil
	})
}

// TestUnreadable: one resource of many that the engine cannot carry out.
func TestUnreadable(t *testing.T) {
	f := newFixture(t)
	for n := range 10 {
		must(t, f.SetImport(serviceImport(n)))
	}
	d, err := f.Take()
	must(t, err)
	for i, r := range d.Changed {
		if r.Name == (Name{TypeCluster, "out/shop/s4/80"}) {
			var c clusterv3.Cluster
			must(t, proto.Unmarshal(r.Body, &c))
			c.LbPolicy = clusterv3.Cluster_MAGLEV
			d.Changed[i], err = new(encoder).resource(TypeCluster, r.Name.Name, &c)
			must(t, err)
		}
	}
	e := f.client(t, nil)
	f.set(d)
	eventually(t, "the refusal is known", func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.nacks) != 1 {
			return fmt.Errorf("%+v", f.nacks)
		}
		n := f.nacks[0]
		if n.Name != (Name{TypeCluster, "out/shop/s4/80"}) || !strings.Contains(n.Cause, "lb_policy") {
			return fmt.Errorf("%+v", n)
		}
		return nil
	})
	eventually(t, "the others are there", func() error {
		if n := len(e.client.Config().Clusters); n != 9 {
			return fmt.Errorf("%d clusters", n)
		}
		if n := len(e.client.Config().Listeners); n != 12 {
			return fmt.Errorf("%d listeners", n)
		}
		return nil
	})
}

// TestManyStreams: 500 streams follow a change, and one that does not read
// holds up nobody.
func TestManyStreams(t *testing.T) {
	f := newFixture(t)
	for n := range 10 {
		must(t, f.SetImport(serviceImport(n)))
	}
	rev := f.push(t)
	const streams = 500
	f.follow(t, streams)
	f.inSync(t, streams, rev)
	stuck := f.raw(t)
	stuck.ask(TypeCluster)
	first := stuck.recv()
	for n := range 10 {
		must(t, f.SetImport(serviceImport(1000+n)))
		rev = f.push(t)
	}
	eventually(t, "everyone but the one has applied the last change", func() error {
		done, behind := 0, 0
		for _, s := range f.server.Streams() {
			if s.InSync && s.Applied == rev {
				done++
			} else {
				behind++
			}
		}
		if done != streams || behind != 1 {
			return fmt.Errorf("%d have, %d have not", done, behind)
		}
		return nil
	})
	// The one gets, when it answers, all that it missed in one response.
	stuck.ack(first)
	if got := len(stuck.recv().GetResources()); got != 10 {
		t.Errorf("the slow stream got %d resources in one response, want 10", got)
	}
}

// response holds those resources that are of type t.
func response(t Type, resources []*Resource) *discoveryv3.DeltaDiscoveryResponse {
	m := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: t.url()}
	for _, r := range resources {
		if r.Type == t {
			m.Resources = append(m.Resources, wire(r))
		}
	}
	return m
}
