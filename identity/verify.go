package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation/clock"
)

// TrustSource gives the present bundle, or nil while there is none. Source and
// Bundle are TrustSources.
type TrustSource interface {
	Bundle() *Bundle
}

// Bundle makes b a TrustSource that never changes.
func (b *Bundle) Bundle() *Bundle { return b }

// VerifierConfig is what a Verifier needs. Only Clock and Mesh must be set.
type VerifierConfig struct {
	Clock clock.Clock
	Mesh  TrustSource // roots of the mesh's peers
	// Operators are the roots of people; without them no operator is accepted.
	Operators TrustSource
	Denials   *Denials
	// CacheSize bounds the verified chains that are remembered: 0 means 4096,
	// less than 0 none.
	CacheSize int
	Metrics   prometheus.Registerer
}

// Verifier verifies peers: their chain up to a root of the right bundle at the
// clock's time, and their cluster against the denials. It makes the
// tls.Configs that do so on every handshake. It is safe for concurrent use;
// a process makes one.
type Verifier struct {
	clock     clock.Clock
	mesh      TrustSource
	operators TrustSource
	denials   *Denials
	cache     *chainCache
	marks     marks
	outcomes  *prometheus.CounterVec
}

const defaultCacheSize = 4096

// NewVerifier makes a verifier.
func NewVerifier(c VerifierConfig) *Verifier {
	v := &Verifier{clock: c.Clock, mesh: c.Mesh, operators: c.Operators, denials: c.Denials}
	if v.denials == nil {
		v.denials = new(Denials)
	}
	switch {
	case c.CacheSize == 0:
		v.cache = newChainCache(defaultCacheSize)
	case c.CacheSize > 0:
		v.cache = newChainCache(c.CacheSize)
	}
	v.outcomes = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "weft_tls_peers_total",
		Help: "Peers checked at TLS handshakes, by result: accepted, anonymous, or why refused.",
	}, []string{"result"})
	if err := register(c.Metrics, &v.outcomes); err != nil {
		panic(fmt.Sprintf("identity: metrics of the verifier: %v", err)) // two metrics of one name: a mistake in the program
	}
	return v
}

// VerifyError says why a chain proves nothing. It never names the peer, for
// what an unverified certificate says is anybody's word.
type VerifyError struct {
	why string
	err error
}

func (e *VerifyError) Error() string { return "identity: the peer's certificate is refused: " + e.why }

// Unwrap is the cause, whose text may hold unverified names: do not print it.
func (e *VerifyError) Unwrap() error { return e.err }

// Verify verifies a chain, leaf first, at the present: it must lead to a root
// of the mesh's bundle, or, for an operator's identity, of the operators'
// bundle, and name one identity of the scheme whose cluster is not denied.
// The error is *VerifyError, or *DeniedError for a verified peer.
func (v *Verifier) Verify(chain []*x509.Certificate) (Peer, error) {
	return v.verifyAt(chain, v.clock.Now())
}

// Recheck says whether a connection's peer, which was verified at its
// handshake, still would be: nil, or what change of trust forbids it now (a
// denial, a root gone from the bundle). That its leaf has expired meanwhile is
// none. It is cheap enough to be asked for every stream.
func (v *Verifier) Recheck(state tls.ConnectionState) error {
	if _, ok := v.PeerOf(state); !ok {
		return &VerifyError{why: "this connection's peer was never verified here"}
	}
	at := v.clock.Now()
	if end := state.PeerCertificates[0].NotAfter; at.After(end) {
		at = end
	}
	_, err := v.verifyAt(state.PeerCertificates, at)
	return err
}

func (v *Verifier) verifyAt(chain []*x509.Certificate, at time.Time) (Peer, error) {
	if len(chain) == 0 {
		return Peer{}, &VerifyError{why: "it has shown none"}
	}
	if len(chain) > maxChain {
		return Peer{}, &VerifyError{why: fmt.Sprintf("its chain has %d certificates, at most %d are read", len(chain), maxChain)}
	}
	id, err := x509svid.IDFromCert(chain[0])
	if err != nil {
		return Peer{}, &VerifyError{why: "it does not hold exactly one SPIFFE ID", err: err}
	}
	// What the leaf says is used to choose the roots that it must lead to, and
	// believed only after it does.
	claimed, err := ParseID(id)
	if err != nil {
		return Peer{}, &VerifyError{why: "its SPIFFE ID is not of a mesh's scheme", err: err}
	}
	trust, other := v.mesh, v.operators
	if claimed.Role == RoleOperator {
		trust, other = v.operators, v.mesh
		if trust == nil {
			return Peer{}, &VerifyError{why: "operators are no peers of the mesh: only a controller's admin API accepts them"}
		}
	}
	bundle := trust.Bundle()
	if bundle == nil {
		return Peer{}, &VerifyError{why: "there is no trust bundle here yet"}
	}
	if claimed.ID.TrustDomain() != bundle.TrustDomain() {
		return Peer{}, &VerifyError{why: "it is of another trust domain than " + bundle.TrustDomain().Name()}
	}

	key := chainKey(bundle, chain)
	peer, known := v.cache.get(key, at)
	if !known {
		var valid window
		if peer, valid, err = verifyChain(chain, claimed, bundle, other, at); err != nil {
			return Peer{}, err
		}
		v.cache.put(key, peer, valid)
	}
	if err := v.denials.Check(peer.Subject); err != nil {
		return Peer{}, err
	}
	return peer, nil
}

// window is when all certificates of a chain are valid.
type window struct{ from, to time.Time }

func (w window) holds(at time.Time) bool { return !at.Before(w.from) && !at.After(w.to) }

func verifyChain(chain []*x509.Certificate, claimed Subject, bundle *Bundle, other TrustSource, at time.Time) (Peer, window, error) {
	_, verified, err := x509svid.Verify(chain, readOnly{bundle}, x509svid.WithTime(at))
	if err != nil {
		return Peer{}, window{}, &VerifyError{why: explain(err, chain[0], bundle, at), err: err}
	}
	var foreign *Bundle
	if other != nil {
		foreign = other.Bundle()
	}
	var best window
	for _, candidate := range verified {
		// A root in both bundles would let people pass as peers. It is a
		// mistake that must not be made; if it is, that root vouches for nobody.
		if foreign != nil && foreign.Has(candidate[len(candidate)-1]) {
			continue
		}
		w := window{from: candidate[0].NotBefore, to: candidate[0].NotAfter}
		for _, cert := range candidate[1:] {
			if cert.NotBefore.After(w.from) {
				w.from = cert.NotBefore
			}
			if cert.NotAfter.Before(w.to) {
				w.to = cert.NotAfter
			}
		}
		if w.to.After(best.to) {
			best = w
		}
	}
	if best.to.IsZero() {
		return Peer{}, window{}, &VerifyError{why: "its root is trusted both for the mesh and for operators, and so for neither: take it out of one bundle"}
	}
	keyHash, err := KeyHash(chain[0].PublicKey)
	if err != nil {
		return Peer{}, window{}, &VerifyError{why: "its key cannot be read", err: err}
	}
	return Peer{Subject: claimed, Serial: SerialOf(chain[0]), KeyHash: keyHash, NotAfter: chain[0].NotAfter}, best, nil
}

// explain turns the library's error into words without unverified names.
func explain(err error, leaf *x509.Certificate, bundle *Bundle, at time.Time) string {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Sprintf("it leads to no root that is trusted here (%s)", bundle)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		const layout = time.RFC3339
		now := at.UTC().Format(layout)
		switch {
		case at.After(leaf.NotAfter):
			return fmt.Sprintf("it expired at %s and it is %s: the peer must renew it, or one of the clocks is wrong", leaf.NotAfter.UTC().Format(layout), now)
		case at.Before(leaf.NotBefore):
			return fmt.Sprintf("it is valid from %s and it is %s: one of the clocks is wrong", leaf.NotBefore.UTC().Format(layout), now)
		default:
			return "an authority above it is expired or not yet valid at " + now
		}
	case errors.As(err, &invalid) && invalid.Reason == x509.CANotAuthorizedForThisName:
		return "its authority may not sign for its trust domain"
	case errors.As(err, &invalid) && invalid.Reason == x509.TooManyIntermediates:
		return "an authority above it may not have authorities below"
	default:
		return "its chain is not a valid SVID's"
	}
}

// chainCache remembers chains that were verified, so that a peer's next
// handshake costs no signature check of its chain: 2 µs instead of 200, a
// quarter of what a handshake costs both ends together (BenchmarkHandshake). An
// entry is good for one
// bundle (of one sequence and content) while every certificate of its chain is
// valid; denials and authorisation are checked beside it, every time.
//
// It has two generations: entries are put into the young one, and when that is
// full it becomes the old one, whose entries move back when they are used. So
// it is bounded, and what is in use stays.
type chainCache struct {
	mu         sync.Mutex
	size       int // of one generation
	young, old map[[sha256.Size]byte]cachedChain
}

type cachedChain struct {
	peer  Peer
	valid window
}

func newChainCache(size int) *chainCache {
	return &chainCache{size: max(1, size/2), young: map[[sha256.Size]byte]cachedChain{}}
}

func (c *chainCache) get(key [sha256.Size]byte, at time.Time) (Peer, bool) {
	if c == nil {
		return Peer{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	entry, ok := c.young[key]
	if !ok {
		if entry, ok = c.old[key]; !ok {
			return Peer{}, false
		}
		delete(c.old, key)
		c.insert(key, entry)
	}
	return entry.peer, entry.valid.holds(at)
}

func (c *chainCache) put(key [sha256.Size]byte, p Peer, valid window) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.insert(key, cachedChain{p, valid})
}

func (c *chainCache) insert(key [sha256.Size]byte, entry cachedChain) {
	if len(c.young) >= c.size {
		c.old, c.young = c.young, make(map[[sha256.Size]byte]cachedChain, c.size)
	}
	c.young[key] = entry
}

func chainKey(b *Bundle, chain []*x509.Certificate) (key [sha256.Size]byte) {
	h := sha256.New()
	h.Write(b.digest[:])
	var length [4]byte
	for _, cert := range chain {
		binary.BigEndian.PutUint32(length[:], uint32(len(cert.Raw)))
		h.Write(length[:])
		h.Write(cert.Raw)
	}
	h.Sum(key[:0])
	return key
}
