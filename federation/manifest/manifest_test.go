package manifest

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weftmesh/weft/federation"
)

var update = flag.Bool("update", false, "write the expected output of testdata anew")

// compareAddrs compares what go-cmp cannot look into.
var compareAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})

const policyText = `apiVersion: weft.dev/v1
kind: FailoverPolicy
metadata: {name: payments, namespace: shop}
spec:
  target: {service: payments}
  order: [local, region, {clusters: [eu-2, us-1], split: {eu-2: 70, us-1: 30}}, {regions: [us]}, {any: true, split: {ap-1: 1}}]
  spillBelow: 70%
  deny: {clusters: [cn-1], regions: [mars], unattestedCallers: true}
  liveness: {suspectAfter: 10s, expireAfter: 1m, onSuspect: keep, onExpired: remove}
`

const serviceText = `apiVersion: weft.dev/v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  export: true
  mode: passthrough
  visibility: {clusters: [us-1, eu-2], regions: [eu]}
  serviceAccounts: [payments]
  healthCheck: {http: {path: /healthz, port: http}, interval: 2s, timeout: 200ms, unhealthyAfter: 3, healthyAfter: 2}
  ports: [{name: http, port: 8080, appProtocol: http}, {name: admin, port: 9000}]
  endpoints:
  - {address: 127.0.1.10, ports: {http: 18080}, zone: eu-a, proxy: "127.0.3.10:15443"}
  - {address: "::1", ports: {"9000": 19000}, proxy: "[::1]:15443"}
`

func one(t *testing.T, text string) Document {
	t.Helper()
	docs, bad := Decode("test.yaml", []byte(text))
	for _, e := range bad {
		t.Error(e)
	}
	if len(docs) != 1 {
		t.Fatalf("%d documents", len(docs))
	}
	return docs[0]
}

func TestPolicy(t *testing.T) {
	got := one(t, policyText)
	want := &federation.Policy{
		ID:              federation.PolicyID{Namespace: "shop", Name: "payments"},
		TargetNamespace: "shop", TargetService: "payments",
		Order: []federation.Step{
			{Kind: federation.StepLocal},
			{Kind: federation.StepRegion},
			{Kind: federation.StepClusters, Clusters: []federation.ClusterID{"eu-2", "us-1"}, Split: []federation.Weight{{Cluster: "eu-2", Weight: 70}, {Cluster: "us-1", Weight: 30}}},
			{Kind: federation.StepRegions, Regions: []string{"us"}},
			{Kind: federation.StepAny, Split: []federation.Weight{{Cluster: "ap-1", Weight: 1}}},
		},
		SpillBelow: 700,
		Deny:       federation.Deny{Clusters: []federation.ClusterID{"cn-1"}, Regions: []string{"mars"}, Unattested: true},
		Liveness: federation.LivenessRule{
			SuspectAfter: 10 * time.Second, ExpireAfter: time.Minute, OnSuspect: federation.ActionKeep, OnExpired: federation.ActionRemove,
		},
	}
	if d := cmp.Diff(want, got.Policy); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if got.Kind() != KindFailoverPolicy || got.Name() != "shop/payments" || got.Number != 1 || got.Line != 1 {
		t.Errorf("document is %+v", got)
	}
}

func TestService(t *testing.T) {
	http := federation.Port{Name: "http", Number: 8080, Protocol: federation.TCP, AppProtocol: "http"}
	admin := federation.Port{Name: "admin", Number: 9000, Protocol: federation.TCP}
	want := &Service{
		ID: federation.ServiceID{Namespace: "shop", Name: "payments"}, Export: true, Mode: federation.Passthrough,
		Visible:         federation.Selector{Clusters: []federation.ClusterID{"eu-2", "us-1"}, Regions: []string{"eu"}},
		ServiceAccounts: []string{"payments"},
		Ports:           []federation.Port{http, admin},
		Endpoints: []Endpoint{
			{Address: netip.MustParseAddr("127.0.1.10"), Ports: map[federation.Port]uint16{http: 18080, admin: 9000}, Zone: "eu-a", Proxy: netip.MustParseAddrPort("127.0.3.10:15443")},
			{Address: netip.MustParseAddr("::1"), Ports: map[federation.Port]uint16{http: 8080, admin: 19000}, Proxy: netip.MustParseAddrPort("[::1]:15443")},
		},
		HealthCheck: &HealthCheck{Port: http, Path: "/healthz", Interval: 2 * time.Second, Timeout: 200 * time.Millisecond, UnhealthyAfter: 3, HealthyAfter: 2},
	}
	got := one(t, serviceText).Service
	if d := cmp.Diff(want, got, compareAddrs); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if at := got.Endpoints[0].At(http); at != netip.MustParseAddrPort("127.0.1.10:18080") {
		t.Errorf("the first endpoint is at %v", at)
	}
}

func TestDefaults(t *testing.T) {
	for text, want := range map[string]HealthCheck{
		"http: {}":                   {Path: "/", Interval: DefaultInterval, Timeout: DefaultTimeout, UnhealthyAfter: 2, HealthyAfter: 1},
		"tcp: {}":                    {Interval: DefaultInterval, Timeout: DefaultTimeout, UnhealthyAfter: 2, HealthyAfter: 1},
		"tcp: {port: 80}":            {Interval: DefaultInterval, Timeout: DefaultTimeout, UnhealthyAfter: 2, HealthyAfter: 1},
		"tcp: {}, interval: 100ms":   {Interval: 100 * time.Millisecond, Timeout: 100 * time.Millisecond, UnhealthyAfter: 2, HealthyAfter: 1},
		"http: {port: '80', path: }": {Path: "/", Interval: DefaultInterval, Timeout: DefaultTimeout, UnhealthyAfter: 2, HealthyAfter: 1},
	} {
		doc := one(t, "apiVersion: weft.dev/v1\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {ports: [{port: 80}], healthCheck: {"+text+"}}")
		want.Port = federation.Port{Number: 80, Protocol: federation.TCP}
		if d := cmp.Diff(&want, doc.Service.HealthCheck); d != "" {
			t.Errorf("%s (-want +got)\n%s", text, d)
		}
		if doc.Service.Export || doc.Service.Mode != federation.Terminate || !doc.Service.Visible.IsAll() {
			t.Errorf("%+v", doc.Service)
		}
	}
}

// What is written reads back as the same, and is written as the same again.
func TestEncode(t *testing.T) {
	for _, text := range []string{
		policyText, serviceText,
		"apiVersion: weft.dev/v1\nkind: FailoverPolicy\nmetadata: {name: a, namespace: b}\nspec: {target: {allServices: true}}",
		"apiVersion: weft.dev/v1\nkind: FailoverPolicy\nmetadata: {name: a, namespace: weft-system}\nspec: {target: {mesh: true}, spillBelow: 12.5%}",
		"apiVersion: weft.dev/v1\nkind: FailoverPolicy\nmetadata: {name: '1', namespace: 'true'}\nspec: {target: {service: 'null'}, order: [{clusters: ['12', '1e3']}]}",
		"apiVersion: weft.dev/v1\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {ports: [{port: 80}], endpoints: [{address: 10.0.0.1, ports: {'80': 81}}], healthCheck: {tcp: {}}}",
	} {
		doc := one(t, text)
		written := encode(doc)
		again := one(t, string(written))
		if d := cmp.Diff(doc, again, compareAddrs, cmpopts.IgnoreFields(Document{}, "Line")); d != "" {
			t.Errorf("(-first +second)\n%s\n%s", d, written)
		}
		if second := encode(again); !bytes.Equal(written, second) {
			t.Errorf("written as\n%s\nthen as\n%s", written, second)
		}
	}
}

func encode(doc Document) []byte {
	if doc.Policy != nil {
		return EncodePolicy(*doc.Policy)
	}
	return EncodeService(*doc.Service)
}

// Every file of testdata is read, and what comes of it compared with the
// .golden file beside it.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		docs, bad := Decode(filepath.Base(file), data)
		for _, d := range docs {
			fmt.Fprintf(&got, "--- # document %d, line %d\n%s", d.Number, d.Line, encode(d))
		}
		for _, e := range bad {
			fmt.Fprintf(&got, "=== %v\n", e)
			for _, f := range e.Findings() {
				if _, ok := federation.Explain(f.Code); !ok {
					t.Errorf("%s: %s is not documented", file, f.Code)
				}
				fmt.Fprintf(&got, "    %s\n", f.Code)
			}
		}
		golden := strings.TrimSuffix(file, ".yaml") + ".golden"
		if *update {
			if err := os.WriteFile(golden, []byte(got.String()), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), got.String()); d != "" {
			t.Errorf("%s (-want +got)\n%s", file, d)
		}
	}
}

func TestBounds(t *testing.T) {
	deep := "apiVersion: weft.dev/v1\nspec: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	laughs := "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
	many := strings.Repeat("---\nx\n", 5000)
	for name, c := range map[string]struct{ text, want string }{
		"deep":      {deep, "nested more than"},
		"aliases":   {laughs, "anchors and aliases"},
		"many":      {many, "documents, at most"},
		"large":     {strings.Repeat("#", MaxSize+1), "bytes, at most"},
		"binary":    {"\x00\x01\x02", "not YAML"},
		"not utf-8": {"a: \xff\xfe", "not YAML"},
	} {
		docs, bad := Decode("f", []byte(c.text))
		if len(docs) > 0 || len(bad) == 0 || !strings.Contains(bad[0].Error(), c.want) {
			t.Errorf("%s: %d documents, errors %v", name, len(docs), bad)
		}
		if len(bad) > 0 && len(bad[0].Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(bad[0].Error()))
		}
	}
	// A hostile document is not told of everything that is wrong with it.
	var b strings.Builder
	b.WriteString("apiVersion: weft.dev/v1\nkind: Service\n")
	for i := range 10000 {
		fmt.Fprintf(&b, "x%d: 1\n", i)
	}
	_, bad := Decode("f", []byte(b.String()))
	if len(bad) != 1 || len(bad[0].Problems) != maxProblems {
		t.Errorf("%d errors, %d problems", len(bad), len(bad[0].Problems))
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(policyText))
	f.Add([]byte(serviceText))
	f.Add([]byte(policyText + "---\n" + serviceText))
	files, _ := filepath.Glob("testdata/*.yaml")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		docs, bad := Decode("f", data)
		for _, d := range docs {
			if d.Policy != nil {
				if err := d.Policy.Check(); err != nil {
					t.Errorf("a policy that cannot be carried out: %v", err)
				}
			}
			written := encode(d)
			again, errs := Decode("f", written)
			if len(errs) > 0 || len(again) != 1 {
				t.Fatalf("written as\n%s\nreads as %v", written, errs)
			}
			if d := cmp.Diff(d, again[0], compareAddrs, cmpopts.IgnoreFields(Document{}, "Line", "Number")); d != "" {
				t.Errorf("(-first +second)\n%s\n%s", d, written)
			}
		}
		for _, e := range bad {
			if len(e.Problems) == 0 || len(e.Problems) > maxProblems {
				t.Errorf("%d problems", len(e.Problems))
			}
			for _, p := range e.Problems {
				if len(p.String()) > 2000 {
					t.Errorf("a problem of %d bytes: %v", len(p.String()), p)
				}
			}
		}
	})
}
