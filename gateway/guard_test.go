package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// guarded is a gateway that serves one service to cluster a, with a look at
// whether anything reached the backend.
func guarded(t *testing.T) (*mesh, *node, *server) {
	m := newMesh(t)
	s := greeter(t, "b")
	b := m.gateway("b").serves(payments, s.addr)
	b.config.Listeners["east-west"].HelloTimeout = 200 * time.Millisecond
	return m, b.start(), s
}

// rawTunnel opens a tunnel to n as an identity, with whatever name and protocol.
func rawTunnel(m *mesh, n *node, path, sni string, protos ...string) (*tunnel.Tunnel, error) {
	v := identity.NewVerifier(identity.VerifierConfig{Clock: n.clock, Mesh: m.bundle})
	config := v.Client(identity.ClientConfig{SVID: m.svid(path), Authorize: identity.AllowAny()})
	config.NextProtos, config.ServerName = protos, sni
	c, err := net.Dial("tcp", n.addr.String())
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	tc := tls.Client(tunnel.NewWire(c), config)
	if err := tc.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	t := tunnel.Client(tc, tunnel.Config{})
	select {
	case <-t.Settled():
		m.t.Cleanup(func() { t.Close() })
		return t, nil
	case <-t.Done():
		return nil, t.Err()
	}
}

// TestWhatIsNotATunnelIsClosed: plain bytes, silence, unknown and absent names,
// other protocols. Nothing comes back, nothing reaches a backend, each is
// counted by its reason.
func TestWhatIsNotATunnelIsClosed(t *testing.T) {
	m, b, s := guarded(t)
	plain := func(bytes string) func() error {
		return func() error {
			c := dial(t, b.addr)
			io.WriteString(c, bytes)
			got, err := io.ReadAll(c)
			if len(got) > 0 {
				t.Errorf("%d bytes came back: %q", len(got), got)
			}
			if err == nil {
				return errors.New("closed")
			}
			return err
		}
	}
	shake := func(sni string, protos ...string) func() error {
		return func() error {
			_, err := rawTunnel(m, b, gatewayPath("a"), sni, protos...)
			return err
		}
	}
	for reason, do := range map[string]func() error{
		"plain bytes":     plain("GET / HTTP/1.1\r\nHost: payments\r\n\r\n"),
		"silence":         plain(""),
		"malformed hello": plain("\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00"),
		"unknown name":    shake("c.t.weft", xds.ALPN),
		"no server name":  shake("", xds.ALPN),
		"wrong protocol":  shake("b.t.weft", "h2"),
	} {
		t.Run(reason, func(t *testing.T) {
			if err := do(); err == nil {
				t.Error("it was let in")
			}
			eventually(t, "the count", func() bool { return b.metric("weft_gateway_unadmitted_total", reason) == 1 })
		})
	}
	if n := s.accepts.Load(); n != 0 {
		t.Errorf("%d connections reached the backend", n)
	}
	if _, err := rawTunnel(m, b, gatewayPath("a"), "B.T.weft", xds.ALPN); err != nil {
		t.Errorf("names do not mind case: %v", err)
	}
}

// TestPeersAreCheckedAtTheHandshake: who may open tunnels at all.
func TestPeersAreCheckedAtTheHandshake(t *testing.T) {
	m, b, s := guarded(t)
	for _, path := range []string{
		gatewayPath("z"),      // no member
		"/cluster/a/agent",    // a member's, but no gateway
		"/controller/one",     // of the mesh, but no peer of gateways
		"/cluster/ab/gateway", // a name that begins like another
	} {
		if _, err := rawTunnel(m, b, path, "b.t.weft", xds.ALPN); err == nil {
			t.Errorf("%s was let in", path)
		}
	}
	stranger := newMesh(t) // another root, the same names
	if _, err := rawTunnel(stranger, b, gatewayPath("a"), "b.t.weft", xds.ALPN); err == nil {
		t.Error("another authority's gateway was let in")
	}
	c := dial(t, b.addr)
	naked := tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: "b.t.weft", NextProtos: []string{xds.ALPN}})
	naked.Handshake() // in TLS 1.3 the client may hear of it later only
	if _, err := naked.Read(make([]byte, 1)); err == nil {
		t.Error("a client without a certificate was let in")
	}
	old := tls.Client(dial(t, b.addr), &tls.Config{InsecureSkipVerify: true, ServerName: "b.t.weft", NextProtos: []string{xds.ALPN}, MaxVersion: tls.VersionTLS12})
	if err := old.Handshake(); err == nil {
		t.Error("TLS 1.2 was spoken")
	}
	if n := s.accepts.Load(); n != 0 {
		t.Errorf("%d connections reached the backend", n)
	}
	if n := b.metric("weft_gateway_handshakes_total", "server", "failed"); n < 6 {
		t.Errorf("%v failed handshakes were counted", n)
	}
}

// TestStreamsAreAuthorisedOneByOne on a tunnel that is legitimate itself.
func TestStreamsAreAuthorisedOneByOne(t *testing.T) {
	m, b, s := guarded(t)
	narrow := greeter(t, "narrow")
	b.serves("narrow", narrow.addr)
	b.config.Routes["east-west"].Routes["narrow"].Callers = []xds.Match{{Exact: m.id(gatewayPath("c"))}}
	b.start()
	tun, err := rawTunnel(m, b, gatewayPath("a"), "b.t.weft", xds.ALPN)
	if err != nil {
		t.Fatal(err)
	}
	open := func(authority string, h ...tunnel.Field) int {
		s, _, err := tun.Open(t.Context(), tunnel.Request{Authority: authority, Header: h})
		var refusal *tunnel.Refusal
		switch {
		case err == nil:
			s.Close()
			return 200
		case errors.As(err, &refusal):
			if reason := refusal.Header.Get(xds.HeaderReason); reason == "" || strings.Contains(reason, "127.0.0.1") {
				t.Errorf("%s: reason %q", authority, reason)
			}
			return refusal.Status
		}
		t.Errorf("%s: %v", authority, err)
		return 0
	}
	caller := func(path string) tunnel.Field { return tunnel.Field{Name: xds.HeaderCaller, Value: m.id(path)} }
	for what, c := range map[string]struct{ got, want int }{
		"a caller of its own":      {open(payments, caller("/cluster/a/ns/web/sa/front")), 200},
		"no caller":                {open(payments), 200},
		"a foreign caller":         {open(payments, caller("/cluster/c/ns/web/sa/front")), 403},
		"a cluster that begins so": {open(payments, caller("/cluster/ab/ns/web/sa/front")), 403},
		"an operator":              {open(payments, caller("/operator/ann")), 403},
		"a caller of another mesh": {open(payments, tunnel.Field{Name: xds.HeaderCaller, Value: "spiffe://other/cluster/a/ns/w/sa/f"}), 403},
		"two callers":              {open(payments, caller("/cluster/a/ns/web/sa/front"), caller("/cluster/c/ns/web/sa/front")), 403},
		"a foreign source":         {open(payments, tunnel.Field{Name: xds.HeaderSource, Value: "c"}), 403},
		"an unknown authority":     {open("refunds.shop.svc.clusterset.local:80"), 404},
		"an internal cluster":      {open("in/" + payments), 404},
		"an address":               {open(s.addr.String()), 404},
		"a service for others":     {open("narrow"), 403},
	} {
		if c.got != c.want {
			t.Errorf("%s: status %d, want %d", what, c.got, c.want)
		}
	}
	if n := narrow.accepts.Load(); n != 0 {
		t.Errorf("%d connections reached a backend that was not allowed", n)
	}
	eventually(t, "the 2 that were allowed reach the backend", func() bool { return s.accepts.Load() >= 2 })
	if n := s.accepts.Load(); n != 2 {
		t.Errorf("%d connections reached the backend, want the 2 that were allowed", n)
	}
}

// TestChangesLeaveConnectionsAlone changes everything about a service while
// connections to it are open, at both ends.
func TestChangesLeaveConnectionsAlone(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000))
	a.start()
	conn := dial(t, addr)
	if who, err := line(conn); who != "b" || err != nil {
		t.Fatalf("%q, %v", who, err)
	}
	alive := func(after string) {
		t.Helper()
		io.WriteString(conn, after+"\n")
		if got, err := line(conn); got != after || err != nil {
			t.Fatalf("after %s: %q, %v", after, got, err)
		}
	}
	alive("nothing")
	a.update(func(x *xds.Config) {
		x.Clusters["out/"+payments] = m.outCluster("out/"+payments, to(b, 0, 1), to(c, 0, 999))
	})
	alive("a change of weights")
	a.update(func(x *xds.Config) { x.Clusters["out/"+payments] = m.outCluster("out/"+payments, to(c, 0, 1000)) })
	alive("the removal of its cluster from the plan")
	if who, err := ask(t, addr); who != "c" || err != nil {
		t.Errorf("a new connection: %q, %v", who, err)
	}
	b.update(func(x *xds.Config) { x.Clusters["in/"+payments] = ownCluster("in/" + payments) })
	alive("the removal of its endpoint")
	b.update(func(x *xds.Config) {
		delete(x.Clusters, "in/"+payments)
		x.Routes["east-west"] = &xds.RouteTable{Name: "east-west"}
	})
	alive("the end of the export")
	a.update(func(x *xds.Config) {
		delete(x.Clusters, "out/"+payments)
		delete(x.Listeners, "imp/"+payments)
	})
	alive("the end of the import")
	if _, err := ask(t, addr); err == nil {
		t.Error("the removed listener still listens")
	}
	b.update(func(x *xds.Config) { delete(x.Listeners, "east-west") })
	alive("the end of the east-west listener")
	b.update(func(x *xds.Config) { clear(x.Trust) })
	alive("the loss of the trust's resource")
	conn.CloseWrite()
	io.Copy(io.Discard, conn)
	eventually(t, "unused tunnels are gone", func() bool {
		return a.metric("weft_gateway_tunnels", "client") == 0 || len(a.pools) > 0
	})
}

// TestTrustThatEndsCutsItsConnections, at once and those only.
func TestTrustThatEndsCutsItsConnections(t *testing.T) {
	for what, end := range map[string]func(m *mesh, b *node){
		"a list without it": func(m *mesh, b *node) {
			m.clients = []federation.ClusterID{"b", "c", "d"}
			b.update(func(x *xds.Config) { x.Trust = m.trust() })
		},
		"a denial": func(_ *mesh, b *node) {
			b.denials.Deny(identity.Denial{Cluster: "a", Generation: 1})
			b.Recheck()
		},
	} {
		t.Run(what, func(t *testing.T) {
			m := newMesh(t)
			b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
			open := func(n *node) *net.TCPConn {
				addr := n.imports(payments, to(b, 0, 1000))
				n.start()
				conn := dial(t, addr)
				if who, err := line(conn); who != "b" || err != nil {
					t.Fatalf("%q, %v", who, err)
				}
				return conn
			}
			fromA, fromC := open(m.gateway("a")), open(m.gateway("c"))
			end(m, b)
			if got, err := line(fromA); err == nil || err == io.EOF {
				t.Errorf("the forbidden one: %q, %v", got, err)
			}
			io.WriteString(fromC, "still\n")
			if got, err := line(fromC); got != "still" || err != nil {
				t.Errorf("the other one: %q, %v", got, err)
			}
		})
	}
}

// TestDrain: no new connections, old ones go on until they end or the deadline
// comes.
func TestDrain(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000), to(c, 1, 1000))
	a.start()
	first, second := dial(t, addr), dial(t, addr)
	line(first)
	line(second)
	ctx, deadline := context.WithCancel(t.Context())
	left := make(chan []Record, 1)
	go func() { left <- b.Drain(ctx) }()
	eventually(t, "the east-west port is closed", func() bool {
		c, err := net.Dial("tcp", b.addr.String())
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	for range 20 { // none fails, from the moment of the drain on
		if who, err := ask(t, addr); err != nil || (who != "b" && who != "c") {
			t.Fatalf("a connection while b drains: %q, %v", who, err)
		}
	}
	if who, err := ask(t, addr); who != "c" || err != nil {
		t.Errorf("a new connection: %q, %v", who, err)
	}
	io.WriteString(first, "on\n")
	if got, err := line(first); got != "on" || err != nil {
		t.Errorf("an old connection: %q, %v", got, err)
	}
	first.CloseWrite()
	if b, err := io.ReadAll(first); len(b) != 0 || err != nil {
		t.Errorf("its end: %q, %v", b, err)
	}
	eventually(t, "only one is left", func() bool { return b.Connections() == 1 })
	deadline()
	if cut := <-left; len(cut) != 1 || cut[0].Service != payments || cut[0].End != "drain deadline" || cut[0].Received == 0 {
		t.Errorf("cut at the deadline: %+v", cut)
	}
	if got, err := line(second); err == nil || err == io.EOF {
		t.Errorf("the one that was cut: %q, %v", got, err)
	}
	if r := b.record("its record", func(r Record) bool { return r.End == "drain deadline" }); !r.Connected {
		t.Errorf("%+v", r)
	}
}

// TestOldTunnelsAreReplaced: a tunnel's age ends its use, not its streams.
func TestOldTunnelsAreReplaced(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr)
	b.config.Listeners["east-west"].Chains[0].Terminate.MaxAge = 500 * time.Millisecond
	b.start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000))
	a.start()
	conn := dial(t, addr)
	line(conn)
	eventually(t, "a second tunnel", func() bool {
		ask(t, addr)
		return b.metric("weft_gateway_handshakes_total", "server", "accepted") >= 3
	})
	io.WriteString(conn, "old\n")
	if got, err := line(conn); got != "old" || err != nil {
		t.Errorf("on the old tunnel: %q, %v", got, err)
	}
}

// TestProbesSeeGatewaysComeAndGo without any connection of an application.
func TestProbesSeeGatewaysComeAndGo(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	a := m.gateway("a")
	a.imports(payments, to(b, 0, 1000))
	a.start()
	probe := func(answers bool) func() bool {
		return func() bool {
			p := a.Probes()
			return len(p) == 1 && p[0].Cluster == "b" && p[0].Address == b.addr && p[0].Answers == answers && (!answers || p[0].RTT > 0)
		}
	}
	eventually(t, "an answer", probe(true))
	b.Close()
	eventually(t, "silence", probe(false))
}

// TestTrustThatEndsFindsOldTunnels: also those that take no new streams any
// more, and that no pool holds.
func TestTrustThatEndsFindsOldTunnels(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000), to(c, 1, 1000))
	a.start()
	conn := dial(t, addr)
	line(conn)
	drained := make(chan []Record, 1)
	go func() { drained <- b.Drain(t.Context()) }()
	eventually(t, "new connections go to c", func() bool { who, err := ask(t, addr); return who == "c" && err == nil })
	io.WriteString(conn, "on\n")
	if got, err := line(conn); got != "on" || err != nil {
		t.Fatalf("while b drains: %q, %v", got, err)
	}
	a.denials.Deny(identity.Denial{Cluster: "b", Generation: 1})
	a.Recheck()
	if got, err := line(conn); err == nil || err == io.EOF {
		t.Errorf("after b was denied: %q, %v", got, err)
	}
	if left := <-drained; len(left) != 0 {
		t.Errorf("left at b: %+v", left)
	}
}
