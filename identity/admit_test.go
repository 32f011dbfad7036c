package identity_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/identity"
)

func TestWhoGetsWhichIdentity(t *testing.T) {
	csr := must(identity.NewCSR(must(identity.NewKey())(t)))(t)
	as := func(id string) identity.Asker { return identity.PeerAsks(peer(t, id)) }
	const (
		agentUS = "spiffe://mesh.example/cluster/us-1/agent"
		shopUS  = "spiffe://mesh.example/cluster/us-1/ns/shop/sa/cart"
		ctl1    = "spiffe://mesh.example/controller/c-1"
		foreign = "spiffe://other.example/cluster/eu-1/agent"
	)
	for _, c := range []struct {
		asker identity.Asker
		want  string // empty: the asker's own
		gets  string // or refused, for the reason
		why   identity.RefusalReason
	}{
		{identity.TokenAsks("eu-1"), "", agentEU, 0},
		{identity.TokenAsks("eu-1"), agentEU, agentEU, 0},
		{identity.TokenAsks("eu-1"), gatewayEU, "", identity.RefusedNotYours},
		{identity.TokenAsks("eu-1"), shopEU, "", identity.RefusedNotYours},
		{identity.TokenAsks("eu-1"), agentUS, "", identity.RefusedNotYours},
		{identity.TokenAsks("eu-1"), ctl, "", identity.RefusedNotYours},
		{identity.TokenAsks("eu-1"), ada, "", identity.RefusedNotYours},
		{identity.TokenAsks("eu-1"), foreign, "", identity.RefusedTrustDomain},
		{identity.TokenAsks("eu/../us"), "", "", identity.RefusedAsker},

		{as(agentEU), "", agentEU, 0},
		{as(agentEU), agentEU, agentEU, 0},
		{as(agentEU), gatewayEU, gatewayEU, 0},
		{as(agentEU), shopEU, shopEU, 0},
		{as(agentEU), agentUS, "", identity.RefusedNotYours},
		{as(agentEU), gatewayUS, "", identity.RefusedNotYours},
		{as(agentEU), shopUS, "", identity.RefusedNotYours},
		{as(agentEU), "spiffe://mesh.example/cluster/eu-1.x/agent", "", identity.RefusedNotYours},
		{as(agentEU), "spiffe://mesh.example/cluster/eu/agent", "", identity.RefusedNotYours},
		{as(agentEU), ctl, "", identity.RefusedNotYours},
		{as(agentEU), ada, "", identity.RefusedNotYours},
		{as(agentEU), foreign, "", identity.RefusedTrustDomain},
		{as(agentEU), "spiffe://mesh.example/cluster/eu-1", "", identity.RefusedIdentity},
		{as(agentEU), "spiffe://mesh.example", "", identity.RefusedIdentity},

		{as(gatewayEU), "", gatewayEU, 0},
		{as(gatewayEU), agentEU, "", identity.RefusedNotYours},
		{as(gatewayEU), shopEU, "", identity.RefusedNotYours},
		{as(shopEU), shopEU, shopEU, 0},
		{as(shopEU), gatewayEU, "", identity.RefusedNotYours},
		{as(shopEU), "spiffe://mesh.example/cluster/eu-1/ns/shop/sa/cart2", "", identity.RefusedNotYours},
		{as(ctl), "", ctl, 0},
		{as(ctl), ctl1, "", identity.RefusedNotYours},
		{as(ctl), agentEU, "", identity.RefusedNotYours},

		{as(ada), "", "", identity.RefusedAsker},
		{as(ada), agentEU, "", identity.RefusedAsker},
		{as(foreign), "", "", identity.RefusedAsker},
		{as(foreign), agentEU, "", identity.RefusedAsker},
		{identity.Asker{}, "", "", identity.RefusedAsker},
		{identity.Asker{}, agentEU, "", identity.RefusedAsker},
		{identity.PeerAsks(identity.Peer{}), agentEU, "", identity.RefusedAsker},
	} {
		var want spiffeid.ID
		if c.want != "" {
			want = spiffeid.RequireFromString(c.want)
		}
		got, err := identity.Admit(td, c.asker, want, csr)
		if c.why == 0 {
			if err != nil || got.ID.String() != c.gets || got.Key == nil {
				t.Errorf("%s asks for %q: %s, %v", c.asker, c.want, got.ID, err)
			}
			continue
		}
		refusal := (*identity.Refusal)(nil)
		if !errors.As(err, &refusal) || refusal.Reason != c.why || !got.ID.IsZero() || got.Key != nil {
			t.Errorf("%s asks for %q: %s, %v; want it refused for %s", c.asker, c.want, got.ID, err, c.why)
		} else if !strings.Contains(err.Error(), c.asker.String()) || c.want != "" && !strings.Contains(err.Error(), c.want) {
			t.Errorf("the error does not say who asks for what: %v", err)
		}
	}
}

func TestCSRsThatAreRefused(t *testing.T) {
	key := must(identity.NewKey())(t)
	request := func(key crypto.Signer) []byte {
		return must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))(t)
	}
	good := request(key)
	badSignature := append([]byte(nil), good...)
	badSignature[len(badSignature)-3] ^= 1
	// The key of one request in another one, whose signature does not fit.
	other := request(must(identity.NewKey())(t))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		csr []byte
		why identity.RefusalReason
	}{
		"RSA 2048":           {request(must(rsa.GenerateKey(rand.Reader, 2048))(t)), identity.RefusedKey},
		"RSA 1024":           {request(weakRSA(t)), identity.RefusedKey},
		"P-224":              {request(must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))(t)), identity.RefusedKey},
		"P-384":              {request(must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t)), identity.RefusedKey},
		"Ed25519":            {request(ed), identity.RefusedKey},
		"a broken signature": {badSignature, identity.RefusedCSR},
		"another's key":      {swapKey(t, good, other), identity.RefusedCSR},
		"nothing":            {nil, identity.RefusedCSR},
		"junk":               {[]byte("junk"), identity.RefusedCSR},
		"cut":                {good[:len(good)-1], identity.RefusedCSR},
		"something after it": {append(append([]byte(nil), good...), 0), identity.RefusedCSR},
		"huge":               {make([]byte, 1<<20), identity.RefusedCSR},
		"a certificate":      {newMesh(t, t0).root.Root().Raw, identity.RefusedCSR},
		"much too long": {must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: strings.Repeat("x", 20<<10)},
		}, key))(t), identity.RefusedCSR},
	} {
		for who, admit := range map[string]func() (identity.Admitted, error){
			"a token": func() (identity.Admitted, error) {
				return identity.Admit(td, identity.TokenAsks("eu-1"), spiffeid.ID{}, c.csr)
			},
			"an operator": func() (identity.Admitted, error) { return identity.AdmitOperator(td, "ada", c.csr) },
		} {
			refusal := (*identity.Refusal)(nil)
			if got, err := admit(); !errors.As(err, &refusal) || refusal.Reason != c.why {
				t.Errorf("%s of %s: %v, %v", name, who, got.ID, err)
			}
		}
	}
	if got, err := identity.AdmitOperator(td, "ada", good); err != nil || got.ID.String() != ada {
		t.Errorf("%v, %v", got.ID, err)
	}
	if _, err := identity.AdmitOperator(td, "ada/../../cluster", good); err == nil {
		t.Error("an operator's name holds a path")
	}
}

// smuggler asks for everything that a CSR can ask for.
func smuggler(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	basic := must(asn1.Marshal(struct {
		IsCA bool
	}{true}))(t)
	usage := must(asn1.Marshal(asn1.BitString{Bytes: []byte{0x06}, BitLength: 7}))(t)
	link := func(s string) *url.URL { return must(url.Parse(s))(t) }
	return must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "controller", Organization: []string{"system:masters"}},
		URIs:           []*url.URL{link(ctl), link("spiffe://mesh.example/cluster/us-1/agent")},
		DNSNames:       []string{"mesh.example", "*"},
		IPAddresses:    []net.IP{net.IPv4(127, 0, 0, 1)},
		EmailAddresses: []string{"ada@mesh.example"},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: basic},
			{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: usage},
		},
	}, key))(t)
}

// Whatever the bytes of a CSR are: no panic, and a leaf that is signed for it
// holds the admitted identity and key, and nothing else that the CSR asks for.
func FuzzAdmitAndSign(f *testing.F) {
	key := must(identity.NewKey())(f)
	plain := must(identity.NewCSR(key))(f)
	f.Add(plain)
	f.Add(smuggler(f, key))
	f.Add(smuggler(f, weakRSA(f)))
	f.Add(swapKey(f, plain, must(identity.NewCSR(must(identity.NewKey())(f)))(f)))
	f.Add([]byte{})
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----"))
	m := newMesh(f, t0)
	f.Fuzz(func(t *testing.T, csr []byte) {
		want := spiffeid.RequireFromString(shopEU)
		admitted, err := identity.Admit(td, identity.PeerAsks(peer(t, agentEU)), want, csr)
		if err != nil {
			return
		}
		asked := must(x509.ParseCertificateRequest(csr))(t)
		leaf := must(m.region.SignLeaf(admitted, m.lifetimes, t0))(t)[0]
		switch {
		case len(leaf.URIs) != 1 || leaf.URIs[0].String() != shopEU:
			t.Errorf("URIs %v", leaf.URIs)
		case len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0:
			t.Errorf("other names: %v %v %v", leaf.DNSNames, leaf.IPAddresses, leaf.EmailAddresses)
		case leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature:
			t.Errorf("CA %v, usage %b", leaf.IsCA, leaf.KeyUsage)
		case leaf.Subject.String() != "O=mesh.example":
			t.Errorf("subject %s", leaf.Subject)
		case len(leaf.Extensions) != 5: // key usage, extended, basic constraints, authority key id, SAN
			t.Errorf("extensions %v", leaf.Extensions)
		case !asked.PublicKey.(*ecdsa.PublicKey).Equal(leaf.PublicKey):
			t.Error("another key")
		}
	})
}

func weakRSA(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	t.(interface{ Setenv(key, value string) }).Setenv("GODEBUG", "rsa1024min=0")
	return must(rsa.GenerateKey(rand.Reader, 1024))(t)
}

// swapKey puts the key of one P-256 CSR in another's place.
func swapKey(t testing.TB, into, from []byte) []byte {
	t.Helper()
	a, b := must(x509.ParseCertificateRequest(into))(t), must(x509.ParseCertificateRequest(from))(t)
	swapped := strings.Replace(string(into), string(a.RawSubjectPublicKeyInfo), string(b.RawSubjectPublicKeyInfo), 1)
	if swapped == string(into) {
		t.Fatal("nothing was swapped")
	}
	return []byte(swapped)
}
