package federationv1

import (
	"bytes"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
)

// comparable types that go-cmp cannot look into.
var comparables = cmp.Options{
	cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, spiffeid.ID{}, spiffeid.TrustDomain{}),
}

var shop = federation.ServiceID{Namespace: "shop", Name: "payments"}

// facts has one full fact of each kind.
func facts() []Fact {
	at := time.Date(2026, 11, 23, 12, 30, 0, 5000, time.UTC)
	export := federation.ExportID{Cluster: "eu-1.west", Service: shop}
	return []Fact{
		{MemberKey("eu-1.west"), federation.Member{
			Cluster: "eu-1.west", Region: "eu", Zone: "eu-a", Network: "lan", Generation: 3, State: federation.MemberQuarantined,
			Grants:   []federation.Grant{{Namespace: "*", Name: "cart"}, {Namespace: "shop", Name: "*"}},
			Gateways: []federation.Address{{Host: "::1", Port: 15443}, {Host: "gw.example.com", Port: 1}},
			VIPs:     netip.MustParsePrefix("127.1.0.0/16"), MaxExports: 5,
		}},
		{ExportKey(export), federation.Export{
			Cluster: export.Cluster, Service: shop, Accepted: 42, Network: "lan", Mode: federation.Passthrough,
			Ports:    []federation.Port{{Name: "dns", Number: 53, Protocol: federation.UDP}, {Name: "http", Number: 8080, Protocol: federation.TCP, AppProtocol: "kubernetes.io/h2c"}},
			Gateways: []federation.Address{{Host: "127.0.1.1", Port: 15443}},
			Serves:   []spiffeid.ID{spiffeid.RequireFromString("spiffe://mesh.test/cluster/eu-1.west/ns/shop/sa/payments")},
			Visible:  federation.Selector{Clusters: []federation.ClusterID{"us-1", "us-2"}, Regions: []string{"eu"}},
		}},
		{ReadinessKey(export), federation.Readiness{Ready: 2, Total: 3}},
		{PolicyKey(federation.PolicyID{Origin: "controller", Namespace: "shop", Name: "regional"}), federation.Policy{
			ID:              federation.PolicyID{Origin: "controller", Namespace: "shop", Name: "regional"},
			TargetNamespace: "shop", TargetService: "payments", SpillBelow: 700, Accepted: 9,
			Order: []federation.Step{
				{Kind: federation.StepLocal},
				{Kind: federation.StepRegion},
				{Kind: federation.StepClusters, Clusters: []federation.ClusterID{"us-1", "eu-2"}, Split: []federation.Weight{{Cluster: "us-1", Weight: 70}, {Cluster: "eu-2"}}},
				{Kind: federation.StepRegions, Regions: []string{"us"}},
				{Kind: federation.StepAny},
			},
			Deny:     federation.Deny{Clusters: []federation.ClusterID{"cn-1"}, Regions: []string{"mars"}, Unattested: true},
			Liveness: federation.LivenessRule{SuspectAfter: time.Second, ExpireAfter: time.Minute, OnSuspect: federation.ActionDeprioritise, OnExpired: federation.ActionRemove},
		}},
		{SilenceKey("eu-1"), 75 * time.Second},
		{DrainKey("eu-1"), federation.Drain{Remaining: 250, Over: 30 * time.Second, Started: at, CloseExistingAfter: time.Minute, By: "operator/ada"}},
		{VIPKey("eu-1", shop), federation.VIP{Address: netip.MustParseAddr("127.1.0.1"), Released: at}},
		{DenialKey("eu-1", 7), federation.Denial{Cluster: "eu-1", Generation: 7, IssuedBefore: at, Reason: "stolen"}},
		{BundleKey(), federation.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("mesh.test"), Sequence: 4, Roots: [][]byte{{1, 2}, {3}}}},
		{FindingKey("eu-1", federation.CodeFileMalformed, federation.Ref{Kind: "file", Name: "shop/a b.yaml#2"}), federation.Finding{
			Code: federation.CodeFileMalformed, Severity: federation.Warning, Subject: federation.Ref{Kind: "file", Name: "shop/a b.yaml#2"},
			Message: "this is not YAML: ü", Fix: "mend it", DependsOn: []federation.Code{federation.CodeSourceUnreadable}, ReportedBy: "agent", Since: at,
		}},
	}
}

// A fact survives the way into a stored value and back, and has one encoding.
func TestRecords(t *testing.T) {
	kinds := map[KeyKind]bool{}
	for _, f := range facts() {
		kinds[f.Key.Kind] = true
		r := f.Record()
		if r.GetKey() != f.Key.String() {
			t.Errorf("record of %s has the key %s", f.Key, r.GetKey())
		}
		value, err := r.Value()
		if err != nil {
			t.Fatal(err)
		}
		back, err := RecordOf(r.GetKey(), value)
		if err != nil {
			t.Fatal(err)
		}
		got, err := back.Decode()
		if err != nil {
			t.Errorf("%s: %v", f.Key, err)
			continue
		}
		if d := cmp.Diff(f, got, comparables); d != "" {
			t.Errorf("%s (-want +got)\n%s", f.Key, d)
		}
		again, err := got.Record().Value()
		if err != nil || !bytes.Equal(value, again) {
			t.Errorf("%s: two encodings of one fact, %v", f.Key, err)
		}
		if bytes.Contains(value, []byte(f.Key.String())) && f.Key.Kind != KindBundle {
			t.Errorf("%s: the value holds the key", f.Key)
		}
	}
	if len(kinds) != 10 {
		t.Errorf("facts of %d kinds", len(kinds))
	}
	// The least that there can be of each.
	for _, f := range []Fact{
		{MemberKey("a"), federation.Member{Cluster: "a"}},
		{ExportKey(federation.ExportID{Cluster: "a", Service: shop}), federation.Export{Cluster: "a", Service: shop, Ports: []federation.Port{{Number: 1, Protocol: federation.TCP}}}},
		{ReadinessKey(federation.ExportID{Cluster: "a", Service: shop}), federation.Readiness{}},
		{PolicyKey(federation.PolicyID{Origin: "a", Namespace: "b", Name: "c"}), federation.Policy{ID: federation.PolicyID{Origin: "a", Namespace: "b", Name: "c"}}},
		{SilenceKey("a"), time.Duration(0)},
		{DrainKey("a"), federation.Drain{}},
		{DenialKey("a", 0), federation.Denial{Cluster: "a"}},
	} {
		got, err := f.Record().Decode()
		if d := cmp.Diff(f, got, comparables); d != "" || err != nil {
			t.Errorf("%s: %v (-want +got)\n%s", f.Key, err, d)
		}
	}
}

// Each message, spoilt in one place, is refused with that place named.
func TestRefusals(t *testing.T) {
	long := strings.Repeat("a", 70)
	type spoil struct {
		kind  KeyKind
		by    func(*Record)
		names string
	}
	for i, c := range []spoil{
		{KindMember, func(r *Record) { r.GetMember().Cluster = "a/b" }, "cluster"},
		{KindMember, func(r *Record) { r.GetMember().Cluster = "controller" }, "reserved"},
		{KindMember, func(r *Record) { r.GetMember().Region = "EU" }, "region"},
		{KindMember, func(r *Record) { r.GetMember().Zone = long }, "zone"},
		{KindMember, func(r *Record) { r.GetMember().Network = "a.b" }, "network"},
		{KindMember, func(r *Record) { r.GetMember().Generation = -1 }, "generation"},
		{KindMember, func(r *Record) { r.GetMember().State = 77 }, "state"},
		{KindMember, func(r *Record) { r.GetMember().State = 0 }, "state"},
		{KindMember, func(r *Record) { r.GetMember().Grants = []string{"shop/*", "shop"} }, "grants[1]"},
		{KindMember, func(r *Record) { r.GetMember().Grants = make([]string, 5000) }, "grants"},
		{KindMember, func(r *Record) { r.GetMember().Gateways[1].Port = 70000 }, "gateways[1]: port"},
		{KindMember, func(r *Record) { r.GetMember().Gateways[1] = nil }, "gateways[1]"},
		{KindMember, func(r *Record) { r.GetMember().Gateways[0].Host = "0.0.0.0" }, "gateways[0]"},
		{KindMember, func(r *Record) { r.GetMember().Gateways[0].Host = "a b" }, "gateways[0]"},
		{KindMember, func(r *Record) { r.GetMember().Vips = "127.1.0.1/16" }, "vips"},
		{KindMember, func(r *Record) { r.GetMember().Vips = "x" }, "vips"},
		{KindMember, func(r *Record) { r.GetMember().MaxExports = -1 }, "max_exports"},
		{KindMember, func(r *Record) { r.GetMember().Cluster = "other" }, "does not belong"},
		{KindMember, func(r *Record) { r.Body = &Record_Member{} }, "missing"},
		{KindExport, func(r *Record) { r.GetExport().Cluster = "" }, "cluster"},
		{KindExport, func(r *Record) { r.GetExport().Cluster = "us-1" }, "does not belong"},
		{KindExport, func(r *Record) { r.GetExport().Namespace = "../shop" }, "namespace"},
		{KindExport, func(r *Record) { r.GetExport().Name = "" }, "name"},
		{KindExport, func(r *Record) { r.GetExport().Network = "-" }, "network"},
		{KindExport, func(r *Record) { r.GetExport().Ports = nil }, "ports"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].Number = 65536 }, "ports[0]: number"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].Number = 0 }, "ports[0]: number"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].Protocol = "tcp" }, "ports[0]: protocol"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].Name = "h t" }, "ports[0]: name"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].Name = "" }, "ports"},
		{KindExport, func(r *Record) { r.GetExport().Ports[0].AppProtocol = "a\nb" }, "ports[0]: appProtocol"},
		{KindExport, func(r *Record) { r.GetExport().Ports[1].Name = "dns" }, "ports"},
		{KindExport, func(r *Record) {
			r.GetExport().Ports[1].Number, r.GetExport().Ports[1].Protocol = 53, "UDP"
		}, "ports"},
		{KindExport, func(r *Record) { r.GetExport().Accepted = -1 }, "accepted"},
		{KindExport, func(r *Record) { r.GetExport().Mode = 0 }, "mode"},
		{KindExport, func(r *Record) { r.GetExport().Serves[0] = "https://x" }, "serves[0]"},
		{KindExport, func(r *Record) { r.GetExport().Visible.Clusters[0] = "*" }, "visible: clusters[0]"},
		{KindExport, func(r *Record) { r.GetExport().Visible.Regions[0] = "" }, "visible: regions[0]"},
		{KindReadiness, func(r *Record) { r.GetReadiness().Ready = -1 }, "ready"},
		{KindReadiness, func(r *Record) { r.GetReadiness().Ready = 4 }, "ready"},
		{KindReadiness, func(r *Record) { r.GetReadiness().Total = 1 << 30 }, "total"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Origin = "" }, "origin"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Origin = "eu-1" }, "does not belong"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Name = "a/b" }, "name"},
		{KindPolicy, func(r *Record) { r.GetPolicy().TargetNamespace = "" }, "target_namespace"},
		{KindPolicy, func(r *Record) { r.GetPolicy().TargetService = "A" }, "target_service"},
		{KindPolicy, func(r *Record) { r.GetPolicy().SpillBelowPerMille = 1001 }, "spill_below_per_mille"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[0].Kind = 0 }, "order[0]: kind"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[0] = nil }, "order[0]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[0].Clusters = []string{"a"} }, "order[0]: clusters"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[2].Clusters = nil }, "order[2]: clusters"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[2].Clusters = []string{"a", "a"} }, "order[2]: clusters[1]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[2].Split[0].Weight = -1 }, "order[2]: split[0]: weight"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[2].Split[0].Cluster = "eu-2" }, "order[2]: split[1]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[2].Split[0] = nil }, "order[2]: split[0]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order[3].Regions = nil }, "order[3]: regions"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Order = make([]*Step, 100) }, "order"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Deny.Clusters = []string{""} }, "deny: clusters[0]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Deny.Regions = []string{"a", "a"} }, "deny: regions[1]"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Liveness.OnSuspect = 9 }, "liveness: on_suspect"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Liveness.OnExpired = -1 }, "liveness: on_expired"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Liveness.SuspectAfter = durationpb.New(time.Hour) }, "liveness: expire_after"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Liveness.ExpireAfter = durationpb.New(-1) }, "liveness: expire_after"},
		{KindPolicy, func(r *Record) {
			r.GetPolicy().Liveness.ExpireAfter = &durationpb.Duration{Seconds: 1, Nanos: -1}
		}, "liveness: expire_after"},
		{KindPolicy, func(r *Record) { r.GetPolicy().Accepted = -1 }, "accepted"},
		{KindSilence, func(r *Record) { r.GetSilence().Silent = durationpb.New(-1) }, "silent"},
		{KindDrain, func(r *Record) { r.GetDrain().RemainingPerMille = 1001 }, "remaining_per_mille"},
		{KindDrain, func(r *Record) { r.GetDrain().Over = durationpb.New(-1) }, "over"},
		{KindDrain, func(r *Record) { r.GetDrain().Started = &timestamppb.Timestamp{Nanos: -1} }, "started"},
		{KindDrain, func(r *Record) { r.GetDrain().CloseExistingAfter = durationpb.New(1000 * 24 * time.Hour) }, "close_existing_after"},
		{KindDrain, func(r *Record) { r.GetDrain().By = "\x1b[2J" }, "by"},
		{KindVIP, func(r *Record) { r.GetVip().Address = "::" }, "address"},
		{KindVIP, func(r *Record) { r.GetVip().Address = "fe80::1%eth0" }, "address"},
		{KindVIP, func(r *Record) { r.GetVip().Released = &timestamppb.Timestamp{Seconds: 1 << 60} }, "released"},
		{KindDenial, func(r *Record) { r.GetDenial().Cluster = "" }, "cluster"},
		{KindDenial, func(r *Record) { r.GetDenial().Generation = 8 }, "does not belong"},
		{KindDenial, func(r *Record) { r.GetDenial().Generation = -8 }, "generation"},
		{KindDenial, func(r *Record) { r.GetDenial().Reason = "a\nb" }, "reason"},
		{KindDenial, func(r *Record) { r.GetDenial().IssuedBefore = &timestamppb.Timestamp{Nanos: -1} }, "issued_before"},
		{KindBundle, func(r *Record) { r.GetBundle().TrustDomain = "Mesh Test" }, "trust_domain"},
		{KindBundle, func(r *Record) { r.GetBundle().TrustDomain = "spiffe://mesh.test" }, "trust_domain"},
		{KindBundle, func(r *Record) { r.GetBundle().Roots[0] = nil }, "roots[0]"},
		{KindBundle, func(r *Record) { r.GetBundle().Roots = make([][]byte, 1000) }, "roots"},
		{KindFinding, func(r *Record) { r.GetFinding().Code = "X" }, "code"},
		{KindFinding, func(r *Record) { r.GetFinding().Code = "WEFT1001" }, "does not belong"},
		{KindFinding, func(r *Record) { r.GetFinding().Severity = 0 }, "severity"},
		{KindFinding, func(r *Record) { r.GetFinding().Subject = "file" }, "subject"},
		{KindFinding, func(r *Record) { r.GetFinding().Message = "a\tb" }, "message"},
		{KindFinding, func(r *Record) { r.GetFinding().Message = strings.Repeat("a", 5000) }, "message"},
		{KindFinding, func(r *Record) { r.GetFinding().Fix = "\u202e" }, "fix"},
		{KindFinding, func(r *Record) { r.GetFinding().ReportedBy = "\x00" }, "reported_by"},
		{KindFinding, func(r *Record) { r.GetFinding().DependsOn[0] = "Y" }, "depends_on[0]"},
		{KindFinding, func(r *Record) { r.GetFinding().Since = &timestamppb.Timestamp{Nanos: -1} }, "since"},
		{KindBundle, func(r *Record) { r.Body = nil }, "no body"},
		{KindBundle, func(r *Record) { r.Body = &Record_Readiness{&Readiness{}} }, "does not belong"},
		{KindReadiness, func(r *Record) { r.Key = "ready/eu-1/shop" }, "record key"},
		{KindReadiness, func(r *Record) { r.Key = "drain/eu-1" }, "does not belong"},
	} {
		all := facts()
		f := all[slices.IndexFunc(all, func(f Fact) bool { return f.Key.Kind == c.kind })]
		r := f.Record()
		c.by(r)
		_, err := r.Decode()
		switch {
		case err == nil:
			t.Errorf("%d: a %s without %s is taken: %v", i, c.kind, c.names, r)
		case !strings.Contains(err.Error(), c.names):
			t.Errorf("%d: the error does not name %s: %v", i, c.names, err)
		case len(err.Error()) > 1000:
			t.Errorf("%d: an error of %d bytes", i, len(err.Error()))
		}
	}
}

func TestKeys(t *testing.T) {
	for _, s := range []string{
		"bundle", "cluster/eu-1", "cluster/eu-1.west", "export/eu-1/shop/payments", "ready/eu-1/shop/payments", "vip/eu-1/shop/payments",
		"policy/controller/shop/regional", "policy/eu-1/shop/regional", "liveness/eu-1", "drain/eu-1", "deny/eu-1/0", "deny/eu-1/12",
		"finding/eu-1/WEFT1101/export/eu-1%2Fshop%2Fpayments", "finding/eu-1/WEFT2003/file/%2E%2E", "finding/eu-1/WEFT2003/file/a.yaml", "finding/eu-1/WEFT2003/file/%C3%BC",
	} {
		k, err := ParseKey(s)
		if err != nil || k.String() != s {
			t.Errorf("%s reads as %s, %v", s, k, err)
		}
	}
	for _, s := range []string{
		"", "/", "cluster", "cluster/", "cluster//", "/cluster/eu-1", "cluster/eu-1/", "cluster/EU", "cluster/eu_1", "cluster/a.b.c", "cluster/..", "cluster/.", "cluster/controller",
		"cluster/eu-1\x00", "cluster/eu-1 ", "head", "meta", "session/eu-1", "authority/eu/1", "bundle/", "bundle/x", "export/eu-1/shop", "export/eu-1/shop/payments/x", "export/eu-1//payments",
		"export/eu-1/../payments", "export/eu-1/shop/..", "export/eu-1/shop%2Fx/y", "ready/eu-1/shop/Payments", "policy//shop/x", "policy/controller/shop/", "policy/Controller/shop/x", "policy/a/b/c/d",
		"deny/eu-1/", "deny/eu-1/-1", "deny/eu-1/+1", "deny/eu-1/01", "deny/eu-1/1e3", "deny/eu-1/99999999999999999999", "deny/eu-1",
		"finding/eu-1/WEFT1/export/x", "finding/eu-1/WEFT1101/export/", "finding/eu-1/WEFT1101/export/a/b", "finding/eu-1/WEFT1101/export/%", "finding/eu-1/WEFT1101/export/%2", "finding/eu-1/WEFT1101/export/%2f",
		"finding/eu-1/WEFT1101/export/%zz", "finding/eu-1/WEFT1101/export/%61", "finding/eu-1/WEFT1101/export/..", "finding/eu-1/WEFT1101/export/a b", "finding/eu-1/WEFT1101/EXPORT/a", "finding/eu-1/WEFT1101/export/%00", "finding/eu-1/WEFT1101/export/%FF",
		"cluster/" + strings.Repeat("a", 5000), "finding/eu-1/WEFT1101/export/" + strings.Repeat("a", 600),
	} {
		if k, err := ParseKey(s); err == nil {
			t.Errorf("%q is taken for %+v", s, k)
		} else if len(err.Error()) > 500 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
	if s := (Key{Kind: "x"}).String(); s != "invalid/x" {
		t.Errorf("a key that is none prints %q", s)
	}
}

func TestSums(t *testing.T) {
	type entry struct {
		key   string
		value []byte
	}
	var entries []entry
	var all, backwards, without Sums
	for _, f := range facts() {
		v, err := f.Record().Value()
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{f.Key.String(), v})
		all.Add(f.Key.String(), v)
	}
	for _, e := range slices.Backward(entries) {
		backwards.Add(e.key, e.value)
	}
	if all != backwards {
		t.Error("the order matters")
	}
	for i, gone := range entries {
		without = all
		without.Remove(gone.key, gone.value)
		if d := all.Differing(without); !slices.Equal(d, []uint32{Bucket(gone.key)}) {
			t.Errorf("%d: without %s the buckets %v differ", i, gone.key, d)
		}
		without.Add(gone.key, append([]byte{0}, gone.value...))
		if without == all {
			t.Errorf("%s: another value makes no difference", gone.key)
		}
	}
	got, err := all.Encode().Decode()
	if err != nil || got != all {
		t.Errorf("a digest reads back otherwise, %v", err)
	}
	if got, err := (*Digest)(nil).Decode(); err != nil || got != (Sums{}) {
		t.Errorf("no digest is %v, %v", got, err)
	}
	if _, err := (&Digest{Buckets: make([]uint64, 63)}).Decode(); err == nil {
		t.Error("63 buckets are taken")
	}
	// Fixed, because both ends of a stream must agree whatever their versions;
	// made by sha256sum of the key and a zero byte, and FNV-1a by hand.
	if h, b := Hash("cluster/a", nil), Bucket("cluster/a"); h != 0xa168836082b10a1b || b != 5 {
		t.Errorf("hash is %#x in bucket %d", h, b)
	}
}

func TestMesh(t *testing.T) {
	var m Mesh
	var puts []*Record
	for _, f := range facts() {
		puts = append(puts, f.Record())
	}
	bad := &Record{Key: "export/eu-1/shop/bad", Body: &Record_Export{&Export{Cluster: "us-1"}}}
	rev := federation.Revision{Incarnation: "i", Number: 1}
	m1, good, errs := m.Apply(rev, append(puts, bad), []string{"no such/key"})
	if len(good) != len(puts) || len(errs) != 2 {
		t.Fatalf("%d facts, errors %v", len(good), errs)
	}
	export := federation.ExportID{Cluster: "eu-1.west", Service: shop}
	if _, ok := m1.Catalog.Export(export); !ok || m1.Catalog.Revision() != rev {
		t.Errorf("the catalog is\n%s", m1.Catalog.Describe())
	}
	if _, ok := m1.Catalog.Policy(federation.PolicyID{Origin: "controller", Namespace: "shop", Name: "regional"}); !ok {
		t.Error("no policy")
	}
	if r, _ := m1.World.Readiness(export); r != (federation.Readiness{Ready: 2, Total: 3}) {
		t.Errorf("readiness is %v", r)
	}
	if m1.World.Drain("eu-1") != 250 || m1.World.Silence("eu-1") != 75*time.Second {
		t.Errorf("drain %v, silence %v", m1.World.Drain("eu-1"), m1.World.Silence("eu-1"))
	}
	// A bad record under the key of a good one leaves that in force.
	worse := ExportRecord(federation.Export{Cluster: export.Cluster, Service: shop})
	m2, _, errs := m1.Apply(rev, []*Record{worse}, nil)
	if e, ok := m2.Catalog.Export(export); len(errs) != 1 || !ok || len(e.Ports) != 2 {
		t.Errorf("errors %v, export %v", errs, e)
	}
	var keys []string
	for _, f := range facts() {
		keys = append(keys, f.Key.String())
	}
	m3, _, errs := m1.Apply(rev, nil, keys)
	if len(errs) > 0 || len(federation.Diff(m3.Catalog, nil)) > 0 || m3.World.Digest() != (*federation.World)(nil).Digest() {
		t.Errorf("errors %v, left:\n%s", errs, m3.Catalog.Describe())
	}
	if _, ok := m1.Catalog.Export(export); !ok {
		t.Error("a later change changed an earlier mesh")
	}
}

func TestPlans(t *testing.T) {
	var m Mesh
	var puts []*Record
	for _, c := range []federation.ClusterID{"eu-1", "eu-2", "us-1"} {
		gw := []federation.Address{{Host: string(c) + ".gw", Port: 15443}}
		e := federation.Export{Cluster: c, Service: shop, Gateways: gw, Ports: []federation.Port{{Number: 80, Protocol: federation.TCP}}}
		puts = append(puts,
			MemberRecord(federation.Member{Cluster: c, Region: string(c[:2]), State: federation.MemberActive, Grants: []federation.Grant{{Namespace: "*", Name: "*"}}, Gateways: gw}),
			ExportRecord(e), ReadinessRecord(e.ID(), federation.Readiness{Ready: len(c) - 3, Total: 4}))
	}
	puts = append(puts, DrainRecord("eu-1", federation.Drain{Remaining: 500}),
		PolicyRecord(federation.Policy{ID: federation.PolicyID{Origin: "controller", Namespace: "shop", Name: "p"}, TargetNamespace: "shop"}))
	m, _, errs := m.Apply(federation.Revision{Incarnation: "i", Number: 4}, puts, nil)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	p := m.Catalog.PlanPort(shop, 80, federation.Caller{Cluster: "eu-1"}, m.World)
	if len(p.Tiers) != 2 {
		t.Fatalf("the plan is dull:\n%s", p)
	}
	data, err := proto.Marshal(EncodePlan(p))
	if err != nil {
		t.Fatal(err)
	}
	var msg Plan
	if err := proto.Unmarshal(data, &msg); err != nil {
		t.Fatal(err)
	}
	got, err := msg.Decode()
	if err != nil {
		t.Fatal(err)
	}
	// The wire has no origin.
	p.Policy.Origin = ""
	for i := range p.Verdicts {
		p.Verdicts[i].Policy = federation.PolicyID{}
	}
	if d := cmp.Diff(p, got, comparables); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	for i, spoil := range []func(*Plan){
		func(p *Plan) { p.Namespace = "" },
		func(p *Plan) { p.Port = 1 << 20 },
		func(p *Plan) { p.CallerCluster = "" },
		func(p *Plan) { p.Policy = "x" },
		func(p *Plan) { p.Verdicts[0] = nil },
		func(p *Plan) { p.Verdicts[0].Tier = 5 },
		func(p *Plan) { p.Verdicts[0].Tier = -2 },
		func(p *Plan) { p.Verdicts[0].SharePerMille = 1001 },
		func(p *Plan) { p.Verdicts[0].Reason = "whim" },
		func(p *Plan) { p.Verdicts[0].Why = "\x1b" },
		func(p *Plan) { p.Verdicts[0].Mode = 0 },
		func(p *Plan) { p.Verdicts[0].Gateways = []*Address{nil} },
		func(p *Plan) { p.Revision = &Revision{Number: 4} },
	} {
		bad := proto.CloneOf(&msg)
		spoil(bad)
		if _, err := bad.Decode(); err == nil {
			t.Errorf("%d: taken", i)
		}
	}
	if _, err := (*Plan)(nil).Decode(); err == nil {
		t.Error("no plan is taken for one")
	}
}

func TestRevisions(t *testing.T) {
	for _, r := range []federation.Revision{{}, {Incarnation: "a", Number: 0}, {Incarnation: "a", Number: 1 << 60}} {
		if got, err := EncodeRevision(r).Decode(); err != nil || got != r {
			t.Errorf("%v reads as %v, %v", r, got, err)
		}
	}
	for _, r := range []*Revision{{Number: 1}, {Incarnation: "a", Number: -1}, {Incarnation: "a/b"}, {Incarnation: "a\n"}} {
		if _, err := r.Decode(); err == nil {
			t.Errorf("%v is taken", r)
		}
	}
	if r, err := (*Revision)(nil).Decode(); err != nil || r != (federation.Revision{}) {
		t.Errorf("no revision is %v, %v", r, err)
	}
}

func FuzzKey(f *testing.F) {
	for _, fact := range facts() {
		f.Add(fact.Key.String())
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseKey(s)
		if err != nil {
			return
		}
		if k.String() != s || strings.Contains(s, "//") || strings.Contains(s, "/../") || strings.HasSuffix(s, "/..") {
			t.Errorf("%q is taken for %+v", s, k)
		}
	})
}

// FuzzDecode reads bytes as the wire does. What is accepted means the same when
// it is written and read again.
func FuzzDecode(f *testing.F) {
	for _, fact := range facts() {
		data, err := proto.Marshal(fact.Record())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var r Record
		if proto.Unmarshal(data, &r) != nil {
			return
		}
		fact, err := r.Decode()
		if err != nil {
			if len(err.Error()) > 10_000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		again, err := fact.Record().Decode()
		if err != nil {
			t.Fatalf("%v, but the second time %v", fact, err)
		}
		if !reflect.DeepEqual(fact, again) {
			t.Fatalf("read as\n%#v\nand, written again, as\n%#v", fact, again)
		}
		v1, err1 := fact.Record().Value()
		v2, err2 := again.Record().Value()
		if err1 != nil || err2 != nil || !bytes.Equal(v1, v2) {
			t.Fatalf("two encodings of one fact: %v, %v", err1, err2)
		}
		(Mesh{}).Apply(federation.Revision{}, []*Record{&r}, []string{r.GetKey()})
	})
}
