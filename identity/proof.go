package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"
)

// RenewalGrace is how long after the end of its leaf an agent may still renew
// by proof of the leaf's key, if its controller was away for so long.
const RenewalGrace = 30 * 24 * time.Hour

// RenewalProof stands in for TLS where a leaf has expired, which TLS refuses:
// the expired chain, and the signature of a CSR by its key. It is good for
// that CSR only, so that who replays it gains a certificate for a key that he
// does not have.
type RenewalProof struct {
	Chain     [][]byte // DER, leaf first
	Signature []byte   // ASN.1 ECDSA over the SHA-256 of a label and the CSR
}

// Prove signs a CSR with the key of the present SVID, be it expired or not.
func (s *Source) Prove(csr []byte) (RenewalProof, error) {
	svid := s.now.Load().svid
	if svid == nil {
		return RenewalProof{}, fmt.Errorf("identity: %w (%s): enrol with a join token", ErrNoSVID, s.config.ID)
	}
	digest := proofDigest(csr)
	signature, err := svid.PrivateKey.Sign(rand.Reader, digest[:], nil)
	if err != nil {
		return RenewalProof{}, fmt.Errorf("identity: prove %s: %w", s.config.ID, err)
	}
	return RenewalProof{Chain: RawChain(svid.Certificates), Signature: signature}, nil
}

// VerifyProof returns the agent that proves itself for csr: its chain must
// have been valid at its own end, at most RenewalGrace ago, up to a root that
// is trusted now; its cluster must not be denied. Admit decides the rest.
func (v *Verifier) VerifyProof(proof RenewalProof, csr []byte) (Peer, error) {
	chain, err := ParseRawChain(proof.Chain)
	if err != nil {
		return Peer{}, &VerifyError{why: "its chain cannot be read", err: err}
	}
	at := v.clock.Now()
	if end := chain[0].NotAfter; at.After(end) {
		if past := at.Sub(end); past > RenewalGrace {
			return Peer{}, &VerifyError{why: fmt.Sprintf("it expired %v ago, and renewal without enrolling again ends after %v: register a new join token", past.Round(time.Second), RenewalGrace)}
		}
		at = end
	}
	peer, err := v.verifyAt(chain, at)
	if err != nil {
		return Peer{}, err
	}
	if peer.Role != RoleAgent {
		return Peer{}, fmt.Errorf("identity: %s is a %s; only agents renew by proof, everybody else is renewed by its agent or over mTLS", peer.ID, peer.Role)
	}
	key, ok := chain[0].PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return Peer{}, errors.New("identity: a proof needs an ECDSA key")
	}
	digest := proofDigest(csr)
	if !ecdsa.VerifyASN1(key, digest[:], proof.Signature) {
		return Peer{}, fmt.Errorf("identity: the proof shows the chain of %s, but is not signed by its key for this CSR", peer.ID)
	}
	return peer, nil
}

func proofDigest(csr []byte) [sha256.Size]byte {
	return sha256.Sum256(append([]byte("weft renewal proof 1\x00"), csr...))
}
