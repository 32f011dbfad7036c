package identity_test

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/identity"
)

func TestJoinTokens(t *testing.T) {
	for _, cluster := range []federation.ClusterID{"eu-1", "prod.eu-1"} {
		token := must(identity.NewJoinToken(cluster))(t)
		text := token.Reveal()
		if !strings.HasPrefix(text, "weft-join.v1."+string(cluster)+".") {
			t.Errorf("%s", text)
		}
		got := must(identity.ParseJoinToken(" " + text + "\n"))(t)
		if got != token || got.Cluster() != cluster || got.Hash() != token.Hash() || got.IsZero() {
			t.Errorf("parsed %v, want %v", got, token)
		}
		if raw, err := hex.DecodeString(token.Hash()); err != nil || len(raw) != 32 {
			t.Errorf("hash %s", token.Hash())
		}
		if again := must(identity.NewJoinToken(cluster))(t); again == token || again.Hash() == token.Hash() {
			t.Error("two tokens are the same")
		}
		// Every single wrong, missing or doubled character is noticed.
		for i := range text {
			for _, wrong := range []string{
				text[:i] + string(text[i]^1) + text[i+1:],
				text[:i] + text[i+1:],
				text[:i] + text[i:i+1] + text[i:],
			} {
				if wrong == text {
					continue
				}
				if got, err := identity.ParseJoinToken(wrong); err == nil && got == token {
					t.Fatalf("%q is read as %q", wrong, text)
				} else if err == nil {
					t.Fatalf("%q is a token", wrong)
				}
			}
			if _, err := identity.ParseJoinToken(text[:i]); err == nil {
				t.Fatalf("%q is a token", text[:i])
			}
		}
	}
	// A checksum makes no token of what is none.
	text := must(identity.NewJoinToken("eu-1"))(t).Reveal()
	for name, change := range map[string]func(string) string{
		"another cluster's name": func(s string) string { return strings.Replace(s, ".eu-1.", ".EU-1.", 1) },
		"a reserved name":        func(s string) string { return strings.Replace(s, ".eu-1.", ".controller.", 1) },
		"no name":                func(s string) string { return strings.Replace(s, ".eu-1.", ".", 1) },
		"a line feed":            func(s string) string { return s[:30] + "\n" + s[30:] },
		"padding":                func(s string) string { return s + "=" },
		"a shorter secret":       func(s string) string { return s[:len(s)-4] },
		"a longer secret":        func(s string) string { return s + "AAAA" },
		"spare bits":             func(s string) string { return s[:len(s)-1] + "B" },
		"another alphabet":       func(s string) string { return s[:30] + "+" + s[31:] },
	} {
		wrong := change(text[:len(text)-9])
		wrong += fmt.Sprintf(".%08x", crc32.ChecksumIEEE([]byte(wrong)))
		if got, err := identity.ParseJoinToken(wrong); !errors.Is(err, identity.ErrBadToken) || strings.Contains(err.Error(), "checksum is wrong") {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for _, name := range []federation.ClusterID{"", "a.b.c", "A", "../x", "controller"} {
		if _, err := identity.NewJoinToken(name); err == nil {
			t.Errorf("a token for %q", name)
		}
	}
}

func TestTokensNeverPrintTheirSecret(t *testing.T) {
	token := must(identity.NewJoinToken("eu-1"))(t)
	text := token.Reveal()
	secret := strings.Split(text, ".")[3]
	raw := fmt.Sprintf("%x", []byte(secret))[:16]
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", token, "in", struct{ T identity.JoinToken }{token})
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "token", token)
	asJSON := must(json.Marshal(map[string]any{"t": token, "p": &token}))(t)
	printed := log.String() + string(asJSON)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		printed += fmt.Sprintf(verb, token) + fmt.Sprintf(verb, &token) + fmt.Sprintf(verb, []identity.JoinToken{token}) + fmt.Sprintf(verb, struct{ T identity.JoinToken }{token})
	}
	if strings.Contains(printed, secret) || strings.Contains(strings.ToLower(printed), raw) || !strings.Contains(printed, "weft-join.v1.eu-1.REDACTED") {
		t.Error(printed)
	}
	// Nor do the errors of a token that is nearly right.
	for _, bad := range []string{text + "x", text[:len(text)-1], "x" + text, strings.Replace(text, "v1", "v2", 1), secret, strings.Replace(text, "eu-1", "eu-2", 1)} {
		_, err := identity.ParseJoinToken(bad)
		if !errors.Is(err, identity.ErrBadToken) || strings.Contains(err.Error(), secret[:8]) {
			t.Errorf("%v", err)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	good := must(identity.NewJoinToken("prod.eu-1"))(f).Reveal()
	f.Add(good)
	f.Add(good[:40])
	f.Add("weft-join.v1.eu-1.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA.00000000")
	f.Add("weft-join.v1....")
	f.Add("weft-join.v1.")
	f.Add(strings.Repeat("weft-join.v1.", 100))
	f.Fuzz(func(t *testing.T, text string) {
		token, err := identity.ParseJoinToken(text)
		if err != nil {
			if !errors.Is(err, identity.ErrBadToken) || token != (identity.JoinToken{}) {
				t.Errorf("%v, %v", token, err)
			}
			// The error's own words are the only ones in it.
			const own = "weft-join.v1.CLUSTER.SECRET.CHECKSUM"
			if given := strings.TrimSpace(text); len(given) >= 12 && strings.Contains(err.Error(), given) && !strings.Contains(own, given) {
				t.Errorf("the error repeats what was given: %v", err)
			}
			return
		}
		// One text for one token: a second spelling would be a second token.
		if token.Reveal() != strings.TrimSpace(text) {
			t.Errorf("%q is read as %q", text, token.Reveal())
		}
		if _, err := federation.ParseClusterID(string(token.Cluster())); err != nil {
			t.Error(err)
		}
	})
}

func TestPins(t *testing.T) {
	m := newMesh(t, t0)
	pin := identity.PinOf(m.root.Root())
	if got := must(identity.ParsePin(" " + pin.String() + "\n"))(t); got != pin || !strings.HasPrefix(pin.String(), "sha256:") || len(pin.String()) != 71 {
		t.Errorf("%s, %s", got, pin)
	}
	var back identity.Pin
	if err := back.UnmarshalText(must(pin.MarshalText())(t)); err != nil || back != pin {
		t.Errorf("%v, %v", back, err)
	}
	for _, bad := range []string{"", "sha256:", pin.String()[7:], pin.String() + "00", pin.String()[:70], "sha512:" + pin.String()[7:], "sha256:" + strings.Repeat("g", 64)} {
		if _, err := identity.ParsePin(bad); err == nil {
			t.Errorf("%q is a pin", bad)
		}
	}
}

func TestAPinStartsTrust(t *testing.T) {
	m := newMesh(t, t0)
	foreign := newMesh(t, t0)
	now := t0.Add(time.Hour)
	pin := identity.PinOf(m.root.Root())
	serve := func(m *mesh, id string, root bool) identity.ServerConfig {
		return identity.ServerConfig{SVID: m.svid(t, id, t0), NextProtos: []string{"h2"}, Anonymous: true, SendRoot: root}
	}
	for name, c := range map[string]struct {
		mesh   *mesh
		server identity.ServerConfig
		pin    identity.Pin
		at     time.Time
		says   string
	}{
		"the mesh's controller":     {m, serve(m, ctl, true), pin, now, ""},
		"another mesh's controller": {foreign, serve(foreign, ctl, true), pin, now, "expected " + pin.String() + ", the server showed " + identity.PinOf(foreign.root.Root()).String()},
		"no root is shown":          {m, serve(m, ctl, false), pin, now, "no root at all"},
		"an agent":                  {m, serve(m, agentEU, true), pin, now, "not a controller"},
		"the pin of the region":     {m, serve(m, ctl, true), identity.PinOf(m.region.Certificate()), now, "expected"},
		"the pin of nothing":        {m, serve(m, ctl, true), identity.Pin{}, now, "expected"},
		"an expired chain":          {m, serve(m, ctl, true), pin, t0.Add(25 * time.Hour), "expired"},
		"a foreign chain that shows the pinned root": {m, identity.ServerConfig{NextProtos: []string{"h2"}, Anonymous: true, SVID: func() *x509svid.SVID {
			svid := foreign.svid(t, ctl, t0)
			svid.Certificates = append(svid.Certificates, m.root.Root())
			return svid
		}()}, pin, now, "does not lead to the pinned root"},
	} {
		t.Run(name, func(t *testing.T) {
			v := identity.NewVerifier(identity.VerifierConfig{Clock: at(now), Mesh: c.mesh.bundle})
			var learned []identity.Pinned
			client := identity.PinnedClient(c.pin, at(c.at), func(p identity.Pinned) { learned = append(learned, p) }, "h2")
			for range 2 { // the second time the server remembers its chain
				got := meet(t, v.Server(c.server), client)
				if c.says == "" {
					if got.client != nil || got.server != nil {
						t.Fatalf("client %v, server %v", got.client, got.server)
					}
					if _, ok := v.PeerOf(got.servView); ok {
						t.Error("a client without a certificate has a name")
					}
					continue
				}
				if got.client == nil || !strings.Contains(got.client.Error(), c.says) {
					t.Fatalf("client: %v, want %q", got.client, c.says)
				}
			}
			if c.says != "" {
				if len(learned) != 0 {
					t.Errorf("learned %v all the same", learned)
				}
				return
			}
			if len(learned) != 2 || learned[0].Controller.String() != ctl || !learned[0].Root.Equal(m.root.Root()) {
				t.Fatalf("learned %v", learned)
			}
			b := must(learned[0].Bundle())(t)
			if b.Sequence() != 0 || b.TrustDomain() != td || !b.SameRoots(m.bundle) {
				t.Errorf("%v", b)
			}
		})
	}
	if _, err := identity.VerifyPin(nil, pin, now); err == nil {
		t.Error("no chain is pinned")
	}
	// The root's public key in a certificate that the root did not sign, which
	// anybody can make, is no root.
	subject := m.root.Root().Subject
	key := must(identity.NewKey())(t)
	der := must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: subject, NotBefore: t0, NotAfter: t0.Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		URIs: []*url.URL{td.ID().URL()}, KeyUsage: x509.KeyUsageCertSign,
	}, &x509.Certificate{Subject: subject}, m.root.Root().PublicKey, key))(t)
	copied := must(x509.ParseCertificate(der))(t)
	if identity.PinOf(copied) != pin {
		t.Fatal("the copy has another pin")
	}
	chain, _ := m.leaf(t, spiffeid.RequireFromString(ctl), t0)
	mismatch := (*identity.PinError)(nil)
	if _, err := identity.VerifyPin(append(chain, copied), pin, now); !errors.As(err, &mismatch) || mismatch.Want != pin || len(mismatch.Got) != 0 {
		t.Errorf("got %v", err)
	}
	must(identity.VerifyPin(append(chain, m.root.Root()), pin, now))(t)
	for len(chain) < 8 {
		chain = append(chain, m.region.Certificate())
	}
	if _, err := identity.VerifyPin(append(chain, m.root.Root()), pin, now); err == nil || !strings.Contains(err.Error(), "at most 8") {
		t.Errorf("nine certificates: %v", err)
	}
}
