package gateway

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/weftmesh/weft/xds"
)

// TestSharesAreExact follows a plan of 700, 250 and 50 per mille through three
// real gateways: every 1,000 connections follow it one by one.
func TestSharesAreExact(t *testing.T) {
	m := newMesh(t)
	// On a crowded machine a candidate may be late; whoever is late is passed
	// over, and that is not what is counted here.
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).patient().start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).patient().start()
	d := m.gateway("d").serves(payments, greeter(t, "d").addr).patient().start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 700), to(c, 0, 250), to(d, 0, 50))
	a.patient().start()
	for round := range 2 {
		var mu sync.Mutex
		got := map[string]int{}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				for range 100 {
					who, err := ask(t, addr)
					if err != nil {
						t.Errorf("connection: %v", err)
					}
					mu.Lock()
					got[who]++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if got["b"] != 700 || got["c"] != 250 || got["d"] != 50 {
			t.Errorf("round %d: %v", round, got)
		}
	}
	eventually(t, "records", func() bool { return a.metric("weft_gateway_connections_total", "out", "yes", "served") == 2000 })
	r, _ := a.lastRecord()
	if r.Service != payments || r.Revision != "1/7" || r.Tier != 0 || r.Attempts != 1 || !strings.HasPrefix(r.Peer, "spiffe://mesh.example/cluster/") || r.Endpoint == "" || !strings.HasPrefix(r.Decision, "default;tier=0") || r.Received == 0 {
		t.Errorf("record at the source: %+v", r)
	}
	r = b.record("a record at the far side", func(Record) bool { return true })
	if r.From != "a" || r.Peer != m.id(gatewayPath("a")) || r.Service != payments || r.Cluster != "b" || !r.Cross() || r.Revision != "1/7" || r.End == "" {
		t.Errorf("record at the far side: %+v", r)
	}
}

// TestNoConnectionFailsAsBackendsGo: first one of two pods, then the cluster's
// last pod, its gateway refusing; then a gateway that is gone altogether.
func TestNoConnectionFailsAsBackendsGo(t *testing.T) {
	m := newMesh(t)
	b1, b2 := greeter(t, "b"), greeter(t, "b")
	b := m.gateway("b").serves(payments, b1.addr, b2.addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	d := m.gateway("d").serves(payments, greeter(t, "d").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000), to(c, 1, 1000), to(d, 2, 1000))
	a.start()
	expect := func(when, want string) {
		t.Helper()
		for range 40 {
			if who, err := ask(t, addr); err != nil || who != want {
				t.Fatalf("%s: %q, %v; want %s", when, who, err, want)
			}
		}
	}
	expect("steady", "b")
	b1.l.Close()
	expect("one pod is gone", "b")
	if n := a.metric("weft_gateway_ejections_total"); n != 0 {
		t.Errorf("one dead pod ejected its gateway")
	}
	b2.l.Close()
	expect("both pods are gone", "c")
	if n := a.metric("weft_gateway_attempts_total", "refused"); n != 3 {
		t.Errorf("%v refusals until the gateway was set aside, want 3", n)
	}
	c.Close()
	expect("a gateway is gone", "d")
}

// TestCandidatesThatFailInEveryWay puts one bad gateway first: each connection
// goes to the next tier, and the bad one is set aside.
func TestCandidatesThatFailInEveryWay(t *testing.T) {
	cases := map[string]func(t *testing.T, m *mesh) backendOf{
		"refuses the connection": func(t *testing.T, _ *mesh) backendOf {
			return backendOf{cluster: "b", addrs: []netip.AddrPort{freeAddr(t)}}
		},
		"resets the connection": func(t *testing.T, _ *mesh) backendOf {
			s := serve(t, hangUp)
			return backendOf{cluster: "b", addrs: []netip.AddrPort{s.addr}}
		},
		"says nothing": func(t *testing.T, _ *mesh) backendOf {
			s := serve(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
			return backendOf{cluster: "b", addrs: []netip.AddrPort{s.addr}}
		},
		"speaks no TLS": func(t *testing.T, _ *mesh) backendOf {
			s := serve(t, func(c *net.TCPConn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n") })
			return backendOf{cluster: "b", addrs: []netip.AddrPort{s.addr}}
		},
		"is someone else": func(t *testing.T, m *mesh) backendOf {
			d := m.gateway("d")
			d.config.Listeners["east-west"].Chains[0].ServerNames = []string{xds.TerminateName("b")}
			d.serves(payments, greeter(t, "d").addr).start()
			return backendOf{cluster: "b", addrs: []netip.AddrPort{d.addr}}
		},
		"does not know the service": func(t *testing.T, m *mesh) backendOf {
			return to(m.gateway("b").start(), 0, 0)
		},
		"admits us no more": func(t *testing.T, m *mesh) backendOf {
			b := m.gateway("b")
			b.config.Trust[xds.SecretPeers] = &xds.Trust{SANs: []xds.Match{{Exact: m.id(gatewayPath("d"))}}}
			return to(b.serves(payments, greeter(t, "b").addr).start(), 0, 0)
		},
		"has a backend that breaks at once": func(t *testing.T, m *mesh) backendOf {
			s := serve(t, hangUp)
			return to(m.gateway("b").serves(payments, s.addr).start(), 0, 0)
		},
		"has no such TLS here": func(t *testing.T, m *mesh) backendOf {
			b := to(m.gateway("b").serves(payments, greeter(t, "b").addr).start(), 0, 0)
			return b
		},
	}
	for name, bad := range cases {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t)
			c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
			first := bad(t, m)
			first.tier, first.share = 0, 1000
			a := m.gateway("a")
			addr := a.imports(payments, first, to(c, 1, 1000))
			if name == "has no such TLS here" {
				delete(a.config.Clusters["out/"+payments].TLS, "t/b")
			}
			a.start()
			for i := range 6 {
				if who, err := ask(t, addr); err != nil || who != "c" {
					t.Fatalf("connection %d: %q, %v", i, who, err)
				}
			}
			if n := a.metric("weft_gateway_ejections_total"); n != 1 {
				t.Errorf("%v ejections, want 1", n)
			}
		})
	}
}

// TestPodThatBreaksIsSetAsideByItsGateway: at the gateway in front of it,
// and its gateway is not: the other pods serve.
func TestPodThatBreaksIsSetAsideByItsGateway(t *testing.T) {
	m := newMesh(t)
	bad, good := serve(t, hangUp), greeter(t, "b")
	b := m.gateway("b").serves(payments, bad.addr, good.addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000), to(c, 1, 1000))
	a.start()
	eventually(t, "the pod is set aside", func() bool {
		if _, err := ask(t, addr); err != nil {
			t.Fatalf("while the pod is found out: %v", err)
		}
		return b.metric("weft_gateway_ejections_total") == 1
	})
	before := bad.accepts.Load()
	for range 20 {
		if who, err := ask(t, addr); who != "b" || err != nil {
			t.Fatalf("%q, %v", who, err)
		}
	}
	if n := bad.accepts.Load(); n != before {
		t.Errorf("the pod that is set aside got %d connections", n-before)
	}
	if n := a.metric("weft_gateway_ejections_total"); n != 0 {
		t.Errorf("%v ejections at the source, want none", n)
	}
}

func TestNobodyServes(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000))
	a.start()
	if _, err := ask(t, addr); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset: an empty answer would be a lie", err)
	}
	r := a.record("the record", func(Record) bool { return true })
	if r.Connected || !strings.Contains(r.End, "404") || r.Attempts != 5 {
		t.Errorf("%+v", r)
	}
	a.update(func(c *xds.Config) { delete(c.Clusters, "out/"+payments) })
	if _, err := ask(t, addr); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("without a cluster: %v", err)
	}
}

// TestHalfCloseAndServerFirst goes through both gateways with protocols that
// end one direction early.
func TestHalfCloseAndServerFirst(t *testing.T) {
	m := newMesh(t)
	sum := serve(t, func(c *net.TCPConn) { // answers when the question is complete
		b, _ := io.ReadAll(c)
		io.WriteString(c, strings.ToUpper(string(b)))
	})
	shout := serve(t, func(c *net.TCPConn) { // says all, then listens
		io.WriteString(c, "ready")
		c.CloseWrite()
		b, err := io.ReadAll(c)
		if string(b) != "thanks" || err != nil {
			t.Errorf("after the server's end: %q, %v", b, err)
		}
	})
	b := m.gateway("b").serves("sum", sum.addr).serves("shout", shout.addr).start()
	a := m.gateway("a")
	sumAddr := a.imports("sum", to(b, 0, 1000))
	shoutAddr := a.imports("shout", to(b, 0, 1000))
	a.start()

	c := dial(t, sumAddr)
	io.WriteString(c, "warp and weft")
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "WARP AND WEFT" || err != nil {
		t.Errorf("client first: %q, %v", b, err)
	}
	c = dial(t, shoutAddr)
	if b, err := io.ReadAll(c); string(b) != "ready" || err != nil {
		t.Errorf("server first: %q, %v", b, err)
	}
	io.WriteString(c, "thanks")
	c.CloseWrite()
	r := a.record("the record", func(r Record) bool { return r.Service == "shout" })
	if r.Sent != 6 || r.Received != 5 || r.End != "backend closed" {
		t.Errorf("%+v", r)
	}
}

// TestOwnEndpointsNeedNoTunnel: a plan's local tier is dialled.
func TestOwnEndpointsNeedNoTunnel(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	a := m.gateway("a")
	own := greeter(t, "a")
	a.serves(payments, own.addr)
	a.config.Routes["local"] = &xds.RouteTable{Name: "local", Open: true, Routes: a.config.Routes["east-west"].Routes}
	a.config.Listeners["local"] = &xds.Listener{Name: "local", Kind: xds.LocalListener, Pipe: "/nonexistent/local.sock", Local: &xds.Terminate{Routes: "local"}}
	addr := a.imports(payments, to(b, 1, 1000))
	out := a.config.Clusters["out/"+payments]
	out.TLS["local"] = nil
	out.Localities = append([]*xds.Locality{{Cluster: "a", Weight: 1000, Endpoints: []*xds.Endpoint{{Pipe: "/nonexistent/local.sock", TLS: "local"}}}}, out.Localities...)
	a.start()
	for range 5 {
		if who, err := ask(t, addr); who != "a" || err != nil {
			t.Fatalf("%q, %v", who, err)
		}
	}
	r := a.record("the record", func(Record) bool { return true })
	if r.Cross() || r.Endpoint == "" || r.Gateway.IsValid() {
		t.Errorf("%+v", r)
	}
	own.l.Close()
	for range 10 {
		if who, err := ask(t, addr); who != "b" || err != nil {
			t.Fatalf("without own endpoints: %q, %v", who, err)
		}
	}
}

// TestPassthroughEndsAtTheProxy sends a tunnel through a gateway that only
// reads its name, to the proxy beside the workload.
func TestPassthroughEndsAtTheProxy(t *testing.T) {
	m := newMesh(t)
	const workload = "/cluster/b/ns/shop/sa/payments"
	proxy := m.engine("b", workload)
	proxy.addr = freeAddr(t)
	name := xds.PassthroughName("b", serviceID(), 80)
	proxy.config.Listeners["inbound"] = &xds.Listener{
		Name: "inbound", Kind: xds.InboundListener, Addr: proxy.addr,
		Chains: []*xds.Chain{{Name: name, ServerNames: []string{name}, ALPN: []string{xds.ALPN}, Terminate: terminate("inbound")}},
	}
	proxy.config.Routes["inbound"] = &xds.RouteTable{
		Name: "inbound", Peers: []xds.Peer{{SAN: xds.Match{Exact: m.id(gatewayPath("a"))}}},
		Routes: map[string]*xds.Route{payments: {Authority: payments, Cluster: "in", Attempts: 2}},
	}
	proxy.config.Clusters["in"] = ownCluster("in", greeter(t, "workload").addr)
	proxy.start()

	b := m.gateway("b")
	b.config.Clusters["pass"] = ownCluster("pass", proxy.addr)
	l := b.config.Listeners["east-west"]
	l.Chains = append(l.Chains, &xds.Chain{Name: name, ServerNames: []string{name}, ALPN: []string{xds.ALPN}, Passthrough: &xds.Forward{Cluster: "pass", Attempts: 3}})
	b.start()

	a := m.gateway("a")
	addr := a.imports(payments, backendOf{cluster: "b", addrs: []netip.AddrPort{b.addr}, share: 1000, sni: name, server: m.id(workload)})
	a.start()
	for range 3 {
		if who, err := ask(t, addr); who != "workload" || err != nil {
			t.Fatalf("%q, %v", who, err)
		}
	}
	if r := a.record("the source's record", func(Record) bool { return true }); r.Peer != m.id(workload) {
		t.Errorf("the source's peer is %s", r.Peer)
	}
	if r := proxy.record("the proxy's record", func(Record) bool { return true }); r.Peer != m.id(gatewayPath("a")) || r.From != "a" {
		t.Errorf("the proxy's record: %+v", r)
	}
	a.Close()
	if r := b.record("the gateway's record", func(Record) bool { return true }); r.Direction != Through || r.Service != strings.ToLower(name) || r.Peer != "" {
		t.Errorf("the gateway's record: %+v", r)
	}
}

// TestBusyPortIsRefusedByName: one bad listener stops nothing else, and comes
// up when it can.
func TestBusyPortIsRefusedByName(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).serves("other", greeter(t, "b").addr).start()
	a := m.gateway("a")
	busy := serve(t, func(*net.TCPConn) {})
	good := a.imports(payments, to(b, 0, 1000))
	a.imports("other", to(b, 0, 1000))
	moved := *a.config.Listeners["imp/other"]
	moved.Addr = busy.addr
	a.config.Listeners["imp/other"] = &moved
	refused := a.update(func(*xds.Config) {})
	if len(refused) != 1 || refused[0].Name.Name != "imp/other" || !strings.Contains(refused[0].Reason, "free?") {
		t.Fatalf("refused: %v", refused)
	}
	if who, err := ask(t, good); who != "b" || err != nil {
		t.Errorf("the good one: %q, %v", who, err)
	}
}
