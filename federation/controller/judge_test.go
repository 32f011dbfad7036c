package controller

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func testMember() federation.Member {
	return federation.Member{
		Cluster: "eu-1", Region: "eu", Network: "lan", State: federation.MemberActive, Generation: 1,
		Grants:   []federation.Grant{{Namespace: "shop", Name: "*"}},
		Gateways: []federation.Address{{Host: "192.0.2.1", Port: 15443}},
	}
}

func testExport(c federation.ClusterID, name string) federation.Export {
	return federation.Export{
		Cluster: c, Service: federation.ServiceID{Namespace: "shop", Name: name},
		Ports:    []federation.Port{{Name: "http", Number: 80, Protocol: federation.TCP}},
		Gateways: []federation.Address{{Host: "192.0.2.1", Port: 15443}},
	}
}

func TestJudge(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	with := func(edit func(*federation.Export)) *federationv1.Record {
		e := testExport("eu-1", "payments")
		edit(&e)
		return federationv1.ExportRecord(e)
	}
	id := func(e federation.Export) federation.ExportID { return e.ID() }
	for _, tt := range []struct {
		name   string
		record *federationv1.Record
		code   federation.Code // empty: taken
		says   string
	}{
		{name: "an export", record: with(func(*federation.Export) {})},
		{
			name: "an export of its own identities", record: with(func(e *federation.Export) {
				e.Serves = []spiffeid.ID{spiffeid.RequireFromString("spiffe://mesh.test/cluster/eu-1/ns/shop/sa/payments")}
			}),
		},
		{name: "another cluster's export", record: federationv1.ExportRecord(testExport("eu-2", "payments")), code: federation.CodeClaimsOtherCluster, says: "speaks for itself only"},
		{name: "another cluster's readiness", record: federationv1.ReadinessRecord(id(testExport("eu-2", "payments")), federation.Readiness{}), code: federation.CodeClaimsOtherCluster},
		{name: "a registration", record: federationv1.MemberRecord(testMember()), code: federation.CodeClaimsOtherCluster},
		{name: "a drain", record: federationv1.DrainRecord("eu-1", federation.Drain{}), code: federation.CodeClaimsOtherCluster},
		{name: "a denial", record: federationv1.DenialRecord(federation.Denial{Cluster: "eu-1"}), code: federation.CodeClaimsOtherCluster},
		{name: "an operator's policy", record: federationv1.PolicyRecord(federation.Policy{ID: federation.PolicyID{Origin: "controller", Namespace: "shop", Name: "p"}}), code: federation.CodeClaimsOtherCluster},
		{name: "its own policy", record: federationv1.PolicyRecord(federation.Policy{ID: federation.PolicyID{Origin: "eu-1", Namespace: "shop", Name: "p"}})},
		{
			name: "outside its grants", code: federation.CodeOutsideGrant, says: "shop/*",
			record: with(func(e *federation.Export) { e.Service.Namespace = "bank" }),
		},
		{
			name: "a gateway outside its registration", code: federation.CodeGatewayOutsideRegistration, says: "192.0.2.66:15443",
			record: with(func(e *federation.Export) {
				e.Gateways = append(e.Gateways, federation.Address{Host: "192.0.2.66", Port: 15443})
			}),
		},
		{
			name: "another cluster's identity", code: federation.CodeClaimsOtherCluster, says: "spiffe://mesh.test/cluster/eu-2/ns/shop/sa/payments",
			record: with(func(e *federation.Export) {
				e.Serves = []spiffeid.ID{spiffeid.RequireFromString("spiffe://mesh.test/cluster/eu-2/ns/shop/sa/payments")}
			}),
		},
		{
			name: "another trust domain's identity", code: federation.CodeClaimsOtherCluster,
			record: with(func(e *federation.Export) {
				e.Serves = []spiffeid.ID{spiffeid.RequireFromString("spiffe://other.test/cluster/eu-1/ns/shop/sa/payments")}
			}),
		},
		{name: "another network", record: with(func(e *federation.Export) { e.Network = "wan" }), code: federation.CodeClaimsOtherCluster},
		{name: "a body under another key", record: func() *federationv1.Record {
			r := with(func(*federation.Export) {})
			r.Key = "export/eu-1/shop/other"
			return r
		}(), code: federation.CodeRecordRefused},
		{name: "no body", record: &federationv1.Record{Key: "export/eu-1/shop/payments"}, code: federation.CodeRecordRefused},
		{name: "no key", record: &federationv1.Record{}, code: federation.CodeRecordRefused},
		{name: "readiness of nothing", record: federationv1.ReadinessRecord(id(testExport("eu-1", "absent")), federation.Readiness{}), code: federation.CodeRecordRefused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newJudge(td, testMember(), map[string][]byte{}).put(tt.record)
			if tt.code == "" {
				if v.refused != nil || v.record == nil {
					t.Errorf("refused: %v", v.refused)
				}
				return
			}
			if v.refused == nil || v.refused.Code != tt.code || v.record != nil {
				t.Fatalf("finding %v, record %v; want refused by %s", v.refused, v.record, tt.code)
			}
			if !strings.Contains(v.refused.Message, tt.says) {
				t.Errorf("says %q, want it to hold %q", v.refused.Message, tt.says)
			}
		})
	}
}

func TestJudgeWritesWhatChangedOnly(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	j := newJudge(td, testMember(), map[string][]byte{})
	e := testExport("eu-1", "payments")
	e.Accepted = 77 // a claim
	v := j.put(federationv1.ExportRecord(e))
	if v.record == nil || v.record.GetExport().GetAccepted() != 0 {
		t.Fatalf("record %v; want one without the claimed acceptance", v.record)
	}
	j.took(v.key, v.value)
	e.Accepted = 78
	if v := j.put(federationv1.ExportRecord(e)); v.record != nil || v.refused != nil {
		t.Errorf("the same again: %v, %v; want nothing to write", v.record, v.refused)
	}
	e.Ports[0].Number = 81
	if v := j.put(federationv1.ExportRecord(e)); v.record == nil {
		t.Error("a changed port is not written")
	}
}

func TestJudgeCountsExports(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	m := testMember()
	m.MaxExports = 2
	j := newJudge(td, m, map[string][]byte{})
	put := func(name string) *federation.Finding {
		v := j.put(federationv1.ExportRecord(testExport("eu-1", name)))
		if v.record != nil {
			j.took(v.key, v.value)
		}
		return v.refused
	}
	if put("a") != nil || put("b") != nil {
		t.Fatal("within the limit, and refused")
	}
	if f := put("c"); f == nil || f.Code != federation.CodeTooManyExports {
		t.Errorf("the third of two: %v", f)
	}
	if f := put("a"); f != nil {
		t.Errorf("one that is there already: %v", f)
	}
	gone := testExport("eu-1", "a")
	j.took(federationv1.ExportKey(gone.ID()), nil)
	if f := put("c"); f != nil {
		t.Errorf("after one has gone: %v", f)
	}
}
