package identity_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"pgregory.net/rapid"

	"github.com/weftmesh/weft/identity"
)

func TestAuthoritiesAndLeavesAreShapedAsTheDesignSays(t *testing.T) {
	m := newMesh(t, t0)
	day := 24 * time.Hour
	for _, c := range []struct {
		cert    *x509.Certificate
		life    time.Duration
		path    int
		limited bool
	}{
		{m.root.Certificate(), 3650 * day, 1, false},
		{m.region.Certificate(), 90 * day, 0, true},
		{m.operators.Certificate(), 3650 * day, 0, true},
	} {
		name := c.cert.Subject.CommonName
		if !c.cert.IsCA || c.cert.MaxPathLen != c.path || c.cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
			t.Errorf("%s: CA %v, path length %d, key usage %b", name, c.cert.IsCA, c.cert.MaxPathLen, c.cert.KeyUsage)
		}
		if got := c.cert.NotAfter.Sub(t0); got != c.life {
			t.Errorf("%s lives %v, want %v", name, got, c.life)
		}
		if got := t0.Sub(c.cert.NotBefore); got != 2*time.Minute {
			t.Errorf("%s starts %v before the present", name, got)
		}
		if got := fmt.Sprint(c.cert.URIs); got != "[spiffe://mesh.example]" {
			t.Errorf("%s: URIs %s", name, got)
		}
		if got := fmt.Sprint(c.cert.PermittedURIDomains); (got == "[mesh.example]") != c.limited {
			t.Errorf("%s: permitted %s", name, got)
		}
		if c.limited != c.cert.PermittedDNSDomainsCritical {
			t.Errorf("%s: its constraint is not critical", name)
		}
		if got := c.cert.SerialNumber.BitLen(); got != 127 {
			t.Errorf("%s: serial of %d bits", name, got)
		}
	}

	id := must(identity.GatewayID(td, "eu-1"))(t)
	chain, key := m.leaf(t, id, t0)
	leaf := chain[0]
	if len(chain) != 2 || !chain[1].Equal(m.region.Certificate()) {
		t.Fatalf("a chain of %d, want the leaf and its region's authority", len(chain))
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 2 {
		t.Errorf("leaf: CA %v, usage %b, extended %v", leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id.String() || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Errorf("leaf names %v %v", leaf.URIs, leaf.DNSNames)
	}
	if leaf.NotAfter.Sub(t0) != day || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("leaf lives until %v", leaf.NotAfter)
	}
	got, chains, err := x509svid.Verify(chain, m.bundle, x509svid.WithTime(t0))
	if err != nil || got != id || !chains[0][2].Equal(m.root.Root()) {
		t.Errorf("verify: %v, %v", got, err)
	}
	if _, _, err := x509svid.Verify(chain, m.people, x509svid.WithTime(t0)); err == nil {
		t.Error("a gateway's leaf verifies against the operators' authority")
	}
}

func TestAParentLivesSixTimesItsChild(t *testing.T) {
	day := 24 * time.Hour
	for _, c := range []struct {
		change func(*identity.Lifetimes)
		says   string
	}{
		{func(l *identity.Lifetimes) {}, ""},
		{func(l *identity.Lifetimes) { l.Leaf = 15 * day }, ""},
		{func(l *identity.Lifetimes) { l.Leaf = 15*day + 1 }, "region authority lives"},
		{func(l *identity.Lifetimes) { l.Region = 700 * day }, "root lives"},
		{func(l *identity.Lifetimes) { l.Operator = 800 * day }, "operators' authority lives"},
		{func(l *identity.Lifetimes) { l.Leaf = 0 }, "a leaf would live 0s"},
		{func(l *identity.Lifetimes) { l.Backdate = -1 }, "negative"},
	} {
		l := identity.DefaultLifetimes()
		c.change(&l)
		err := l.Check()
		if c.says == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("got %v, want %q", err, c.says)
		}
		// The rule is kept where things are signed, too.
		if _, rootErr := identity.NewRoot(td, l, t0); (rootErr == nil) != (err == nil) {
			t.Errorf("NewRoot: %v, but Check: %v", rootErr, err)
		}
	}

	m := newMesh(t, t0)
	late := m.root.NotAfter().Add(-89 * day)
	if _, err := m.root.NewRegion("us", m.lifetimes, late); err == nil {
		t.Error("a region's authority would outlive its root")
	}
	if err := m.region.CanSign(day, m.region.NotAfter().Add(-6*day)); err != nil {
		t.Errorf("exactly six leaves left: %v", err)
	}
	if err := m.region.CanSign(day, m.region.NotAfter().Add(-6*day+1)); err == nil {
		t.Error("an authority with less than six leaves' life left can be activated")
	}
}

func TestNoSignatureOutlivesItsIssuer(t *testing.T) {
	m := newMesh(t, t0)
	key := must(identity.NewKey())(t)
	agent := identity.Admitted{ID: must(identity.AgentID(td, "eu-1"))(t), Key: &key.PublicKey}
	person := identity.Admitted{ID: must(identity.OperatorID(td, "ada"))(t), Key: &key.PublicKey}
	rapid.Check(t, func(t *rapid.T) {
		by, who := m.region, agent
		if rapid.Bool().Draw(t, "person") {
			by, who = m.operators, person
		}
		now := by.NotAfter().Add(-time.Duration(rapid.Int64Range(-int64(time.Hour), int64(400*24*time.Hour)).Draw(t, "left")))
		chain, err := by.SignLeaf(who, m.lifetimes, now)
		if !now.Before(by.NotAfter()) {
			if err == nil {
				t.Fatal("an authority that has ended signs")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if chain[0].NotAfter.After(by.NotAfter()) || chain[0].NotBefore.Before(by.Certificate().NotBefore) {
			t.Fatalf("leaf %v to %v, issuer %v to %v", chain[0].NotBefore, chain[0].NotAfter, by.Certificate().NotBefore, by.NotAfter())
		}
	})
}

func TestAnAuthoritySignsOnlyItsKind(t *testing.T) {
	m := newMesh(t, t0)
	key := must(identity.NewKey())(t)
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t)
	other := spiffeid.RequireTrustDomainFromString("other.example")
	agent := must(identity.AgentID(td, "eu-1"))(t)
	operator := must(identity.OperatorID(td, "ada"))(t)
	for name, c := range map[string]struct {
		by  *identity.Authority
		who identity.Admitted
	}{
		"root signs a leaf":            {m.root, identity.Admitted{ID: agent, Key: &key.PublicKey}},
		"region signs a person":        {m.region, identity.Admitted{ID: operator, Key: &key.PublicKey}},
		"operators' sign an agent":     {m.operators, identity.Admitted{ID: agent, Key: &key.PublicKey}},
		"foreign trust domain":         {m.region, identity.Admitted{ID: must(identity.AgentID(other, "eu-1"))(t), Key: &key.PublicKey}},
		"the trust domain itself":      {m.region, identity.Admitted{ID: td.ID(), Key: &key.PublicKey}},
		"a path outside of the scheme": {m.region, identity.Admitted{ID: spiffeid.RequireFromString("spiffe://mesh.example/x"), Key: &key.PublicKey}},
		"no identity":                  {m.region, identity.Admitted{Key: &key.PublicKey}},
		"no key":                       {m.region, identity.Admitted{ID: agent}},
		"a key of another curve":       {m.region, identity.Admitted{ID: agent, Key: &p384.PublicKey}},
		"a point that is on no curve":  {m.region, identity.Admitted{ID: agent, Key: &ecdsa.PublicKey{Curve: elliptic.P256(), X: key.X, Y: key.X}}},
	} {
		if chain, err := c.by.SignLeaf(c.who, m.lifetimes, t0); err == nil {
			t.Errorf("%s: signed %v", name, chain[0].URIs)
		}
	}
	if _, err := m.region.NewRegion("us", m.lifetimes, t0); err == nil {
		t.Error("a region signs a region")
	}
	if _, err := m.root.NewRegion("us.east", m.lifetimes, t0); err == nil {
		t.Error("a region's name holds a dot")
	}
	for _, name := range []string{"10.0.0.1", "my_mesh", "a..b"} {
		if bad, err := spiffeid.TrustDomainFromString(name); err == nil {
			if _, err := identity.NewRoot(bad, m.lifetimes, t0); err == nil {
				t.Errorf("a root for trust domain %q", name)
			}
		}
	}
	if _, err := m.region.SignLeafFor(identity.Admitted{ID: agent, Key: &key.PublicKey}, 25*time.Hour, m.lifetimes, t0); err == nil {
		t.Error("a leaf lives longer than leaves do")
	}
}

// A stolen region's authority can name nobody of another trust domain: stock
// verifiers see the constraint.
func TestTheConstraintKeepsOtherTrustDomainsOut(t *testing.T) {
	m := newMesh(t, t0)
	other := spiffeid.RequireTrustDomainFromString("other.example")
	forged := forge(t, m.region, must(identity.AgentID(other, "eu-1"))(t), t0)
	foreign := must(identity.NewBundle(other, 1, []*x509.Certificate{m.root.Root()}))(t)
	_, _, err := x509svid.Verify(forged, foreign, x509svid.WithTime(t0))
	if err == nil || !strings.Contains(err.Error(), "not permitted") {
		t.Errorf("got %v", err)
	}
}

func TestAnAuthorityNeverPrintsItsKey(t *testing.T) {
	m := newMesh(t, t0)
	kek := must(identity.NewKEK(make([]byte, 32)))(t)
	record := must(m.region.Seal(kek, "authority/eu/a"))(t)
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "authority", m.region, "kek", kek)
	kekJSON := must(json.Marshal(kek))(t)
	all := strings.Join([]string{
		log.String(), string(kekJSON),
		fmt.Sprintf("%v %+v %#v %s", m.region, m.region, m.region, m.region),
		fmt.Sprintf("%v %+v %#v %s", kek, kek, kek, kek),
	}, "\n")
	if strings.Contains(all, "PRIVATE") || strings.Contains(all, "ecdsa") || strings.Contains(all, "aead") {
		t.Error(all)
	}
	if _, err := json.Marshal(m.region); err == nil {
		t.Error("an authority marshals to JSON")
	}
	if strings.Contains(record.Chain, "PRIVATE") {
		t.Error("the record holds a key in clear")
	}
	if !strings.Contains(log.String(), m.region.Serial()) {
		t.Errorf("the log does not tell which authority: %s", log.String())
	}
}
