package identity_test

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/identity"
)

func TestBundles(t *testing.T) {
	m := newMesh(t, t0)
	second := must(identity.NewRoot(td, m.lifetimes, t0))(t)
	one := m.bundle
	two := must(one.With(second.Root()))(t)
	if two.Sequence() != 2 || len(two.Roots()) != 2 || !two.Has(second.Root()) || one.Has(second.Root()) {
		t.Errorf("%v, %v", one, two)
	}
	if same := must(two.With(second.Root()))(t); same != two {
		t.Error("a root that it has already changes a bundle")
	}
	turned := must(identity.NewBundle(td, 2, []*x509.Certificate{second.Root(), m.root.Root(), second.Root()}))(t)
	if !turned.Equal(two) || !turned.SameRoots(two) {
		t.Error("the order of roots makes a difference")
	}
	back := must(two.Without(second.Root()))(t)
	if back.Sequence() != 3 || back.Equal(one) || !back.SameRoots(one) || back.SameRoots(two) {
		t.Errorf("%v", back)
	}
	if same := must(one.Without(second.Root()))(t); same != one {
		t.Error("a root that it has not changes a bundle")
	}
	if _, err := one.Without(m.root.Root()); err == nil {
		t.Error("the last root can be removed")
	}
	var none *identity.Bundle
	if !none.Equal(nil) || none.Equal(one) || one.Equal(nil) {
		t.Error("nil is equal to something")
	}

	// To SPIFFE's document and PEM, and back.
	document := must(two.Marshal())(t)
	var shape struct {
		Sequence uint64           `json:"spiffe_sequence"`
		Keys     []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(document, &shape); err != nil || shape.Sequence != 2 || len(shape.Keys) != 2 || shape.Keys[0]["use"] != "x509-svid" {
		t.Errorf("%v, %s", err, document)
	}
	if got := must(identity.ParseBundle(td, document))(t); !got.Equal(two) {
		t.Errorf("parsed %v", got)
	}
	if got := must(identity.ParseBundlePEM(td, 2, two.PEM()))(t); !got.Equal(two) {
		t.Errorf("parsed %v", got)
	}
	if pins := two.Pins(); len(pins) != 2 || pins[0] == pins[1] {
		t.Errorf("%v", pins)
	}

	// What it hands out cannot change it.
	two.Roots()[0] = nil
	handed := must(two.GetX509BundleForTrustDomain(td))(t)
	handed.SetX509Authorities(nil)
	if again := must(two.GetX509BundleForTrustDomain(td))(t); len(again.X509Authorities()) != 2 || two.Roots()[0] == nil {
		t.Error("a bundle was changed from outside")
	}
	if _, err := two.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.example")); err == nil {
		t.Error("a bundle for another trust domain")
	}

	chain, _ := m.leaf(t, spiffeid.RequireFromString(agentEU), t0)
	many := make([]*x509.Certificate, 17)
	for i := range many {
		many[i] = must(identity.NewRoot(td, m.lifetimes, t0))(t).Root()
	}
	for name, roots := range map[string][]*x509.Certificate{"no root": nil, "a leaf": chain[:1], "too many": many} {
		if _, err := identity.NewBundle(td, 1, roots); err == nil {
			t.Errorf("a bundle of %s", name)
		}
	}
	if _, err := identity.NewBundle(spiffeid.TrustDomain{}, 1, one.Roots()); err == nil {
		t.Error("a bundle of no trust domain")
	}
	for _, bad := range []string{"", "{}", `{"keys":[]}`, "null", strings.Replace(string(document), "x509-svid", "x", 2)} {
		if b, err := identity.ParseBundle(td, []byte(bad)); err == nil {
			t.Errorf("%.20q is %v", bad, b)
		}
	}
	for _, bad := range []string{"", "x", string(two.PEM()) + "x", strings.ReplaceAll(string(two.PEM()), "CERTIFICATE", "PRIVATE KEY")} {
		if b, err := identity.ParseBundlePEM(td, 1, []byte(bad)); err == nil {
			t.Errorf("%.20q is %v", bad, b)
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	m := newMesh(f, t0)
	f.Add(must(m.bundle.Marshal())(f))
	f.Add([]byte(`{"keys":[],"spiffe_sequence":1}`))
	f.Add([]byte(`{"keys":[{"use":"x509-svid","kty":"EC","x5c":[""]}]}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		b, err := identity.ParseBundle(td, document)
		if err != nil {
			return
		}
		if again := must(identity.ParseBundle(td, must(b.Marshal())(t)))(t); !again.Equal(b) {
			t.Errorf("%v comes back as %v", b, again)
		}
	})
}

func TestDenials(t *testing.T) {
	d := new(identity.Denials)
	eu, us, boss := peer(t, agentEU).Subject, peer(t, gatewayUS).Subject, peer(t, ctl).Subject
	denied := func(s identity.Subject) bool { return d.Check(s) != nil }
	if denied(eu) || d.Revision() != 0 || len(d.All()) != 0 {
		t.Error("an empty set denies")
	}
	changed := d.Changed()
	if !d.Deny(identity.Denial{Cluster: "eu-1", Generation: 2}) {
		t.Error("a new denial is no change")
	}
	<-changed
	if !denied(eu) || denied(us) || denied(boss) || d.Revision() != 1 {
		t.Errorf("%v", d.All())
	}
	changed = d.Changed()
	if d.Deny(identity.Denial{Cluster: "eu-1", Generation: 2}) || d.Revision() != 1 {
		t.Error("the same denial again is a change")
	}
	d.Deny(identity.Denial{Cluster: "eu-1", Generation: 5}, identity.Denial{Cluster: "us-1", Generation: 1}, identity.Denial{Cluster: "eu-1", Generation: 1})
	<-changed
	want := []identity.Denial{{Cluster: "eu-1", Generation: 1}, {Cluster: "eu-1", Generation: 2}, {Cluster: "eu-1", Generation: 5}, {Cluster: "us-1", Generation: 1}}
	if diff := cmp.Diff(want, d.All()); diff != "" {
		t.Error(diff)
	}
	if err := d.Check(eu); err == nil || !strings.Contains(err.Error(), "generation 5") {
		t.Errorf("%v", err)
	}
	// Lifting an old generation leaves a newer denial.
	if !d.Lift("eu-1", 4) || !denied(eu) {
		t.Errorf("%v", d.All())
	}
	if d.Lift("eu-1", 4) || d.Lift("nobody", 9) {
		t.Error("lifting nothing is a change")
	}
	if !d.Lift("eu-1", 5) || denied(eu) || !denied(us) {
		t.Errorf("%v", d.All())
	}
	if !d.Replace([]identity.Denial{{Cluster: "ap-1", Generation: 3}, {Cluster: "ap-1", Generation: 1}, {Cluster: "ap-1", Generation: 3}}) || denied(us) {
		t.Errorf("%v", d.All())
	}
	if d.Replace([]identity.Denial{{Cluster: "ap-1", Generation: 1}, {Cluster: "ap-1", Generation: 3}}) {
		t.Error("the same set is a change")
	}
	revision := d.Revision()
	if !d.Replace(nil) || len(d.All()) != 0 || d.Revision() != revision+1 {
		t.Errorf("%v", d.All())
	}
}

func TestDenialsAndSetsUnderManyGoroutines(t *testing.T) {
	d, ids := new(identity.Denials), new(identity.IDSet)
	eu := peer(t, agentEU)
	if ids.Has(eu.ID) || ids.All() != nil {
		t.Error("an empty set holds something")
	}
	allow := ids.Allow()
	var wg sync.WaitGroup
	for g := range 20 {
		wg.Go(func() {
			for i := range 200 {
				switch g % 4 {
				case 0:
					d.Deny(identity.Denial{Cluster: federation.ClusterID(fmt.Sprintf("c-%d", i%7)), Generation: int64(g)})
				case 1:
					d.Lift(federation.ClusterID(fmt.Sprintf("c-%d", i%7)), int64(i))
				case 2:
					ids.Replace([]spiffeid.ID{eu.ID})
				default:
					if err := d.Check(eu.Subject); err != nil {
						t.Error(err)
					}
					if err := allow(eu); err != nil && !strings.Contains(err.Error(), "not among") {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := allow(eu); err != nil || len(ids.All()) != 1 {
		t.Errorf("%v", err)
	}
}
