package identity_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
)

// traffic is two gateways that talk all the time: streams that stay open, and
// a new connection as soon as the last one has closed.
type traffic struct {
	t              *testing.T
	server, client *tls.Config
	listener       net.Listener
	stop           chan struct{}
	wg             sync.WaitGroup
	echoes, dials  atomic.Int64
}

func startTraffic(t *testing.T, server, client *tls.Config, streams, dialers int) *traffic {
	tr := &traffic{
		t: t, server: server, client: client, stop: make(chan struct{}),
		listener: must(tls.Listen("tcp", "127.0.0.1:0", server))(t),
	}
	tr.wg.Go(tr.serve)
	for range streams {
		tr.wg.Go(tr.stream)
	}
	for range dialers {
		tr.wg.Go(tr.dial)
	}
	return tr
}

func (tr *traffic) serve() {
	for {
		conn, err := tr.listener.Accept()
		if err != nil {
			return
		}
		tr.wg.Go(func() {
			defer conn.Close()
			if err := conn.(*tls.Conn).HandshakeContext(context.Background()); err != nil {
				tr.t.Errorf("server: %v", err)
				return
			}
			if _, err := io.Copy(conn, conn); err != nil {
				tr.t.Errorf("server: %v", err)
			}
		})
	}
}

func (tr *traffic) open() (*tls.Conn, error) {
	raw, err := net.Dial("tcp", tr.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, tr.client)
	return conn, tr.echo(conn)
}

func (tr *traffic) echo(conn *tls.Conn) error {
	sent, got := []byte("over and under"), make([]byte, 14)
	if _, err := conn.Write(sent); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != string(sent) {
		return fmt.Errorf("sent %q, got %q", sent, got)
	}
	tr.echoes.Add(1)
	return nil
}

func (tr *traffic) stopped() bool {
	select {
	case <-tr.stop:
		return true
	default:
		return false
	}
}

// stream keeps one connection for the whole test.
func (tr *traffic) stream() {
	conn, err := tr.open()
	for ; err == nil && !tr.stopped(); err = tr.echo(conn) {
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		tr.t.Errorf("stream: %v", err)
		return
	}
	conn.Close()
}

func (tr *traffic) dial() {
	for !tr.stopped() {
		conn, err := tr.open()
		if err != nil {
			tr.t.Errorf("new connection: %v", err)
			return
		}
		tr.dials.Add(1)
		conn.Close()
		time.Sleep(2 * time.Millisecond)
	}
}

func (tr *traffic) end() {
	close(tr.stop)
	time.AfterFunc(50*time.Millisecond, func() { tr.listener.Close() })
	tr.wg.Wait()
}

// Whole lives of leaves, the rotation of a region's authority, and a new root,
// while connections are made and used all the time: none fails, none breaks.
func TestRotationsDropNoConnection(t *testing.T) {
	// A day takes 2 seconds, so that the half of a life which is left at a
	// renewal is time enough for a busy machine.
	clk := clock.Scaled(24*3600/2, time.Until(t0))
	m := newMesh(t, t0)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	live := func(id string) (*identity.Source, *office) {
		o := newOffice(t, m, clk, id)
		s := newSource(t, o, id, func(c *identity.SourceConfig) { c.Timeout = 100 * time.Hour })
		if err := s.Renew(ctx); err != nil {
			t.Fatal(err)
		}
		running.Go(func() { _ = s.Run(ctx) })
		return s, o
	}
	server, serverOffice := live(gatewayUS)
	client, clientOffice := live(gatewayEU)
	both := func(change func(*office)) { serverOffice.set(change); clientOffice.set(change) }
	sv := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: server})
	cv := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: client})
	tr := startTraffic(t,
		sv.Server(identity.ServerConfig{SVID: server, Authorize: identity.AllowGatewayOf("eu-1"), NextProtos: []string{"weft/1"}}),
		cv.Client(identity.ClientConfig{SVID: client, Authorize: identity.AllowGatewayOf("us-1"), NextProtos: []string{"weft/1"}}),
		4, 2)

	// until waits for both sources; each wait is a renewal of a natural life.
	until := func(what string, is func(*identity.Source) bool) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for _, s := range []*identity.Source{server, client} {
			for {
				changed := s.Updated()
				if is(s) {
					break
				}
				select {
				case <-changed:
				case <-deadline:
					t.Fatalf("not reached: %s", what)
				}
			}
		}
	}
	signedBy := func(a *identity.Authority) func(*identity.Source) bool {
		return func(s *identity.Source) bool {
			svid, err := s.GetX509SVID()
			return err == nil && svid.Certificates[1].Equal(a.Certificate())
		}
	}
	setBundles := func(b *identity.Bundle) {
		t.Helper()
		for _, s := range []*identity.Source{client, server} {
			if err := s.SetBundle(b); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond) // never both at once
		}
	}

	// Two lives of leaves.
	began := clk.Now()
	until("leaves that started two lives later", func(s *identity.Source) bool {
		svid, err := s.GetX509SVID()
		return err == nil && svid.Certificates[0].NotBefore.Sub(began) > 48*time.Hour
	})

	// The region's authority is replaced by another under the same root.
	second := must(m.root.NewRegion("eu", m.lifetimes, clk.Now()))(t)
	both(func(o *office) { o.by = second })
	until("leaves of the second authority", signedBy(second))

	// A second root: published, then signed under, then the first is removed.
	root2 := must(identity.NewRoot(td, m.lifetimes, clk.Now()))(t)
	region2 := must(root2.NewRegion("eu", m.lifetimes, clk.Now()))(t)
	two := must(m.bundle.With(root2.Root()))(t)
	both(func(o *office) { o.bundle = two })
	setBundles(two)
	both(func(o *office) { o.by = region2 })
	until("leaves under the second root", signedBy(region2))
	// A root goes after the last leaf under it has ended: until then it may be
	// in a handshake that has begun.
	if err := clock.Sleep(ctx, clk, m.lifetimes.Leaf); err != nil {
		t.Fatal(err)
	}
	last := must(two.Without(m.root.Root()))(t)
	both(func(o *office) { o.bundle = last })
	setBundles(last)
	until("a renewal after the first root is gone", func(s *identity.Source) bool {
		svid, err := s.GetX509SVID()
		return err == nil && s.Bundle().Equal(last) && svid.Certificates[0].NotBefore.After(region2.Certificate().NotBefore.Add(24*time.Hour))
	})

	tr.end()
	if tr.dials.Load() < 50 || tr.echoes.Load() < 500 {
		t.Errorf("only %d connections and %d echoes: too few to prove anything", tr.dials.Load(), tr.echoes.Load())
	}
	t.Logf("%d connections, %d echoes over %v of the mesh's time", tr.dials.Load(), tr.echoes.Load(), clock.Since(clk, began).Round(time.Hour))

	// And the removed root is worth nothing now.
	old := m.svid(t, gatewayEU, clk.Now())
	got := meet(t, tr.server, cv.Client(identity.ClientConfig{SVID: old, Authorize: identity.AllowAny(), NextProtos: []string{"weft/1"}}))
	if refused := (*identity.VerifyError)(nil); !errors.As(got.server, &refused) {
		t.Errorf("a leaf under the removed root: %v", got.server)
	}
}

// A change of trust reaches connections that are open: Recheck sees it, where
// the expiry of the peer's leaf is no reason to cut it.
func TestRecheckSeesChangesOfTrustAndNotTheClock(t *testing.T) {
	m := newMesh(t, t0)
	clk := &setClock{now: t0}
	denials := new(identity.Denials)
	o := newOffice(t, m, clk, gatewayUS)
	server := newSource(t, o, gatewayUS)
	if err := server.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: server, Denials: denials})
	got := meet(t, v.Server(identity.ServerConfig{SVID: server, Authorize: identity.AllowAny()}),
		v.Client(identity.ClientConfig{SVID: m.svid(t, gatewayEU, t0), Authorize: identity.AllowAny()}))
	if got.server != nil || got.client != nil {
		t.Fatal(got.server, got.client)
	}
	check := func(when string, refused func(error) bool) {
		t.Helper()
		err := v.Recheck(got.servView)
		if refused == nil && err != nil || refused != nil && !refused(err) {
			t.Errorf("%s: %v", when, err)
		}
	}
	denied := func(err error) bool { is := (*identity.DeniedError)(nil); return errors.As(err, &is) }
	unverified := func(err error) bool { is := (*identity.VerifyError)(nil); return errors.As(err, &is) }
	check("at once", nil)
	clk.set(t0.Add(72 * time.Hour))
	check("after its leaf's end", nil)
	changed := denials.Changed()
	denials.Deny(identity.Denial{Cluster: "eu-1", Generation: 1})
	<-changed
	check("denied", denied)
	denials.Lift("eu-1", 1)
	check("lifted", nil)
	root2 := must(identity.NewRoot(td, m.lifetimes, t0))(t)
	for _, b := range []*identity.Bundle{must(m.bundle.With(root2.Root()))(t), must(identity.NewBundle(td, 3, []*x509.Certificate{root2.Root()}))(t)} {
		check("before a change of roots", nil)
		if err := server.SetBundle(b); err != nil {
			t.Fatal(err)
		}
	}
	check("its root is gone", unverified)
}

// setClock shows the time that it was last set to.
type setClock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *setClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *setClock) set(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = t
}

func (c *setClock) NewTimer(d time.Duration) clock.Timer { return clock.Real().NewTimer(d) }

// An agent whose leaf has expired while its controller was away renews by
// proof of that leaf's key, for 30 days.
func TestAnExpiredAgentRenewsByProof(t *testing.T) {
	m := newMesh(t, t0)
	day := 24 * time.Hour
	clk := &setClock{now: t0}
	fresh := func(id string) *identity.Source {
		s := newSource(t, newOffice(t, m, &setClock{now: t0}, id), id)
		if err := s.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s
	}
	agent, gateway := fresh(agentEU), fresh(gatewayEU)
	key := must(identity.NewKey())(t)
	csr := must(identity.NewCSR(key))(t)
	otherCSR := must(identity.NewCSR(must(identity.NewKey())(t)))(t)
	prove := func(s *identity.Source, csr []byte) identity.RenewalProof { return must(s.Prove(csr))(t) }
	mixed := prove(fresh(agentEU), csr)
	mixed.Chain = prove(agent, csr).Chain
	foreign := newMesh(t, t0)
	foreignAgent := newSource(t, newOffice(t, foreign, &setClock{now: t0}, agentEU), agentEU)
	if err := foreignAgent.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		proof  identity.RenewalProof
		after  time.Duration
		denied bool
		ok     bool
	}{
		"still valid":            {prove(agent, csr), time.Hour, false, true},
		"expired yesterday":      {prove(agent, csr), 2 * day, false, true},
		"on the last day":        {prove(agent, csr), 31 * day, false, true},
		"too late":               {prove(agent, csr), 31*day + time.Second, false, false},
		"denied meanwhile":       {prove(agent, csr), 2 * day, true, false},
		"for another CSR":        {prove(agent, otherCSR), 2 * day, false, false},
		"with another key":       {mixed, 2 * day, false, false},
		"a gateway":              {prove(gateway, csr), 2 * day, false, false},
		"of another mesh":        {prove(foreignAgent, csr), 2 * day, false, false},
		"no chain":               {identity.RenewalProof{}, 0, false, false},
		"no signature":           {identity.RenewalProof{Chain: prove(agent, csr).Chain}, 0, false, false},
		"before the leaf starts": {prove(agent, csr), -day, false, false},
	} {
		denials := new(identity.Denials)
		if c.denied {
			denials.Deny(identity.Denial{Cluster: "eu-1", Generation: 1})
		}
		clk.set(t0.Add(c.after))
		v := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: m.bundle, Denials: denials})
		who, err := v.VerifyProof(c.proof, csr)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.ok {
			continue
		}
		admitted, err := identity.Admit(td, identity.PeerAsks(who), spiffeid.ID{}, csr)
		if err != nil || admitted.ID.String() != agentEU || !admitted.Key.Equal(&key.PublicKey) {
			t.Errorf("%s: admitted %v, %v", name, admitted.ID, err)
		}
	}
	if _, err := newSource(t, newOffice(t, m, clk, agentEU), agentEU).Prove(csr); !errors.Is(err, identity.ErrNoSVID) {
		t.Errorf("a proof of nothing: %v", err)
	}
}
