package identity_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/identity"
)

func TestIDsAreBuiltAndTakenApart(t *testing.T) {
	for _, c := range []struct {
		build func() (spiffeid.ID, error)
		want  string
		is    identity.Subject
	}{
		{func() (spiffeid.ID, error) { return identity.ControllerID(td, "c-0.weft.svc") }, "spiffe://mesh.example/controller/c-0.weft.svc", identity.Subject{Role: identity.RoleController, Name: "c-0.weft.svc"}},
		{func() (spiffeid.ID, error) { return identity.AgentID(td, "eu-1") }, agentEU, identity.Subject{Role: identity.RoleAgent, Cluster: "eu-1"}},
		{func() (spiffeid.ID, error) { return identity.GatewayID(td, "prod.eu-1") }, "spiffe://mesh.example/cluster/prod.eu-1/gateway", identity.Subject{Role: identity.RoleGateway, Cluster: "prod.eu-1"}},
		{func() (spiffeid.ID, error) { return identity.WorkloadID(td, "eu-1", "shop", "cart.v2") }, "spiffe://mesh.example/cluster/eu-1/ns/shop/sa/cart.v2", identity.Subject{Role: identity.RoleWorkload, Cluster: "eu-1", Namespace: "shop", ServiceAccount: "cart.v2"}},
		{func() (spiffeid.ID, error) { return identity.OperatorID(td, "Ada_L") }, "spiffe://mesh.example/operator/Ada_L", identity.Subject{Role: identity.RoleOperator, Name: "Ada_L"}},
		// A cluster may be called what roles are called.
		{func() (spiffeid.ID, error) { return identity.AgentID(td, "gateway") }, "spiffe://mesh.example/cluster/gateway/agent", identity.Subject{Role: identity.RoleAgent, Cluster: "gateway"}},
	} {
		id := must(c.build())(t)
		if id.String() != c.want {
			t.Errorf("built %s, want %s", id, c.want)
		}
		c.is.ID = id
		if got := must(identity.ParseID(id))(t); got != c.is {
			t.Errorf("parsed %+v, want %+v", got, c.is)
		}
		cluster, ok := identity.ClusterOf(id)
		if cluster != c.is.Cluster || ok != (c.is.Cluster != "") {
			t.Errorf("cluster of %s: %q, %v", id, cluster, ok)
		}
	}
}

func TestIDsOutsideOfTheSchemeNameNobody(t *testing.T) {
	for _, text := range []string{
		"spiffe://mesh.example",
		"spiffe://mesh.example/controller",
		"spiffe://mesh.example/controller/a/b",
		"spiffe://mesh.example/operator",
		"spiffe://mesh.example/cluster/eu-1",
		"spiffe://mesh.example/cluster/eu-1/Agent",
		"spiffe://mesh.example/cluster/eu-1/agent/x",
		"spiffe://mesh.example/cluster/EU-1/agent",
		"spiffe://mesh.example/cluster/a.b.c/agent",
		"spiffe://mesh.example/cluster/-a/agent",
		"spiffe://mesh.example/cluster/a_b/gateway",
		"spiffe://mesh.example/cluster/eu-1/ns/shop",
		"spiffe://mesh.example/cluster/eu-1/ns/shop/sa",
		"spiffe://mesh.example/cluster/eu-1/ns/Shop/sa/x",
		"spiffe://mesh.example/cluster/eu-1/ns/a.b/sa/x",
		"spiffe://mesh.example/cluster/eu-1/ns/shop/sa/X",
		"spiffe://mesh.example/cluster/eu-1/sa/shop/ns/x",
		"spiffe://mesh.example/ns/shop/sa/x",
		"spiffe://mesh.example/controller/" + strings.Repeat("a", 129),
	} {
		id := spiffeid.RequireFromString(text)
		if s, err := identity.ParseID(id); err == nil {
			t.Errorf("%s is %+v", text, s)
		}
		if c, ok := identity.ClusterOf(id); ok {
			t.Errorf("%s lies under %s", text, c)
		}
	}
	if _, err := identity.ParseID(spiffeid.ID{}); err == nil {
		t.Error("no ID is an identity")
	}
}

func TestNamesThatCannotBe(t *testing.T) {
	bad := []string{"", ".", "..", "a.", ".a", "a..b", "a/b", "A", "a b", "ü", strings.Repeat("a", 64), "a\x00", "%2e", "*", "a.b.c", "-", "a-", "a_b"}
	for _, name := range bad {
		if id, err := identity.AgentID(td, federation.ClusterID(name)); err == nil {
			t.Errorf("agent %s", id)
		}
		if id, err := identity.GatewayID(td, federation.ClusterID(name)); err == nil {
			t.Errorf("gateway %s", id)
		}
		if id, err := identity.WorkloadID(td, federation.ClusterID(name), "ns", "sa"); err == nil {
			t.Errorf("workload %s", id)
		}
		if id, err := identity.WorkloadID(td, "eu-1", name, "sa"); err == nil {
			t.Errorf("workload %s", id)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "a b", "ü", "a\x00", "%2e", "*"} {
		if id, err := identity.ControllerID(td, name); err == nil {
			t.Errorf("controller %s", id)
		}
		if id, err := identity.OperatorID(td, name); err == nil {
			t.Errorf("operator %s", id)
		}
		if id, err := identity.WorkloadID(td, "eu-1", "shop", name); err == nil {
			t.Errorf("workload %s", id)
		}
	}
}

func TestEnumsPrint(t *testing.T) {
	for want, got := range map[string]interface{ String() string }{
		"unknown": identity.RoleUnknown, "controller": identity.RoleController, "agent": identity.RoleAgent, "gateway": identity.RoleGateway,
		"workload": identity.RoleWorkload, "operator": identity.RoleOperator, "role(77)": identity.Role(77),
		"root": identity.KindRoot, "region": identity.KindRegion, "operators": identity.KindOperators, "kind(0)": identity.AuthorityKind(0), "kind(9)": identity.AuthorityKind(9),
		"asker": identity.RefusedAsker, "not-yours": identity.RefusedNotYours, "key": identity.RefusedKey, "refusal(0)": identity.RefusalReason(0),
	} {
		if got.String() != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{agentEU, gatewayUS, shopEU, ctl, ada, "spiffe://mesh.example/cluster/a.b/ns/c/sa/d.e", "spiffe://x/cluster//agent"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return
		}
		s, err := identity.ParseID(id)
		if err != nil {
			return
		}
		if s.ID != id || s.Role == identity.RoleUnknown {
			t.Fatalf("%+v", s)
		}
		inCluster := s.Role == identity.RoleAgent || s.Role == identity.RoleGateway || s.Role == identity.RoleWorkload
		if _, err := federation.ParseClusterID(string(s.Cluster)); inCluster != (err == nil) {
			t.Fatalf("%+v", s)
		}
		// Nobody but workloads has anything after the role.
		if rest := strings.Count(id.Path(), "/"); inCluster && rest != 3 && rest != 6 || !inCluster && rest != 2 {
			t.Fatalf("%+v", s)
		}
	})
}
