package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Pin is the SHA-256 of a root's SubjectPublicKeyInfo. It travels beside a
// join token and lets an agent that trusts nobody yet recognise the mesh. It
// is no secret.
type Pin [sha256.Size]byte

const pinPrefix = "sha256:"

// PinOf is a certificate's pin.
func PinOf(cert *x509.Certificate) Pin { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// ParsePin reads sha256:HEX.
func ParsePin(text string) (Pin, error) {
	digits, ok := strings.CutPrefix(strings.TrimSpace(text), pinPrefix)
	raw, err := hex.DecodeString(digits)
	if !ok || err != nil || len(raw) != sha256.Size {
		return Pin{}, fmt.Errorf("identity: %.80q is not a CA hash: it is %s and 64 hex digits, as `weft cluster register` printed it", text, pinPrefix)
	}
	return Pin(raw), nil
}

// String is sha256:HEX.
func (p Pin) String() string { return pinPrefix + hex.EncodeToString(p[:]) }

// MarshalText is String.
func (p Pin) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is ParsePin.
func (p *Pin) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePin(string(text))
	return err
}

// PinError says that a server's roots do not match the pin.
type PinError struct {
	Want Pin
	Got  []Pin // of the roots that the server presented
}

func (e *PinError) Error() string {
	got := make([]string, len(e.Got))
	for i, p := range e.Got {
		got[i] = p.String()
	}
	seen := strings.Join(got, ", ")
	if seen == "" {
		seen = "no root at all"
	}
	return fmt.Sprintf("identity: this is not the mesh that the CA hash names: expected %s, the server showed %s: check the controller's address, or register the cluster again if the mesh's root has changed", e.Want, seen)
}

// Pinned is what a verified pin proves.
type Pinned struct {
	Controller spiffeid.ID
	Root       *x509.Certificate // the one that the pin names: trust it from now on
}

// Bundle starts the agent's trust: the pinned root alone, at sequence 0, so
// that the first bundle that a controller hands out replaces it.
func (p Pinned) Bundle() (*Bundle, error) {
	return NewBundle(p.Controller.TrustDomain(), 0, []*x509.Certificate{p.Root})
}

// VerifyPin checks a server's chain, as it presented it, against a pin: the
// chain must hold a self-signed root whose key the pin names, the leaf must
// verify up to that root at the given time, and be a controller's of the
// root's own trust domain. The error is *PinError where the root does not
// match.
func VerifyPin(presented []*x509.Certificate, pin Pin, now time.Time) (Pinned, error) {
	if len(presented) == 0 {
		return Pinned{}, errors.New("identity: the server showed no certificate")
	}
	if len(presented) > maxChain {
		return Pinned{}, fmt.Errorf("identity: the server showed %d certificates, at most %d are read", len(presented), maxChain)
	}
	mismatch := &PinError{Want: pin}
	var root *x509.Certificate
	for _, cert := range presented {
		if !isSelfSigned(cert) {
			continue
		}
		got := PinOf(cert)
		if got == pin {
			root = cert
			break
		}
		mismatch.Got = append(mismatch.Got, got)
	}
	if root == nil {
		return Pinned{}, mismatch
	}
	if len(root.URIs) != 1 {
		return Pinned{}, errors.New("identity: the pinned root names no trust domain: it is not a Weft mesh's")
	}
	td, err := spiffeid.TrustDomainFromURI(root.URIs[0])
	if err != nil {
		return Pinned{}, fmt.Errorf("identity: the pinned root names no trust domain: %w", err)
	}
	id, _, err := x509svid.Verify(presented, x509bundle.FromX509Authorities(td, []*x509.Certificate{root}), x509svid.WithTime(now))
	if err != nil {
		return Pinned{}, fmt.Errorf("identity: the server's chain does not lead to the pinned root: %w", err)
	}
	subject, err := ParseID(id)
	if err != nil {
		return Pinned{}, err
	}
	if subject.Role != RoleController {
		return Pinned{}, fmt.Errorf("identity: the server is %s, a %s, and not a controller: check the address to join by", id, subject.Role)
	}
	return Pinned{Controller: id, Root: root}, nil
}

// isSelfSigned reports whether cert is a CA that signed itself. The signature
// counts: without it, anybody could append a copy of a root's public key in a
// certificate with other names in it.
func isSelfSigned(cert *x509.Certificate) bool {
	return cert.IsCA && bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignatureFrom(cert) == nil
}
