package identity_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/identity"
)

// forge signs any identity with an authority's stolen key, which it takes out
// of the authority's sealed record as a thief with the key file would.
func forge(t testing.TB, by *identity.Authority, id spiffeid.ID, now time.Time) []*x509.Certificate {
	t.Helper()
	chain, _ := forgeTemplate(t, by, &x509.Certificate{
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	})
	return chain
}

func forgeTemplate(t testing.TB, by *identity.Authority, template *x509.Certificate) ([]*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := must(identity.NewKey())(t)
	template.SerialNumber = big.NewInt(1)
	der := must(x509.CreateCertificate(rand.Reader, template, by.Certificate(), &key.PublicKey, steal(t, by)))(t)
	leaf := must(x509.ParseCertificate(der))(t)
	return []*x509.Certificate{leaf, by.Certificate()}, key
}

func steal(t testing.TB, by *identity.Authority) *ecdsa.PrivateKey {
	t.Helper()
	kek := must(identity.NewKEK(make([]byte, 32)))(t)
	record := must(by.Seal(kek, "stolen"))(t)
	var stored struct{ SealedKey []byte }
	data := must(record.Marshal())(t)
	if err := json.Unmarshal(data, &stored); err != nil {
		t.Fatal(err)
	}
	der := must(kek.Open(identity.SealName("stolen", by.Certificate()), stored.SealedKey))(t)
	return must(x509.ParsePKCS8PrivateKey(der))(t).(*ecdsa.PrivateKey)
}
