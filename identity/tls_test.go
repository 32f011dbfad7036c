package identity_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
)

// at is a clock that starts at a time and runs as fast as the machine's.
func at(t time.Time) clock.Clock { return clock.Scaled(1, time.Until(t)) }

func (m *mesh) svid(t testing.TB, id string, now time.Time) *x509svid.SVID {
	t.Helper()
	parsed := spiffeid.RequireFromString(id)
	chain, key := m.leaf(t, parsed, now)
	return &x509svid.SVID{ID: parsed, Certificates: chain, PrivateKey: key}
}

// met is what came of one connection.
type met struct {
	client, server       error
	clientView, servView tls.ConnectionState
}

// meet makes one connection over loopback and sends a byte each way, so that
// either side has learnt what the other thinks of it.
func meet(t testing.TB, server, client *tls.Config) met {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var m met
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := l.Accept()
		if err != nil {
			m.server = err
			return
		}
		conn := tls.Server(raw, server)
		defer conn.Close()
		if m.server = conn.HandshakeContext(ctx); m.server != nil {
			return
		}
		m.servView = conn.ConnectionState()
		_, _ = conn.Write([]byte("s"))
		_, _ = io.ReadFull(conn, make([]byte, 1))
	}()
	raw := must(new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String()))(t)
	conn := tls.Client(raw, client)
	if m.client = conn.HandshakeContext(ctx); m.client == nil {
		m.clientView = conn.ConnectionState()
		// In TLS 1.3 the client has finished before the server judges it.
		if _, err := io.ReadFull(conn, make([]byte, 1)); err == nil {
			_, _ = conn.Write([]byte("c"))
		} else if m.client = err; err == io.EOF {
			m.client = io.ErrUnexpectedEOF
		}
	}
	raw.Close()
	<-done
	return m
}

const (
	agentEU   = "spiffe://mesh.example/cluster/eu-1/agent"
	gatewayEU = "spiffe://mesh.example/cluster/eu-1/gateway"
	gatewayUS = "spiffe://mesh.example/cluster/us-1/gateway"
	shopEU    = "spiffe://mesh.example/cluster/eu-1/ns/shop/sa/cart"
	ctl       = "spiffe://mesh.example/controller/c-0"
	ada       = "spiffe://mesh.example/operator/ada"
)

func TestWhoMayConnect(t *testing.T) {
	m := newMesh(t, t0)
	now := t0.Add(time.Hour)
	stranger := newMesh(t, t0) // another mesh of the same trust domain
	otherTD := spiffeid.RequireTrustDomainFromString("other.example")

	forgedBy := func(a *identity.Authority, id string, template x509.Certificate) *x509svid.SVID {
		parsed := spiffeid.RequireFromString(id)
		if template.NotAfter.IsZero() {
			template.NotBefore, template.NotAfter = now.Add(-time.Minute), now.Add(time.Hour)
		}
		if template.KeyUsage == 0 {
			template.KeyUsage = x509.KeyUsageDigitalSignature
		}
		template.BasicConstraintsValid = true
		if template.URIs == nil {
			template.URIs = []*url.URL{parsed.URL()}
		}
		chain, key := forgeTemplate(t, a, &template)
		return &x509svid.SVID{ID: parsed, Certificates: chain, PrivateKey: key}
	}
	wrongTD := forgedBy(m.region, "spiffe://other.example/cluster/eu-1/agent", x509.Certificate{})
	wrongTD.ID = must(identity.AgentID(otherTD, "eu-1"))(t)
	onlyLeaf := m.svid(t, gatewayUS, t0)
	onlyLeaf.Certificates = onlyLeaf.Certificates[:1]
	notItsKey := m.svid(t, gatewayUS, t0)
	notItsKey.PrivateKey = must(identity.NewKey())(t)

	const (
		any   = iota // the mesh's peers only
		admin        // operators, too
		entry        // operators, and clients without a certificate
	)
	for name, c := range map[string]struct {
		peer   x509svid.Source // nil shows no certificate
		to     int
		denied federation.ClusterID
		at     time.Time // of the server's clock; now if zero
		says   string    // the server's error; empty for success
	}{
		"an agent":                             {peer: m.svid(t, agentEU, t0)},
		"a gateway":                            {peer: m.svid(t, gatewayUS, t0)},
		"a workload":                           {peer: m.svid(t, shopEU, t0)},
		"a controller":                         {peer: m.svid(t, ctl, t0)},
		"a denied cluster":                     {peer: m.svid(t, agentEU, t0), denied: "eu-1", says: "cluster eu-1 is denied (generation 3"},
		"another cluster is denied":            {peer: m.svid(t, agentEU, t0), denied: "eu-2"},
		"a denied workload":                    {peer: m.svid(t, shopEU, t0), denied: "eu-1", says: "is denied"},
		"nobody":                               {says: "didn't provide a certificate"},
		"nobody, where that is allowed":        {to: entry},
		"an operator as a peer":                {peer: m.svid(t, ada, t0), says: "is an operator, and operators are no peers"},
		"an operator at the admin API":         {peer: m.svid(t, ada, t0), to: admin},
		"an agent at the admin API":            {peer: m.svid(t, agentEU, t0), to: admin},
		"an expired leaf":                      {peer: m.svid(t, agentEU, t0), at: t0.Add(24*time.Hour + time.Second), says: "it expired at 2026-03-02T12:00:00Z"},
		"an expired leaf, anonymous allowed":   {peer: m.svid(t, agentEU, t0), to: entry, at: t0.Add(25 * time.Hour), says: "it expired at"},
		"the last second of a leaf":            {peer: m.svid(t, agentEU, t0), at: t0.Add(24*time.Hour - 5*time.Second)},
		"a verifier two minutes slow":          {peer: m.svid(t, agentEU, t0), at: t0.Add(-time.Minute)},
		"a verifier ten minutes slow":          {peer: m.svid(t, agentEU, t0), at: t0.Add(-10 * time.Minute), says: "one of the clocks is wrong"},
		"another mesh of the same name":        {peer: stranger.svid(t, agentEU, t0), says: "leads to no root that is trusted here"},
		"another mesh's operator":              {peer: stranger.svid(t, ada, t0), to: admin, says: "leads to no root that is trusted here"},
		"a forged trust domain":                {peer: wrongTD, says: "of another trust domain"},
		"a mesh peer signed by operators'":     {peer: forgedBy(m.operators, agentEU, x509.Certificate{}), to: admin, says: "leads to no root"},
		"an operator signed by the mesh":       {peer: forgedBy(m.region, ada, x509.Certificate{}), to: admin, says: "leads to no root"},
		"an operator by the mesh as a peer":    {peer: forgedBy(m.region, ada, x509.Certificate{}), says: "leads to no root"},
		"a leaf without its authority":         {peer: onlyLeaf, says: "leads to no root"},
		"a chain without its key":              {peer: notItsKey, says: "tls: invalid signature"},
		"two identities in one leaf":           {peer: forgedBy(m.region, agentEU, x509.Certificate{URIs: []*url.URL{spiffeid.RequireFromString(agentEU).URL(), spiffeid.RequireFromString(ctl).URL()}}), says: "exactly one SPIFFE ID"},
		"a DNS name and no identity":           {peer: forgedBy(m.region, agentEU, x509.Certificate{URIs: []*url.URL{}, DNSNames: []string{"mesh.example"}}), says: "exactly one SPIFFE ID"},
		"an authority as a leaf":               {peer: forgedBy(m.root, agentEU, x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}), says: "not a valid SVID"},
		"a path outside of the scheme":         {peer: forgedBy(m.region, "spiffe://mesh.example/admin", x509.Certificate{}), says: "not of a mesh's scheme"},
		"the trust domain itself":              {peer: forgedBy(m.region, "spiffe://mesh.example", x509.Certificate{}), says: "not of a mesh's scheme"},
		"signed by the root, past its regions": {peer: forgedBy(m.root, agentEU, x509.Certificate{})},
	} {
		t.Run(name, func(t *testing.T) {
			when := c.at
			if when.IsZero() {
				when = now
			}
			denials := new(identity.Denials)
			if c.denied != "" {
				denials.Deny(identity.Denial{Cluster: c.denied, Generation: 3})
			}
			v := identity.NewVerifier(identity.VerifierConfig{Clock: at(when), Mesh: m.bundle, Operators: m.people, Denials: denials, Metrics: prometheus.NewRegistry()})
			server := v.Server(identity.ServerConfig{SVID: m.svid(t, ctl, t0), Authorize: identity.AllowAny(), NextProtos: []string{"h2"}, Operators: c.to >= admin, Anonymous: c.to == entry})
			client := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: m.bundle}).
				Client(identity.ClientConfig{SVID: c.peer, Authorize: identity.AllowRole(identity.RoleController), NextProtos: []string{"h2"}})
			// Twice: the second time the chain is known.
			for range 2 {
				got := meet(t, server, client)
				if c.says == "" {
					if got.server != nil || got.client != nil {
						t.Fatalf("server: %v; client: %v", got.server, got.client)
					}
					seen, ok := v.PeerOf(got.servView)
					if svid, _ := c.peer.(*x509svid.SVID); ok != (svid != nil) || ok && (seen.ID != svid.ID || seen.Serial != identity.SerialOf(svid.Certificates[0])) {
						t.Errorf("PeerOf is %v, %v", seen, ok)
					}
					continue
				}
				if got.server == nil || !strings.Contains(got.server.Error(), c.says) {
					t.Fatalf("server: %v, want %q", got.server, c.says)
				}
				if got.client == nil {
					t.Error("the client was served")
				}
				if _, ok := v.PeerOf(got.servView); ok {
					t.Error("a refused peer has a PeerOf")
				}
				// Only what was verified is named.
				unverified := (*identity.VerifyError)(nil)
				if errors.As(got.server, &unverified) && strings.Contains(got.server.Error(), "spiffe://") {
					t.Errorf("the error names an unverified peer: %v", got.server)
				}
			}
		})
	}
}

func TestWhichServersAClientAccepts(t *testing.T) {
	m := newMesh(t, t0)
	now := t0.Add(time.Hour)
	stranger := newMesh(t, t0)
	live := identity.NewIDSet(spiffeid.RequireFromString(gatewayUS))
	gone := identity.NewIDSet(spiffeid.RequireFromString(gatewayUS))
	gone.Replace(nil)
	for name, c := range map[string]struct {
		server    *x509svid.SVID
		authorize identity.Authorizer
		denied    federation.ClusterID
		says      string
	}{
		"exactly this one":           {m.svid(t, gatewayUS, t0), identity.AllowID(spiffeid.RequireFromString(gatewayUS)), "", ""},
		"another one":                {m.svid(t, gatewayEU, t0), identity.AllowID(spiffeid.RequireFromString(gatewayUS)), "", "peer is " + gatewayEU + ", want " + gatewayUS},
		"the gateway of its cluster": {m.svid(t, gatewayUS, t0), identity.AllowGatewayOf("us-1"), "", ""},
		"of another cluster":         {m.svid(t, gatewayUS, t0), identity.AllowGatewayOf("eu-1"), "", "is not the gateway of cluster"},
		"of no cluster":              {m.svid(t, gatewayUS, t0), identity.AllowGatewayOf(""), "", "is not the gateway of cluster"},
		"the agent, not the gateway": {m.svid(t, agentEU, t0), identity.AllowGatewayOf("eu-1"), "", "is not the gateway of cluster"},
		"under a cluster":            {m.svid(t, shopEU, t0), identity.AllowCluster("eu-1"), "", ""},
		"under another cluster":      {m.svid(t, shopEU, t0), identity.AllowCluster("eu"), "", "does not lie under"},
		"in the live set":            {m.svid(t, gatewayUS, t0), live.Allow(), "", ""},
		"gone from the live set":     {m.svid(t, gatewayUS, t0), gone.Allow(), "", "not among the allowed"},
		"either":                     {m.svid(t, agentEU, t0), identity.AllowEither(identity.AllowGatewayOf("eu-1"), identity.AllowAgentOf("eu-1")), "", ""},
		"either of none":             {m.svid(t, agentEU, t0), identity.AllowEither(), "", "nobody may"},
		"nothing was said":           {m.svid(t, ctl, t0), nil, "", "nobody may"},
		"a denied one":               {m.svid(t, gatewayUS, t0), identity.AllowAny(), "us-1", "is denied"},
		"an operator as a server":    {m.svid(t, ada, t0), identity.AllowAny(), "", "operators are no peers of the mesh"},
		"another mesh":               {stranger.svid(t, ctl, t0), identity.AllowAny(), "", "leads to no root"},
	} {
		t.Run(name, func(t *testing.T) {
			denials := new(identity.Denials)
			if c.denied != "" {
				denials.Deny(identity.Denial{Cluster: c.denied, Generation: 1})
			}
			v := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: m.bundle, Operators: m.people, Denials: denials})
			open := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: m.bundle})
			got := meet(t,
				open.Server(identity.ServerConfig{SVID: c.server, Authorize: identity.AllowAny()}),
				v.Client(identity.ClientConfig{SVID: m.svid(t, agentEU, t0), Authorize: c.authorize}))
			if c.says == "" {
				if p, ok := v.PeerOf(got.clientView); got.client != nil || !ok || p.ID != c.server.ID {
					t.Errorf("client: %v, peer %v", got.client, p)
				}
				return
			}
			if got.client == nil || !strings.Contains(got.client.Error(), c.says) {
				t.Errorf("client: %v, want %q", got.client, c.says)
			}
		})
	}
}

func TestConnectionsAreTLS13WithALPNAndNeverResumed(t *testing.T) {
	m := newMesh(t, t0)
	now := t0.Add(time.Hour)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: m.bundle})
	server := v.Server(identity.ServerConfig{SVID: m.svid(t, gatewayUS, t0), Authorize: identity.AllowAny(), NextProtos: []string{"weft/1"}})
	clientFor := func(protos ...string) *tls.Config {
		return v.Client(identity.ClientConfig{SVID: m.svid(t, gatewayEU, t0), Authorize: identity.AllowAny(), NextProtos: protos})
	}

	good := meet(t, server, clientFor("weft/1"))
	if good.client != nil || good.clientView.Version != tls.VersionTLS13 || good.clientView.CurveID != tls.X25519MLKEM768 {
		t.Fatalf("%v, version %x, key exchange %v", good.client, good.clientView.Version, good.clientView.CurveID)
	}
	if got := meet(t, server, clientFor()); got.server == nil || !strings.Contains(got.server.Error(), "no application protocol") {
		t.Errorf("a client without ALPN: %v", got.server)
	}
	if got := meet(t, server, clientFor("h2")); got.server == nil {
		t.Error("a client with another ALPN is accepted")
	}
	plain := v.Server(identity.ServerConfig{SVID: m.svid(t, gatewayUS, t0), Authorize: identity.AllowAny()})
	if got := meet(t, plain, clientFor("weft/1")); got.client == nil || !strings.Contains(got.client.Error(), "no application protocol") {
		t.Errorf("a server without ALPN: %v", got.client)
	}
	old := clientFor("weft/1")
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if got := meet(t, server, old); got.server == nil || !strings.Contains(got.server.Error(), "version") {
		t.Errorf("TLS 1.2: %v", got.server)
	}

	for side, c := range map[string]*tls.Config{"server": server, "client": clientFor(), "pinned": identity.PinnedClient(identity.Pin{}, at(now), nil)} {
		if off := c.Time().Sub(now); off < 0 || off > time.Minute || !c.DynamicRecordSizingDisabled || !c.SessionTicketsDisabled || c.ClientSessionCache != nil {
			t.Errorf("%s: its clock is %v off, tickets %v", side, off, c.SessionTicketsDisabled)
		}
	}

	// A client that would resume, if it could, gets no ticket to do it with.
	keen := clientFor("weft/1")
	keen.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	keen.ServerName = "us-1.t.weft"
	for range 3 {
		if got := meet(t, server, keen); got.client != nil || got.clientView.DidResume || got.servView.DidResume {
			t.Fatalf("resumed: %v, %v", got.clientView.DidResume, got.client)
		}
	}
}

func TestPeerOfBelievesNothingThatWasNotVerified(t *testing.T) {
	m := newMesh(t, t0)
	now := t0.Add(time.Hour)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: m.bundle})
	chain, _ := m.leaf(t, spiffeid.RequireFromString(agentEU), t0)
	if p, ok := v.PeerOf(tls.ConnectionState{HandshakeComplete: true, PeerCertificates: chain}); ok {
		t.Errorf("a state from nowhere proves %v", p)
	}
	// A peer that is known, on a connection that is not complete.
	first := meet(t, v.Server(identity.ServerConfig{SVID: m.svid(t, ctl, t0), Authorize: identity.AllowAny()}), v.Client(identity.ClientConfig{SVID: m.svid(t, agentEU, t0), Authorize: identity.AllowAny()}))
	if _, ok := v.PeerOf(first.servView); !ok {
		t.Fatal("a verified peer is not known")
	}
	first.servView.HandshakeComplete = false
	if p, ok := v.PeerOf(first.servView); ok {
		t.Errorf("half a handshake proves %v", p)
	}
	// A true connection of a config that this verifier has not made.
	careless := v.Server(identity.ServerConfig{SVID: m.svid(t, ctl, t0), Authorize: identity.AllowAny()})
	careless.VerifyConnection = nil
	got := meet(t, careless, v.Client(identity.ClientConfig{SVID: m.svid(t, agentEU, t0), Authorize: identity.AllowAny()}))
	if got.client != nil {
		t.Fatal(got.client)
	}
	if p, ok := v.PeerOf(got.servView); ok {
		t.Errorf("a connection that was not verified proves %v", p)
	}
	if err := v.Recheck(got.servView); err == nil {
		t.Error("and it passes a second check")
	}
}
