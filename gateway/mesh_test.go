package gateway

import (
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const payments = "payments.shop.svc.clusterset.local:80"

// mesh is a trust domain with engines in it, all in this process.
type mesh struct {
	t       testing.TB
	td      spiffeid.TrustDomain
	region  *identity.Authority
	bundle  *identity.Bundle
	clients []federation.ClusterID // whom gateways admit
}

func newMesh(t testing.TB) *mesh {
	t.Helper()
	m := &mesh{t: t, td: spiffeid.RequireTrustDomainFromString("mesh.example"), clients: []federation.ClusterID{"a", "b", "c", "d"}}
	now, life := time.Now(), identity.DefaultLifetimes()
	root, err := identity.NewRoot(m.td, life, now)
	m.check(err)
	m.region, err = root.NewRegion("eu", life, now)
	m.check(err)
	m.bundle, err = identity.NewBundle(m.td, 1, []*x509.Certificate{root.Root()})
	m.check(err)
	return m
}

func (m *mesh) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// svid is a fresh identity's, and a source of itself.
func (m *mesh) svid(path string) *x509svid.SVID {
	m.t.Helper()
	id := spiffeid.RequireFromPath(m.td, path)
	key, err := identity.NewKey()
	m.check(err)
	chain, err := m.region.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, identity.DefaultLifetimes(), time.Now())
	m.check(err)
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

func gatewayPath(c federation.ClusterID) string { return "/cluster/" + string(c) + "/gateway" }

func (m *mesh) id(path string) string { return "spiffe://" + m.td.Name() + path }

// trust is what agents tell of whom to believe.
func (m *mesh) trust() map[string]*xds.Trust {
	peers := &xds.Trust{Name: xds.SecretPeers, Roots: m.bundle.Roots(), SANs: []xds.Match{}}
	for _, c := range m.clients {
		peers.SANs = append(peers.SANs, xds.Match{Exact: m.id(gatewayPath(c))}, xds.Match{Prefix: m.id("/cluster/" + string(c) + "/ns/")})
	}
	return map[string]*xds.Trust{
		xds.SecretBundle: {Name: xds.SecretBundle, Roots: m.bundle.Roots()},
		xds.SecretPeers:  peers,
	}
}

// node is one engine with what its agent would tell it.
type node struct {
	*Engine
	m        *mesh
	cluster  federation.ClusterID
	addr     netip.AddrPort // east-west, or inbound
	config   *xds.Config
	registry *prometheus.Registry
	denials  *identity.Denials
	mu       sync.Mutex
	records  []Record
}

// freeAddr is an address that nobody listens on, now or soon: it is on a
// loopback address of its own, whose ports no outgoing connection takes.
func freeAddr(t testing.TB) netip.AddrPort {
	t.Helper()
	own := netip.AddrFrom4([4]byte{127, byte(1 + rand.IntN(250)), byte(rand.IntN(256)), byte(1 + rand.IntN(250))})
	l, err := net.Listen("tcp", netip.AddrPortFrom(own, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func (m *mesh) engine(c federation.ClusterID, path string, adjust ...func(*Config)) *node {
	m.t.Helper()
	n := &node{m: m, cluster: c, registry: prometheus.NewRegistry(), denials: new(identity.Denials)}
	config := Config{
		Cluster: c, SVID: m.svid(path), Clock: clock.Real(), Metrics: n.registry,
		Verifier: identity.NewVerifier(identity.VerifierConfig{Clock: clock.Real(), Mesh: m.bundle, Denials: n.denials}),
		Log:      slog.New(slog.NewTextHandler(&testLog{t: m.t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("cluster", string(c)),
		Access: func(r Record) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.records = append(n.records, r)
		},
	}
	for _, f := range adjust {
		f(&config)
	}
	var err error
	n.Engine, err = New(config)
	m.check(err)
	m.t.Cleanup(n.Close)
	n.config = &xds.Config{
		Listeners: map[string]*xds.Listener{}, Clusters: map[string]*xds.Cluster{},
		Routes: map[string]*xds.RouteTable{}, Trust: m.trust(),
	}
	return n
}

// gateway is a cluster's gateway with an east-west listener.
func (m *mesh) gateway(c federation.ClusterID, adjust ...func(*Config)) *node {
	m.t.Helper()
	n := m.engine(c, gatewayPath(c), adjust...)
	n.addr = freeAddr(m.t)
	table := &xds.RouteTable{Name: "east-west", Routes: map[string]*xds.Route{}}
	for _, c := range m.clients {
		table.Peers = append(table.Peers, xds.Peer{
			SAN:     xds.Match{Exact: m.id(gatewayPath(c))},
			Asserts: m.id("/cluster/" + string(c) + "/"),
		})
	}
	n.config.Routes["east-west"] = table
	n.config.Listeners["east-west"] = &xds.Listener{
		Name: "east-west", Kind: xds.EastWestListener, Addr: n.addr, HelloTimeout: 2 * time.Second,
		Chains: []*xds.Chain{{
			Name: string(c) + ".t.weft", ServerNames: []string{xds.TerminateName(c)}, ALPN: []string{xds.ALPN},
			Terminate: terminate("east-west"),
		}},
	}
	return n
}

func terminate(routes string) *xds.Terminate {
	return &xds.Terminate{
		TLS:    &xds.ServerTLS{Certificate: xds.SecretLeaf, Trust: xds.SecretPeers, ALPN: []string{xds.ALPN}},
		Routes: routes,
	}
}

// update has n take over a changed copy of its configuration.
func (n *node) update(change func(c *xds.Config)) []xds.Refusal {
	n.m.t.Helper()
	old := n.config
	next := &xds.Config{
		Listeners: maps.Clone(old.Listeners), Clusters: maps.Clone(old.Clusters),
		Routes: maps.Clone(old.Routes), Trust: maps.Clone(old.Trust),
	}
	change(next)
	u := &xds.Update{Config: next, Previous: n.Engine.config.Load()}
	u.Listeners = changed(u.Previous.Listeners, next.Listeners)
	u.Clusters = changed(u.Previous.Clusters, next.Clusters)
	u.Routes = changed(u.Previous.Routes, next.Routes)
	u.Trust = changed(u.Previous.Trust, next.Trust)
	n.config = next
	return n.Apply(u)
}

// start applies what was set up so far.
func (n *node) start() *node {
	n.m.t.Helper()
	for _, r := range n.update(func(*xds.Config) {}) {
		n.m.t.Fatalf("refused: %v", r)
	}
	return n
}

func changed[T any](old, next map[string]*T) (names []string) {
	for name := range next {
		if old[name] != next[name] {
			names = append(names, name)
		}
	}
	for name := range old {
		if next[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

var ejection = xds.Ejection{Failures: 3, BaseTime: 5 * time.Second, MaxTime: 30 * time.Second}

// serves makes n serve an authority from its own endpoints.
func (n *node) serves(authority string, endpoints ...netip.AddrPort) *node {
	name := "in/" + authority
	n.config.Clusters[name] = ownCluster(name, endpoints...)
	table := n.config.Routes["east-west"]
	table.Routes[authority] = &xds.Route{Authority: authority, Cluster: name, Attempts: 3}
	return n
}

// patient waits as long as it takes for whoever is slow to answer.
func (n *node) patient() *node {
	for _, c := range n.config.Clusters {
		c.ConnectTimeout = time.Minute
	}
	return n
}

func ownCluster(name string, endpoints ...netip.AddrPort) *xds.Cluster {
	l := &xds.Locality{}
	for _, ep := range endpoints {
		l.Endpoints = append(l.Endpoints, &xds.Endpoint{Addr: ep})
	}
	return &xds.Cluster{Name: name, ConnectTimeout: 250 * time.Millisecond, Ejection: ejection, Localities: []*xds.Locality{l}}
}

// backend is one cluster's part in a plan.
type backendOf struct {
	cluster federation.ClusterID
	addrs   []netip.AddrPort
	tier    int
	share   int
	sni     string // default: that of a gateway that ends tunnels
	server  string // default: the gateway's identity
}

// imports makes n carry an authority to clusters; the address is the listener's.
func (n *node) imports(authority string, backends ...backendOf) netip.AddrPort {
	addr := freeAddr(n.m.t)
	n.config.Listeners["imp/"+authority] = &xds.Listener{
		Name: "imp/" + authority, Kind: xds.ImportListener, Addr: addr,
		Forward: &xds.Forward{
			Cluster: "out/" + authority, Attempts: 5, BackoffMin: 5 * time.Millisecond, BackoffMax: 10 * time.Millisecond,
			Tunnel: &xds.Tunnel{Authority: authority, Headers: []xds.Header{
				{Name: xds.HeaderSource, Value: string(n.cluster)},
				{Name: xds.HeaderRevision, EndpointKey: xds.LabelRevision},
				{Name: xds.HeaderDecision, EndpointKey: xds.LabelDecision},
			}},
		},
	}
	n.config.Clusters["out/"+authority] = n.m.outCluster("out/"+authority, backends...)
	return addr
}

func (m *mesh) outCluster(name string, backends ...backendOf) *xds.Cluster {
	c := &xds.Cluster{
		Name: name, ConnectTimeout: time.Second, Ejection: ejection,
		Tunnels: &xds.Tunnels{HTTP2: xds.HTTP2{MaxStreams: 64, PingTimeout: 3 * time.Second}, IdleTimeout: time.Minute},
		TLS:     map[string]*xds.ClientTLS{},
	}
	for _, b := range backends {
		key := "t/" + string(b.cluster)
		sni, server := xds.TerminateName(b.cluster), m.id(gatewayPath(b.cluster))
		if b.sni != "" {
			key, sni, server = "p/"+string(b.cluster), b.sni, b.server
		}
		c.TLS[key] = &xds.ClientTLS{SNI: sni, ALPN: []string{xds.ALPN}, Certificate: xds.SecretLeaf, Trust: xds.SecretBundle, SANs: []string{server}}
		l := &xds.Locality{Cluster: b.cluster, Priority: b.tier, Weight: b.share}
		for _, a := range b.addrs {
			l.Endpoints = append(l.Endpoints, &xds.Endpoint{Addr: a, TLS: key, Labels: map[string]string{
				xds.LabelCluster: string(b.cluster), xds.LabelRevision: "1/7",
				xds.LabelDecision: fmt.Sprintf("default;tier=%d;share=%d", b.tier, b.share),
			}})
		}
		c.Localities = append(c.Localities, l)
	}
	return c
}

// to is a plan's backend for a gateway of this test.
func to(n *node, tier, share int) backendOf {
	return backendOf{cluster: n.cluster, addrs: []netip.AddrPort{n.addr}, tier: tier, share: share}
}

// server is a TCP service.
type server struct {
	addr    netip.AddrPort
	accepts atomic.Int64
	l       net.Listener
}

// serve runs a service until the test's end; each connection is handled by f
// and closed when f returns.
func serve(t testing.TB, f func(c *net.TCPConn)) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().(*net.TCPAddr).AddrPort(), l: l}
	var wg sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.accepts.Add(1)
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			wg.Go(func() {
				f(c.(*net.TCPConn))
				c.Close()
				mu.Lock()
				delete(conns, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return s
}

// greeter speaks first: its name, then an echo of what comes.
func greeter(t testing.TB, name string) *server {
	return serve(t, func(c *net.TCPConn) {
		io.WriteString(c, name+"\n")
		io.Copy(c, struct{ io.Reader }{c})
	})
}

func dial(t testing.TB, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// line reads up to a newline, byte by byte so that nothing more is taken.
func line(c net.Conn) (string, error) {
	var b strings.Builder
	var one [1]byte
	for {
		if _, err := c.Read(one[:]); err != nil {
			return b.String(), err
		}
		if one[0] == '\n' {
			return b.String(), nil
		}
		b.WriteByte(one[0])
	}
}

// ask is one connection: who greets?
func ask(t testing.TB, addr netip.AddrPort) (string, error) {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return line(c)
}

func (n *node) lastRecord() (r Record, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.records) == 0 {
		return Record{}, false
	}
	return n.records[len(n.records)-1], true
}

// record waits for one that f likes.
func (n *node) record(what string, f func(Record) bool) (found Record) {
	n.m.t.Helper()
	eventually(n.m.t, what, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		i := slices.IndexFunc(n.records, f)
		if i >= 0 {
			found = n.records[i]
		}
		return i >= 0
	})
	return found
}

// metric sums a metric over the labels that hold all of the given values.
func (n *node) metric(name string, values ...string) (sum float64) {
	n.m.t.Helper()
	families, err := n.registry.Gather()
	n.m.check(err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]bool{}
			for _, l := range m.GetLabel() {
				have[l.GetValue()] = true
			}
			if !slices.ContainsFunc(values, func(v string) bool { return !have[v] }) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: never", what)
		}
	}
}

// testLog writes to the test's log while the test runs.
type testLog struct{ t testing.TB }

func (l *testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

func serviceID() federation.ServiceID {
	return federation.ServiceID{Namespace: "shop", Name: "payments"}
}
