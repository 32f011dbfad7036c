package identity_test

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/weftmesh/weft/identity"
)

// What an earlier version wrote can still be read: the bytes are those of
// docs/format/identity.md, made once.
func TestFormatsStayAsTheyAre(t *testing.T) {
	token := must(identity.ParseJoinToken("weft-join.v1.prod.eu-1.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8.883cdb43"))(t)
	if got := token.Hash(); token.Cluster() != "prod.eu-1" || got != "d0aad4f3d10649b4c4b2fad5249b218119de4883a238d143556c47770a1d23e7" {
		t.Errorf("%s, hash %s", token, got)
	}
	kek := must(identity.NewKEK(bytes.Repeat([]byte{0x5a}, 32)))(t)
	sealed := must(hex.DecodeString("776566747365616c01" + // magic
		"02220dfb7d89b22b" + // key ID
		"8a80cb353fec281b21a22d87" + // nonce
		"cfb58ae8c9a3080beb475535f665328daaa13b1d2708f96e4b3ee2d4e3cf3bf27b280d85cfa078a7303b74772e0f0a33" + // record key
		"d2c6e3d9575420fd0dbf6866" + // nonce
		"a39651e0034f263bc04b29ba77e0f0dc5de378d0b0f0cc3bc675b6"))(t) // content
	if got, err := kek.Open("authority/eu/1", sealed); err != nil || string(got) != "the content" {
		t.Errorf("%q, %v", got, err)
	}
}
