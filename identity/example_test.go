package identity_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
)

// From a new root to a connection between two gateways that know each other.
// A process that lives longer than a leaf takes a Source where this example
// has a signed SVID.
func Example() {
	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	lifetimes := identity.DefaultLifetimes()
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}

	root, err := identity.NewRoot(td, lifetimes, time.Now())
	check(err)
	region, err := root.NewRegion("eu", lifetimes, time.Now())
	check(err)
	bundle, err := identity.NewBundle(td, 1, []*x509.Certificate{root.Root()})
	check(err)

	svid := func(cluster string) *x509svid.SVID {
		key, err := identity.NewKey()
		check(err)
		csr, err := identity.NewCSR(key)
		check(err)
		// The agent of a cluster asks for its gateway, with the gateway's key.
		agent, err := identity.ParseID(spiffeid.RequireFromSegments(td, "cluster", cluster, "agent"))
		check(err)
		gateway := spiffeid.RequireFromSegments(td, "cluster", cluster, "gateway")
		admitted, err := identity.Admit(td, identity.PeerAsks(identity.Peer{Subject: agent}), gateway, csr)
		check(err)
		chain, err := region.SignLeaf(admitted, lifetimes, time.Now())
		check(err)
		return &x509svid.SVID{ID: gateway, Certificates: chain, PrivateKey: key}
	}

	verifier := identity.NewVerifier(identity.VerifierConfig{Clock: clock.Real(), Mesh: bundle})
	near, far := net.Pipe()
	client := tls.Client(near, verifier.Client(identity.ClientConfig{
		SVID: svid("eu-1"), Authorize: identity.AllowGatewayOf("us-1"), NextProtos: []string{"weft/1"},
	}))
	server := tls.Server(far, verifier.Server(identity.ServerConfig{
		SVID: svid("us-1"), Authorize: identity.AllowRole(identity.RoleGateway), NextProtos: []string{"weft/1"},
	}))
	go func() { check(client.Handshake()) }()
	check(server.Handshake())

	peer, ok := verifier.PeerOf(server.ConnectionState())
	fmt.Println(ok, peer.Role, "of", peer.Cluster)
	// Output: true gateway of eu-1
}
