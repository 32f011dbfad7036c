package xds

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"testing"
)

// testRoots are the roots in testdata/roots.pem: fixed, so that scripts print
// the same bytes each time. Nothing checks their dates.
func testRoots(t testing.TB) []*x509.Certificate {
	t.Helper()
	rest, err := os.ReadFile("testdata/roots.pem")
	if err != nil {
		t.Fatal(err)
	}
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return roots
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, c)
	}
}
