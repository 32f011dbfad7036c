package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxRoots bounds a bundle. A rotation needs two roots; more than a few are a
// mistake that every handshake would pay for.
const maxRoots = 16

// Bundle is the roots of one trust domain, with a sequence number that grows
// with every change. It is immutable and safe for concurrent use, and an
// x509bundle.Source for its trust domain.
type Bundle struct {
	td       spiffeid.TrustDomain
	sequence uint64
	roots    []*x509.Certificate // sorted by DER, unique
	digest   [sha256.Size]byte   // of all of the above
	x509     *x509bundle.Bundle  // ours alone: never handed out to be changed
}

// NewBundle makes a bundle of roots in any order. An empty one is refused: it
// would cut the whole trust domain off.
func NewBundle(td spiffeid.TrustDomain, sequence uint64, roots []*x509.Certificate) (*Bundle, error) {
	switch {
	case td.IsZero():
		return nil, errors.New("identity: a bundle needs a trust domain")
	case len(roots) == 0:
		return nil, fmt.Errorf("identity: the bundle of %s holds no root: nobody would be trusted", td)
	}
	sorted := slices.Clone(roots)
	slices.SortFunc(sorted, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	sorted = slices.CompactFunc(sorted, func(a, b *x509.Certificate) bool { return a.Equal(b) })
	if len(sorted) > maxRoots {
		return nil, fmt.Errorf("identity: the bundle of %s holds %d roots, at most %d are allowed: remove the retired ones", td, len(sorted), maxRoots)
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%d\x00", td.Name(), sequence)
	for _, root := range sorted {
		if !root.IsCA {
			return nil, fmt.Errorf("identity: the bundle of %s holds a certificate (serial %s) that is no CA's", td, SerialOf(root))
		}
		sum := sha256.Sum256(root.Raw)
		h.Write(sum[:])
	}
	b := &Bundle{td: td, sequence: sequence, roots: sorted, x509: x509bundle.FromX509Authorities(td, sorted)}
	h.Sum(b.digest[:0])
	return b, nil
}

// ParseBundle reads a SPIFFE bundle document (JSON) of the trust domain. A
// document without a sequence number has sequence 0.
func ParseBundle(td spiffeid.TrustDomain, document []byte) (*Bundle, error) {
	parsed, err := spiffebundle.Parse(td, document)
	if err != nil {
		return nil, fmt.Errorf("identity: parse the bundle of %s: %w", td, err)
	}
	sequence, _ := parsed.SequenceNumber()
	return NewBundle(td, sequence, parsed.X509Authorities())
}

// ParseBundlePEM reads roots in PEM, to which the caller gives a sequence.
func ParseBundlePEM(td spiffeid.TrustDomain, sequence uint64, data []byte) (*Bundle, error) {
	roots, err := DecodePEM(data)
	if err != nil {
		return nil, fmt.Errorf("identity: parse the bundle of %s: %w", td, err)
	}
	return NewBundle(td, sequence, roots)
}

// Marshal is the SPIFFE bundle document, with the sequence.
func (b *Bundle) Marshal() ([]byte, error) {
	document := spiffebundle.FromX509Authorities(b.td, b.roots)
	document.SetSequenceNumber(b.sequence)
	data, err := document.Marshal()
	if err != nil {
		return nil, fmt.Errorf("identity: marshal the bundle of %s: %w", b.td, err)
	}
	return data, nil
}

// PEM is the roots in PEM.
func (b *Bundle) PEM() []byte { return EncodePEM(b.roots) }

// TrustDomain is the one whose roots these are.
func (b *Bundle) TrustDomain() spiffeid.TrustDomain { return b.td }

// Sequence grows with every change of the roots.
func (b *Bundle) Sequence() uint64 { return b.sequence }

// Roots are the trusted certificates, in a fixed order. The slice is a copy.
func (b *Bundle) Roots() []*x509.Certificate { return slices.Clone(b.roots) }

// Pins are the pins of the roots, in the same order.
func (b *Bundle) Pins() []Pin {
	pins := make([]Pin, len(b.roots))
	for i, root := range b.roots {
		pins[i] = PinOf(root)
	}
	return pins
}

// Has reports whether cert is one of the roots.
func (b *Bundle) Has(cert *x509.Certificate) bool {
	return slices.ContainsFunc(b.roots, cert.Equal)
}

// With is b with one root more, at the next sequence; b itself if it has it.
func (b *Bundle) With(root *x509.Certificate) (*Bundle, error) {
	if b.Has(root) {
		return b, nil
	}
	return NewBundle(b.td, b.sequence+1, append(b.Roots(), root))
}

// Without is b with one root less, at the next sequence; b itself if it has
// none such. The last root cannot be removed.
func (b *Bundle) Without(root *x509.Certificate) (*Bundle, error) {
	if !b.Has(root) {
		return b, nil
	}
	return NewBundle(b.td, b.sequence+1, slices.DeleteFunc(b.Roots(), root.Equal))
}

// Equal reports whether both have the same trust domain, sequence and roots.
func (b *Bundle) Equal(other *Bundle) bool {
	if b == nil || other == nil {
		return b == other
	}
	return b.digest == other.digest
}

// SameRoots is Equal without the sequence.
func (b *Bundle) SameRoots(other *Bundle) bool {
	return b.td == other.td && slices.EqualFunc(b.roots, other.roots, (*x509.Certificate).Equal)
}

// GetX509BundleForTrustDomain makes b an x509bundle.Source. The result is a
// copy, which the caller owns.
func (b *Bundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != b.td {
		return nil, fmt.Errorf("identity: no bundle for trust domain %s, only for %s", td, b.td)
	}
	return b.x509.Clone(), nil
}

// String says which bundle this is.
func (b *Bundle) String() string {
	return fmt.Sprintf("bundle of %s, sequence %d, %d roots", b.td, b.sequence, len(b.roots))
}

// readOnly gives x509svid.Verify the bundle without a copy: it only reads.
type readOnly struct{ *Bundle }

func (r readOnly) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != r.td {
		return nil, fmt.Errorf("trust domain %s is not %s", td, r.td)
	}
	return r.x509, nil
}
