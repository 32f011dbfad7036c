package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// AuthorityKind says what an authority signs.
type AuthorityKind uint8

// The kinds of authority.
const (
	KindRoot      AuthorityKind = iota + 1 // signs region authorities; every verifier's anchor
	KindRegion                             // signs the leaves of the mesh
	KindOperators                          // signs people; trusted by controllers only
)

var kindNames = [...]string{"", "root", "region", "operators"}

func (k AuthorityKind) String() string {
	if k > 0 && int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Authority is a signing CA: its certificate, the way up to its root, and its
// private key. It is immutable and safe for concurrent use. The key leaves it
// sealed only (Seal), and never prints.
//
// Authorities use ECDSA P-256 like the leaves: Go verifies a P-384 signature
// about ten times slower, and every first handshake with a peer verifies the
// signatures of its whole chain.
type Authority struct {
	kind   AuthorityKind
	td     spiffeid.TrustDomain
	region string              // of a region's authority
	chain  []*x509.Certificate // own certificate first, root last
	key    crypto.Signer
}

// NewRoot makes a self-signed root for the trust domain. now is the clock's
// present; lifetimes that break the rule of Lifetimes.Check are refused.
func NewRoot(td spiffeid.TrustDomain, l Lifetimes, now time.Time) (*Authority, error) {
	return newAnchor(KindRoot, td, l, now)
}

// NewOperators makes the self-signed authority for people. It is not part of
// the mesh's bundle, so that an operator's credential never verifies as a
// mesh peer's, nor the reverse.
func NewOperators(td spiffeid.TrustDomain, l Lifetimes, now time.Time) (*Authority, error) {
	return newAnchor(KindOperators, td, l, now)
}

func newAnchor(kind AuthorityKind, td spiffeid.TrustDomain, l Lifetimes, now time.Time) (*Authority, error) {
	if err := errors.Join(l.Check(), CheckTrustDomain(td)); err != nil {
		return nil, err
	}
	template := authorityTemplate(td, l, now)
	template.Subject.CommonName = td.Name() + " " + kind.String()
	switch kind {
	case KindRoot:
		template.NotAfter = now.Add(l.Root)
		template.MaxPathLen = 1 // regions below it, and nothing below them but leaves
	case KindOperators:
		template.NotAfter = now.Add(l.Operators)
		template.MaxPathLen, template.MaxPathLenZero = 0, true
		constrainTo(template, td)
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("identity: sign the %s authority of %s: %w", kind, td, err)
	}
	return &Authority{kind: kind, td: td, chain: []*x509.Certificate{cert}, key: key}, nil
}

// NewRegion makes the authority of a region, signed by the root a. region is a
// DNS label. It is refused when a has less than the new authority's life left.
func (a *Authority) NewRegion(region string, l Lifetimes, now time.Time) (*Authority, error) {
	if a.kind != KindRoot {
		return nil, fmt.Errorf("identity: the %s cannot sign a region's authority, only a root can", a)
	}
	if err := federation.CheckLabel(region); err != nil {
		return nil, fmt.Errorf("identity: region %q: %w", region, err)
	}
	if err := l.Check(); err != nil {
		return nil, err
	}
	if left := a.NotAfter().Sub(now); left < l.Region {
		return nil, fmt.Errorf("identity: the %s ends in %v, sooner than a region's authority of %v would: rotate the root first", a, left, l.Region)
	}
	template := authorityTemplate(a.td, l, now)
	template.Subject.CommonName = a.td.Name() + " region " + region
	template.Subject.OrganizationalUnit = []string{region}
	template.NotAfter = now.Add(l.Region)
	template.MaxPathLen, template.MaxPathLenZero = 0, true
	constrainTo(template, a.td)
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	cert, err := sign(template, a.chain[0], key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("identity: sign the authority of region %s: %w", region, err)
	}
	return &Authority{
		kind: KindRegion, td: a.td, region: region, key: key,
		chain: append([]*x509.Certificate{cert}, a.chain...),
	}, nil
}

// CanSign says whether a, activated now, would live long enough for leaves of
// the given life: at least 6 times as long. An authority that is active
// already signs until its end.
func (a *Authority) CanSign(leaf time.Duration, now time.Time) error {
	if left := a.NotAfter().Sub(now); left < minRatio*leaf {
		return fmt.Errorf("identity: the %s has %v left, less than %d times a leaf's %v: make a new authority", a, left, minRatio, leaf)
	}
	return nil
}

// SignLeaf signs an SVID for an admitted identity. A region's authority signs
// the mesh's roles for l.Leaf, the operators' authority signs operators for
// l.Operator; neither signs the other's, and no leaf outlives its issuer.
//
// The result is the chain to hand out: the leaf, then the authorities up to
// but without the root. The caller journals the serial before it lets the
// chain leave.
func (a *Authority) SignLeaf(who Admitted, l Lifetimes, now time.Time) ([]*x509.Certificate, error) {
	return a.SignLeafFor(who, l.leafLife(a.kind), l, now)
}

// SignLeafFor is SignLeaf with a shorter life than the kind's own.
func (a *Authority) SignLeafFor(who Admitted, life time.Duration, l Lifetimes, now time.Time) ([]*x509.Certificate, error) {
	subject, err := ParseID(who.ID)
	if err != nil {
		return nil, err
	}
	switch {
	case subject.ID.TrustDomain() != a.td:
		return nil, fmt.Errorf("identity: the %s cannot sign %s: it is of another trust domain", a, who.ID)
	case a.kind == KindRoot:
		return nil, fmt.Errorf("identity: the %s signs regions only: let a region's authority sign %s", a, who.ID)
	case (subject.Role == RoleOperator) != (a.kind == KindOperators):
		return nil, fmt.Errorf("identity: the %s does not sign %ss such as %s", a, subject.Role, who.ID)
	case life <= 0 || life > l.leafLife(a.kind):
		return nil, fmt.Errorf("identity: a life of %v for %s: it must be positive and at most %v", life, who.ID, l.leafLife(a.kind))
	case !now.Before(a.NotAfter()):
		return nil, fmt.Errorf("identity: the %s ended at %s: activate a new authority", a, a.NotAfter().UTC().Format(time.RFC3339))
	}
	if err := checkLeafKey(who.Key); err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	notAfter := now.Add(life)
	if notAfter.After(a.NotAfter()) {
		notAfter = a.NotAfter()
	}
	notBefore := now.Add(-l.Backdate)
	if notBefore.Before(a.chain[0].NotBefore) {
		notBefore = a.chain[0].NotBefore
	}
	leaf, err := sign(&x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{a.td.Name()}},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		URIs:                  []*url.URL{who.ID.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, a.chain[0], who.Key, a.key)
	if err != nil {
		return nil, fmt.Errorf("identity: sign %s: %w", who.ID, err)
	}
	return append([]*x509.Certificate{leaf}, a.chain[:len(a.chain)-1]...), nil
}

func (l Lifetimes) leafLife(k AuthorityKind) time.Duration {
	if k == KindOperators {
		return l.Operator
	}
	return l.Leaf
}

// Kind is what the authority signs.
func (a *Authority) Kind() AuthorityKind { return a.kind }

// TrustDomain is the one that the authority is constrained to.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// Region is the region's name; empty for the other kinds.
func (a *Authority) Region() string { return a.region }

// Certificate is the authority's own. Do not change it.
func (a *Authority) Certificate() *x509.Certificate { return a.chain[0] }

// Root is the anchor above the authority, which may be itself.
func (a *Authority) Root() *x509.Certificate { return a.chain[len(a.chain)-1] }

// NotAfter is the authority's end.
func (a *Authority) NotAfter() time.Time { return a.chain[0].NotAfter }

// Serial is the authority certificate's serial number in hex.
func (a *Authority) Serial() string { return SerialOf(a.chain[0]) }

// String names the authority; it never holds the key.
func (a *Authority) String() string {
	name := a.kind.String() + " authority of " + a.td.Name()
	if a.kind == KindRegion {
		name = "authority of region " + a.region
	}
	return name + " (serial " + a.Serial()[:8] + ")"
}

// GoString keeps %#v from printing the key.
func (a *Authority) GoString() string { return a.String() }

// LogValue logs what an operator needs to tell authorities apart.
func (a *Authority) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("kind", a.kind.String()),
		slog.String("region", a.region),
		slog.String("serial", a.Serial()),
		slog.Time("notAfter", a.NotAfter()),
	)
}

// MarshalJSON refuses: an authority is stored by Seal only.
func (a *Authority) MarshalJSON() ([]byte, error) {
	return nil, errors.New("identity: an authority holds a private key: store it with Seal")
}

// NewKey makes an ECDSA P-256 key, the only kind that Weft uses.
func NewKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("identity: make a P-256 key: %w", err)
	}
	return key, nil
}

// NewCSR asks for a certificate for key. It names nobody: which identity the
// key gets follows from who asks, and the request beside the CSR.
func NewCSR(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("identity: make a CSR: %w", err)
	}
	return der, nil
}

// SerialOf is a certificate's serial number in hex, 32 digits: the key of its
// journal entry.
func SerialOf(cert *x509.Certificate) string {
	return fmt.Sprintf("%032x", cert.SerialNumber)
}

// KeyHash is the SHA-256 of a public key's SubjectPublicKeyInfo in hex: how a
// registration names the key that enrolled.
func KeyHash(pub crypto.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("identity: hash a public key: %w", err)
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:]), nil
}

func authorityTemplate(td spiffeid.TrustDomain, l Lifetimes, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{td.Name()}},
		NotBefore:             now.Add(-l.Backdate),
		URIs:                  []*url.URL{td.ID().URL()},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
}

// constrainTo limits an authority to URIs of the trust domain. The constraint
// sees the host only: it keeps other trust domains out, and cannot tell
// clusters apart, which is why no cluster holds an authority.
func constrainTo(template *x509.Certificate, td spiffeid.TrustDomain) {
	template.PermittedDNSDomainsCritical = true // the field's name is history: it marks the whole extension
	template.PermittedURIDomains = []string{td.Name()}
}

func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	if template.SerialNumber == nil {
		serial, err := newSerial()
		if err != nil {
			return nil, err
		}
		template.SerialNumber = serial
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial is a random serial number of 128 bits. Its top bits are 01, so
// that it is positive, never short, and 16 bytes in DER.
func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("identity: make a serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:]), nil
}
