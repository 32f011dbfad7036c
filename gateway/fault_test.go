package gateway

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/xds"
)

// wan is a TCP path to an address that can lose things.
type wan struct {
	*server
	mu      sync.Mutex
	swallow int // connections that get no answer
	frozen  bool
	thaw    *sync.Cond
}

func newWAN(t testing.TB, to netip.AddrPort, swallow int) *wan {
	w := &wan{swallow: swallow}
	w.thaw = sync.NewCond(&w.mu)
	t.Cleanup(func() { w.freeze(false) }) // before the server's own clean-up
	pass := func(from, to *net.TCPConn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			w.mu.Lock()
			for w.frozen {
				w.thaw.Wait()
			}
			w.mu.Unlock()
			if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
				to.Close()
				return
			}
		}
	}
	w.server = serve(t, func(c *net.TCPConn) {
		w.mu.Lock()
		lost := w.swallow > 0
		if lost {
			w.swallow--
		}
		w.mu.Unlock()
		if lost {
			io.Copy(io.Discard, struct{ io.Reader }{c})
			return
		}
		far, err := net.Dial("tcp", to.String())
		if err != nil {
			return
		}
		defer far.Close()
		var back sync.WaitGroup
		back.Go(func() { pass(far.(*net.TCPConn), c) })
		pass(c, far.(*net.TCPConn))
		far.Close()
		back.Wait()
	})
	return w
}

func (w *wan) freeze(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frozen = on
	w.thaw.Broadcast()
}

func (n *node) behind(w *wan) backendOf {
	return backendOf{cluster: n.cluster, addrs: []netip.AddrPort{w.addr}, share: 1000}
}

// TestLostFirstAttemptIsHedged: the path swallows the first connection whole; a
// second one is tried beside it before the first one's time is up.
func TestLostFirstAttemptIsHedged(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	w := newWAN(t, b.addr, 1)
	a := m.gateway("a")
	addr := a.imports(payments, b.behind(w))
	a.start()
	if who, err := ask(t, addr); who != "b" || err != nil {
		t.Fatalf("%q, %v", who, err)
	}
	if r := a.record("the record", func(Record) bool { return true }); r.Attempts != 1 {
		t.Errorf("%d attempts, want 1 that was hedged", r.Attempts)
	}
}

// TestWarmTunnelThatFallsSilent: connections go elsewhere after the time of a
// connect, the gateway is set aside, and what is open on it lives on when the
// path returns in time.
func TestWarmTunnelThatFallsSilent(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	c := m.gateway("c").serves(payments, greeter(t, "c").addr).start()
	w := newWAN(t, b.addr, 0)
	a := m.gateway("a")
	addr := a.imports(payments, b.behind(w), to(c, 1, 1000))
	a.start()
	open := dial(t, addr)
	if who, err := line(open); who != "b" || err != nil {
		t.Fatalf("%q, %v", who, err)
	}
	w.freeze(true)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if who, err := ask(t, addr); who != "c" || err != nil {
				t.Errorf("while b is silent: %q, %v", who, err)
			}
		})
	}
	wg.Wait()
	if n := a.metric("weft_gateway_ejections_total"); n != 1 {
		t.Errorf("%v ejections, want 1", n)
	}
	if n := a.metric("weft_gateway_attempts_total", "late"); n != 5 {
		t.Errorf("%v late attempts, want 5", n)
	}
	w.freeze(false)
	io.WriteString(open, "still\n")
	if got, err := line(open); got != "still" || err != nil {
		t.Errorf("the open connection: %q, %v", got, err)
	}
}

// TestTunnelThatBreaks: its connections end with an error, and new ones find the
// same gateway over a new tunnel.
func TestTunnelThatBreaks(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr).start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000))
	a.start()
	for range 20 {
		conn := dial(t, addr)
		if who, err := line(conn); who != "b" || err != nil {
			t.Fatalf("%q, %v", who, err)
		}
		b.Engine.mu.Lock()
		for in := range b.inbound {
			hangUp(in.source)
		}
		b.Engine.mu.Unlock()
		if got, err := line(conn); err == nil || err == io.EOF {
			t.Errorf("on the broken tunnel: %q, %v", got, err)
		}
	}
	eventually(t, "the end of all", func() bool { return a.Connections() == 0 && b.Connections() == 0 })
}

// TestManyConnectionsShareFewTunnels, and more of them open when one is full.
func TestManyConnectionsShareFewTunnels(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b").serves(payments, greeter(t, "b").addr)
	b.config.Listeners["east-west"].Chains[0].Terminate.HTTP2.MaxStreams = 50
	b.start()
	a := m.gateway("a")
	addr := a.imports(payments, to(b, 0, 1000))
	a.start()
	var conns []*net.TCPConn
	for range 300 {
		conns = append(conns, dial(t, addr))
	}
	for i, c := range conns {
		if who, err := line(c); who != "b" || err != nil {
			t.Fatalf("connection %d: %q, %v", i, who, err)
		}
	}
	if n := a.metric("weft_gateway_tunnels", "client"); n < 6 || n > 8 {
		t.Errorf("%v tunnels for 300 connections of which each holds 50", n)
	}
	if n := a.Connections(); n != 300 {
		t.Errorf("%d connections are counted", n)
	}
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "the end of all", func() bool { return a.Connections() == 0 && b.Connections() == 0 })
}

// TestUnprovenConnectionsAreBounded: those who say nothing cannot keep others out
// for long, nor pile up.
func TestUnprovenConnectionsAreBounded(t *testing.T) {
	m := newMesh(t)
	b := m.gateway("b", func(c *Config) { c.Unproven = 2 })
	b.config.Listeners["east-west"].HelloTimeout = 200 * time.Millisecond
	b.start()
	silent := []*net.TCPConn{dial(t, b.addr), dial(t, b.addr)}
	eventually(t, "both are waited for", func() bool { return len(b.Engine.unproven) == 2 })
	if _, err := rawTunnel(m, b, gatewayPath("a"), "b.t.weft", xds.ALPN); err == nil {
		t.Error("a third was let in")
	}
	for _, c := range silent {
		io.ReadAll(c)
	}
	if _, err := rawTunnel(m, b, gatewayPath("a"), "b.t.weft", xds.ALPN); err != nil {
		t.Errorf("after the silent ones were closed: %v", err)
	}
}
