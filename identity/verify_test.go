package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
)

// A chain that is remembered is worth no more than one that is verified: its
// window, the bundle and the denials count each time.
func TestRememberedChainsAreStillChecked(t *testing.T) {
	m := newMesh(t, t0)
	next := must(identity.NewRoot(td, m.lifetimes, t0))(t)
	both := must(m.bundle.With(next.Root()))(t)
	only := must(both.Without(m.root.Root()))(t)
	clk := &setClock{now: t0}
	denials := new(identity.Denials)
	trust := &turning{m.bundle}
	v := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: trust, Denials: denials})
	chain, key := m.leaf(t, spiffeid.RequireFromString(agentEU), t0)
	hash := must(identity.KeyHash(key.Public()))(t)

	check := func(says string) {
		t.Helper()
		for range 2 {
			p, err := v.Verify(chain)
			switch {
			case says == "" && (err != nil || p.ID.String() != agentEU || p.KeyHash != hash || !p.NotAfter.Equal(chain[0].NotAfter)):
				t.Fatalf("%+v, %v", p, err)
			case says != "" && (err == nil || !strings.Contains(err.Error(), says)):
				t.Fatalf("got %v, want %q", err, says)
			}
		}
	}
	check("")
	if v.Remembered() != 1 {
		t.Errorf("%d chains are remembered", v.Remembered())
	}
	clk.set(chain[0].NotAfter)
	check("")
	clk.set(chain[0].NotAfter.Add(time.Second))
	check("it expired")
	clk.set(chain[0].NotBefore.Add(-time.Second))
	check("clocks is wrong")
	clk.set(t0)
	denials.Deny(identity.Denial{Cluster: "eu-1"})
	check("denied")
	denials.Lift("eu-1", 0)
	trust.b = only
	check("no root")
	trust.b = nil
	check("no trust bundle")
	trust.b = both
	check("")
	// The same sequence with other content is another bundle.
	trust.b = must(identity.NewBundle(td, both.Sequence(), only.Roots()))(t)
	check("no root")
}

// A leaf that was made to outlive its authority ends with it, remembered or not.
func TestAChainEndsWithItsFirstCertificate(t *testing.T) {
	m := newMesh(t, t0)
	clk := &setClock{now: t0}
	end := m.region.NotAfter()
	v := identity.NewVerifier(identity.VerifierConfig{Clock: clk, Mesh: m.bundle})
	chain, _ := forgeTemplate(t, m.region, &x509.Certificate{
		NotBefore: t0, NotAfter: end.Add(24 * time.Hour), BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		URIs: []*url.URL{spiffeid.RequireFromString(agentEU).URL()},
	})
	for _, c := range []struct {
		at time.Time
		ok bool
	}{{t0, true}, {end, true}, {end.Add(time.Second), false}, {end, true}} {
		clk.set(c.at)
		if _, err := v.Verify(chain); (err == nil) != c.ok {
			t.Errorf("at %v: %v", c.at, err)
		}
	}
	for len(chain) < 9 {
		chain = append(chain, m.region.Certificate())
	}
	clk.set(t0)
	must(v.Verify(chain[:8]))(t)
	if _, err := v.Verify(chain); err == nil || !strings.Contains(err.Error(), "at most 8") {
		t.Errorf("nine certificates: %v", err)
	}
}

type turning struct{ b *identity.Bundle }

func (t *turning) Bundle() *identity.Bundle { return t.b }

func TestTheMemoryOfChainsIsBounded(t *testing.T) {
	m := newMesh(t, t0)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle, CacheSize: 20})
	none := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle, CacheSize: -1})
	often, _ := m.leaf(t, spiffeid.RequireFromString(gatewayEU), t0)
	for i := range 100 {
		chain, _ := m.leaf(t, spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.example/cluster/c-%d/gateway", i)), t0)
		for _, v := range []*identity.Verifier{v, none} {
			must(v.Verify(chain))(t)
			must(v.Verify(often))(t)
		}
		if n := v.Remembered(); n > 20 || i > 20 && n < 10 {
			t.Fatalf("after %d peers, %d are remembered", i+1, n)
		}
	}
	if none.Remembered() != 0 {
		t.Error("a verifier without a memory has one")
	}
}

// What PeerOf knows of a connection goes with it.
func TestTheMarksOfConnectionsGoWithThem(t *testing.T) {
	m := newMesh(t, t0)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle})
	server := v.Server(identity.ServerConfig{SVID: m.svid(t, gatewayUS, t0), Authorize: identity.AllowAny()})
	client := v.Client(identity.ClientConfig{SVID: m.svid(t, gatewayEU, t0), Authorize: identity.AllowAny()})
	keep := meet(t, server, client)
	for range 20 {
		meet(t, server, client)
	}
	// Two certificates for the one connection that is kept; its own config
	// keeps none.
	deadline := time.Now().Add(10 * time.Second)
	for v.Marked() > 2 {
		if time.Now().After(deadline) {
			t.Fatalf("%d leaves are still marked", v.Marked())
		}
		runtime.GC()
		time.Sleep(5 * time.Millisecond)
	}
	if p, ok := v.PeerOf(keep.servView); !ok || p.ID.String() != gatewayEU {
		t.Errorf("the connection that is kept has lost its peer: %v", p)
	}
	if p, ok := v.PeerOf(keep.clientView); !ok || p.ID.String() != gatewayUS {
		t.Errorf("the connection that is kept has lost its peer: %v", p)
	}
}

// A root in both bundles, which is a mistake, makes nobody of people and no
// people of peers.
func TestARootInBothBundlesVouchesForNobody(t *testing.T) {
	m := newMesh(t, t0)
	mixed := must(m.bundle.With(m.operators.Root()))(t)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: mixed, Operators: m.people})
	must(v.Verify(m.svid(t, agentEU, t0).Certificates))(t)
	forged := forge(t, m.operators, spiffeid.RequireFromString(agentEU), t0)
	for name, chain := range map[string][]*x509.Certificate{"a peer of the operators' root": forged, "an operator": m.svid(t, ada, t0).Certificates} {
		if p, err := v.Verify(chain); err == nil || !strings.Contains(err.Error(), "take it out of one bundle") {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}

func TestHandshakesAreCounted(t *testing.T) {
	m := newMesh(t, t0)
	reg := prometheus.NewRegistry()
	denials := new(identity.Denials)
	denials.Deny(identity.Denial{Cluster: "us-1"})
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle, Operators: m.people, Denials: denials, Metrics: reg})
	free := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle})
	server := v.Server(identity.ServerConfig{SVID: m.svid(t, ctl, t0), Authorize: identity.AllowRole(identity.RoleAgent, identity.RoleGateway), NextProtos: []string{"h2"}, Anonymous: true})
	for _, id := range []string{agentEU, gatewayUS, shopEU, ada, ""} {
		c := identity.ClientConfig{Authorize: identity.AllowAny(), NextProtos: []string{"h2"}}
		if id != "" {
			c.SVID = m.svid(t, id, t0)
		}
		meet(t, server, free.Client(c))
	}
	meet(t, server, free.Client(identity.ClientConfig{SVID: newMesh(t, t0).svid(t, agentEU, t0), Authorize: identity.AllowAny(), NextProtos: []string{"h2"}}))
	meet(t, server, free.Client(identity.ClientConfig{SVID: m.svid(t, agentEU, t0), Authorize: identity.AllowAny()}))
	want := `
		# HELP weft_tls_peers_total Peers checked at TLS handshakes, by result: accepted, anonymous, or why refused.
		# TYPE weft_tls_peers_total counter
		weft_tls_peers_total{result="accepted"} 1
		weft_tls_peers_total{result="alpn"} 1
		weft_tls_peers_total{result="anonymous"} 1
		weft_tls_peers_total{result="denied"} 1
		weft_tls_peers_total{result="unauthorized"} 2
		weft_tls_peers_total{result="unverified"} 1
	`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}

// Whatever a peer shows as its chain: no panic, and nobody is verified but by
// the one leaf that was signed.
func FuzzVerifyChain(f *testing.F) {
	m := newMesh(f, t0)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: &setClock{now: t0}, Mesh: m.bundle, Operators: m.people})
	chain, _ := m.leaf(f, spiffeid.RequireFromString(agentEU), t0)
	pin := identity.PinOf(m.root.Root())
	f.Add(chain[0].Raw, chain[1].Raw)
	f.Add(m.svid(f, ada, t0).Certificates[0].Raw, m.operators.Root().Raw)
	f.Add(forge(f, m.root, spiffeid.RequireFromString("spiffe://mesh.example/x"), t0)[0].Raw, m.root.Root().Raw)
	f.Add([]byte{0x30, 0x80}, []byte{})
	f.Fuzz(func(t *testing.T, leaf, above []byte) {
		shown, err := identity.ParseRawChain([][]byte{leaf, above})
		if err != nil {
			return
		}
		if p, err := v.Verify(shown); err == nil && !shown[0].Equal(chain[0]) && p.Role != identity.RoleOperator {
			t.Errorf("%v is verified", p)
		}
		if p, err := identity.VerifyPin(shown, pin, t0); err == nil {
			t.Errorf("%v is pinned", p)
		}
	})
}

// Handshakes per second on one core for both ends, with and without the memory
// of verified chains.
func BenchmarkHandshake(b *testing.B) {
	m := newMesh(b, t0)
	for name, size := range map[string]int{"chains-remembered": 0, "chains-verified": -1} {
		b.Run(name, func(b *testing.B) {
			v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0), Mesh: m.bundle, CacheSize: size})
			server := v.Server(identity.ServerConfig{SVID: m.svid(b, gatewayUS, t0), Authorize: identity.AllowGatewayOf("eu-1"), NextProtos: []string{"weft/1"}})
			client := v.Client(identity.ClientConfig{SVID: m.svid(b, gatewayEU, t0), Authorize: identity.AllowGatewayOf("us-1"), NextProtos: []string{"weft/1"}})
			for b.Loop() {
				near, far := net.Pipe()
				done := make(chan error, 1)
				go func() { done <- tls.Server(far, server).Handshake() }()
				if err := tls.Client(near, client).Handshake(); err != nil {
					b.Fatal(err)
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
				near.Close()
				far.Close()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "handshakes/s")
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	m := newMesh(b, t0)
	chain, _ := m.leaf(b, spiffeid.RequireFromString(gatewayEU), t0)
	for name, size := range map[string]int{"chains-remembered": 0, "chains-verified": -1} {
		b.Run(name, func(b *testing.B) {
			v := identity.NewVerifier(identity.VerifierConfig{Clock: clock.Scaled(1, time.Until(t0)), Mesh: m.bundle, CacheSize: size})
			b.ReportAllocs()
			for b.Loop() {
				if _, err := v.Verify(chain); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkSignLeaf(b *testing.B) {
	m := newMesh(b, t0)
	csr := must(identity.NewCSR(must(identity.NewKey())(b)))(b)
	asker := identity.TokenAsks("eu-1")
	for b.Loop() {
		who := must(identity.Admit(td, asker, spiffeid.ID{}, csr))(b)
		must(m.region.SignLeaf(who, m.lifetimes, t0))(b)
	}
}
