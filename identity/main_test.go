package identity_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/weftmesh/weft/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td = spiffeid.RequireTrustDomainFromString("mesh.example")
	t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

// mesh is a root, a region below it, and the operators' authority.
type mesh struct {
	root, region, operators *identity.Authority
	lifetimes               identity.Lifetimes
	bundle, people          *identity.Bundle
}

func newMesh(t testing.TB, now time.Time) *mesh {
	t.Helper()
	m := &mesh{lifetimes: identity.DefaultLifetimes()}
	m.root = must(identity.NewRoot(td, m.lifetimes, now))(t)
	m.region = must(m.root.NewRegion("eu", m.lifetimes, now))(t)
	m.operators = must(identity.NewOperators(td, m.lifetimes, now))(t)
	m.bundle = must(identity.NewBundle(td, 1, []*x509.Certificate{m.root.Root()}))(t)
	m.people = must(identity.NewBundle(td, 1, []*x509.Certificate{m.operators.Root()}))(t)
	return m
}

// leaf signs id for a new key by the authority that signs its role.
func (m *mesh) leaf(t testing.TB, id spiffeid.ID, now time.Time) ([]*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := must(identity.NewKey())(t)
	by := m.region
	if s := must(identity.ParseID(id))(t); s.Role == identity.RoleOperator {
		by = m.operators
	}
	chain := must(by.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, m.lifetimes, now))(t)
	return chain, key
}

// must unwraps a result or ends the test.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func peer(t testing.TB, id string) identity.Peer {
	t.Helper()
	return identity.Peer{Subject: must(identity.ParseID(spiffeid.RequireFromString(id)))(t)}
}

func itoa(n int) string { return strconv.Itoa(n) }

// gauge is the value of a metric without labels.
func gauge(t testing.TB, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	for _, family := range must(reg.Gather())(t) {
		if family.GetName() == name {
			m := family.GetMetric()[0]
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func certs(authorities ...*identity.Authority) []*x509.Certificate {
	var all []*x509.Certificate
	for _, a := range authorities {
		all = append(all, a.Certificate())
	}
	return all
}
