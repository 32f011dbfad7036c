package identity

import "time"

// Peer is the other end of a connection whose chain was verified: its
// identity, and the leaf that proved it.
type Peer struct {
	Subject
	Serial   string    // of its leaf, in hex
	KeyHash  string    // of its leaf's public key, see KeyHash
	NotAfter time.Time // its leaf's end; a connection may outlive it
}
