package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"strings"

	"github.com/weftmesh/weft/federation"
)

// ErrBadToken is every error of ParseJoinToken. None repeats what was given:
// it may be a secret in the wrong place.
var ErrBadToken = errors.New("not a join token")

const (
	tokenPrefix     = "weft-join.v1."
	tokenSecretSize = 32
	// Two labels, the prefix, the secret, the checksum, and some white space.
	maxTokenText = 512
)

// JoinToken is the secret with which a cluster's agent enrols once. It prints
// without the secret; Reveal is the only way to the text to hand over. The
// zero value is no token.
type JoinToken struct {
	cluster federation.ClusterID
	secret  [tokenSecretSize]byte
}

// NewJoinToken makes a random token of 256 bits for a cluster.
func NewJoinToken(cluster federation.ClusterID) (JoinToken, error) {
	if err := checkCluster(cluster); err != nil {
		return JoinToken{}, err
	}
	t := JoinToken{cluster: cluster}
	if _, err := rand.Read(t.secret[:]); err != nil {
		return JoinToken{}, fmt.Errorf("identity: make a join token: %w", err)
	}
	return t, nil
}

// ParseJoinToken reads a token's text:
//
//	weft-join.v1.CLUSTER.SECRET.CHECKSUM
//
// with the secret in unpadded base64url and the CRC-32 (IEEE) of all before it
// in 8 hex digits, which tells a mistyped or cut token from a refused one.
// Surrounding white space is ignored. Errors are ErrBadToken.
func ParseJoinToken(text string) (JoinToken, error) {
	bad := func(why string) (JoinToken, error) {
		return JoinToken{}, fmt.Errorf("identity: %w: %s: copy the whole of what `weft cluster register` printed (%sCLUSTER.SECRET.CHECKSUM)", ErrBadToken, why, tokenPrefix)
	}
	if len(text) > maxTokenText {
		return bad("it is too long")
	}
	text = strings.TrimSpace(text)
	rest, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		return bad("it does not start with " + tokenPrefix)
	}
	end := strings.LastIndexByte(rest, '.')
	if end < 0 {
		return bad("it has too few parts")
	}
	body, sum := rest[:end], rest[end+1:]
	if sum != tokenChecksum(text[:len(text)-len(sum)-1]) {
		return bad("its checksum is wrong, so it was mistyped or cut")
	}
	middle := strings.LastIndexByte(body, '.')
	if middle < 0 {
		return bad("it has too few parts")
	}
	t := JoinToken{cluster: federation.ClusterID(body[:middle])}
	if checkCluster(t.cluster) != nil {
		return bad("its cluster name is not valid")
	}
	secret, err := base64.RawURLEncoding.Strict().DecodeString(body[middle+1:])
	if err != nil || len(secret) != tokenSecretSize || base64.RawURLEncoding.EncodeToString(secret) != body[middle+1:] {
		return bad("its secret part has the wrong form")
	}
	copy(t.secret[:], secret)
	return t, nil
}

// Cluster is the cluster that the token is for.
func (t JoinToken) Cluster() federation.ClusterID { return t.cluster }

// IsZero reports whether t is no token.
func (t JoinToken) IsZero() bool { return t.cluster == "" }

// Reveal is the token's text, with the secret: to be shown once, to whoever
// registered the cluster, and sent once, over a pinned connection.
func (t JoinToken) Reveal() string {
	text := tokenPrefix + string(t.cluster) + "." + base64.RawURLEncoding.EncodeToString(t.secret[:])
	return text + "." + tokenChecksum(text)
}

// Hash is the SHA-256 of cluster and secret in hex: the key under which the
// token is stored. It does not lead back to the secret. Looking a hash up
// needs no comparison in constant time: to steer it, one must know a preimage.
func (t JoinToken) Hash() string {
	h := sha256.New()
	_, _ = io.WriteString(h, tokenPrefix+string(t.cluster)+".")
	h.Write(t.secret[:])
	return hex.EncodeToString(h.Sum(nil))
}

// String is the token without its secret.
func (t JoinToken) String() string {
	if t.IsZero() {
		return "no join token"
	}
	return tokenPrefix + string(t.cluster) + ".REDACTED"
}

// Format prints String for every verb: %x and %#v included.
func (t JoinToken) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, t.String()) }

// LogValue logs the token without its secret.
func (t JoinToken) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText is the token without its secret, for JSON and its like.
func (t JoinToken) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

func tokenChecksum(text string) string {
	return fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(text)))
}
