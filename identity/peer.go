package identity

import (
	"crypto/tls"
	"crypto/x509"
	"runtime"
	"sync"
	"time"
	"weak"
)

// Peer is the other end of a connection whose chain was verified: its
// identity, and the leaf that proved it.
type Peer struct {
	Subject
	Serial   string    // of its leaf, in hex
	KeyHash  string    // of its leaf's public key, see KeyHash
	NotAfter time.Time // its leaf's end; a connection may outlive it
}

// marks remembers which parsed leaves a Verifier has verified, for as long as
// a connection (or the TLS library's own cache) holds them. A ConnectionState
// cannot be written to, and reading a name from its certificates would believe
// any state from anywhere; the mark is what makes PeerOf a proof.
type marks struct {
	peers sync.Map // weak.Pointer[x509.Certificate] -> Peer
}

func (m *marks) set(leaf *x509.Certificate, p Peer) {
	key := weak.Make(leaf)
	if _, known := m.peers.LoadOrStore(key, p); !known {
		runtime.AddCleanup(leaf, func(k weak.Pointer[x509.Certificate]) { m.peers.Delete(k) }, key)
	}
}

// PeerOf is the verified peer of a connection that one of v's configs made:
// false before the handshake is complete, for a peer without a certificate,
// and for connections that v did not verify.
func (v *Verifier) PeerOf(state tls.ConnectionState) (Peer, bool) {
	if !state.HandshakeComplete || len(state.PeerCertificates) == 0 {
		return Peer{}, false
	}
	p, ok := v.marks.peers.Load(weak.Make(state.PeerCertificates[0]))
	if !ok {
		return Peer{}, false
	}
	return p.(Peer), true
}
