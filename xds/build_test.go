package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/weftmesh/weft/federation"
)

// TestBuild runs the scripts in testdata: each command changes a builder's
// input and prints what its proxy would then be sent. Run with -rewrite to
// accept new output.
func TestBuild(t *testing.T) {
	datadriven.Walk(t, "testdata/build", func(t *testing.T, path string) {
		var b *Builder
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "node" {
				var n scriptNode
				n.read(t, d.Input)
				var err error
				if b, err = NewBuilder(n.node); err != nil {
					return "error: " + err.Error() + "\n"
				}
				return ""
			}
			if err := runScript(t, b, d); err != nil {
				return "error: " + err.Error() + "\n"
			}
			delta, err := b.Take()
			if err != nil {
				return "error: " + err.Error() + "\n"
			}
			for _, r := range delta.Changed {
				if _, err := readResource(r.Type, r.Name.Name, wire(r)); err != nil {
					t.Errorf("the built-in engine would refuse %s: %v", r.Name, err)
				}
			}
			return printDelta(t, delta, d.HasArg("names"))
		})
	})
}

func runScript(t *testing.T, b *Builder, d *datadriven.TestData) error {
	switch d.Cmd {
	case "import":
		return b.SetImport(readImport(t, d.Input))
	case "remove-import":
		var ns string
		var port int
		d.ScanArgs(t, "service", &ns)
		d.ScanArgs(t, "port", &port)
		b.RemoveImport(service(t, ns), uint16(port))
		return nil
	case "export":
		return b.SetExport(readExport(t, d.Input))
	case "remove-export":
		var ns string
		d.ScanArgs(t, "service", &ns)
		return b.RemoveExport(service(t, ns))
	case "members":
		var in struct{ Clusters []federation.ClusterID }
		readYAML(t, d.Input, &in)
		return b.SetMembers(Members{Roots: testRoots(t), Clusters: in.Clusters})
	default:
		d.Fatalf(t, "unknown command %q", d.Cmd)
		return nil
	}
}

// printDelta prints the names and versions, and unless short the content, of
// what changed.
func printDelta(t *testing.T, d Delta, short bool) string {
	t.Helper()
	var out strings.Builder
	for _, r := range d.Changed {
		fmt.Fprintf(&out, "# %s @%s\n", r.Name, r.Version)
		if !short {
			out.WriteString(resourceYAML(t, r))
		}
	}
	for _, n := range d.Removed {
		fmt.Fprintf(&out, "# %s removed\n", n)
	}
	if out.Len() == 0 {
		return "nothing changed\n"
	}
	return out.String()
}

func resourceYAML(t *testing.T, r *Resource) string {
	t.Helper()
	m := r.Type.message()
	if err := proto.Unmarshal(r.Body, m); err != nil {
		t.Fatalf("%s: %v", r.Name, err)
	}
	js, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatalf("%s: %v", r.Name, err)
	}
	y, err := yaml.JSONToYAML(js)
	if err != nil {
		t.Fatalf("%s: %v", r.Name, err)
	}
	return string(y)
}

func readYAML(t *testing.T, in string, out any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(in), out); err != nil {
		t.Fatalf("input: %v\n%s", err, in)
	}
}

func service(t *testing.T, s string) federation.ServiceID {
	t.Helper()
	id, err := federation.ParseServiceID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

type scriptNode struct{ node Node }

func (n *scriptNode) read(t *testing.T, in string) {
	var y struct {
		TrustDomain string
		Cluster     federation.ClusterID
		Kind        string
		Bind        netip.AddrPort
		LocalPipe   string
	}
	readYAML(t, in, &y)
	n.node = Node{
		TrustDomain: spiffeid.RequireTrustDomainFromString(y.TrustDomain),
		Cluster:     y.Cluster, Bind: y.Bind, LocalPipe: y.LocalPipe,
	}
	if y.Kind == "proxy" {
		n.node.Kind = Proxy
	}
}

func readImport(t *testing.T, in string) Import {
	t.Helper()
	type backend struct {
		Cluster  federation.ClusterID
		Region   string
		Share    federation.PerMille
		Mode     string
		Gateways []string
		Serves   []spiffeid.ID
	}
	var y struct {
		Service    string
		Listen     netip.AddrPort
		Policy     string
		Revision   string
		Tiers      [][]backend
		Candidates []backend
	}
	readYAML(t, in, &y)
	i := Import{Listen: y.Listen, Plan: federation.Plan{Service: service(t, y.Service)}}
	if y.Policy != "" {
		id := service(t, y.Policy)
		i.Plan.Policy = federation.PolicyID{Origin: federation.OriginController, Namespace: id.Namespace, Name: id.Name}
	}
	if y.Revision != "" {
		rev, err := federation.ParseRevision(y.Revision)
		if err != nil {
			t.Fatal(err)
		}
		i.Plan.Revision = rev
	}
	for n, tier := range y.Tiers {
		var ft federation.Tier
		for _, b := range tier {
			fb := federation.Backend{Cluster: b.Cluster, Share: b.Share, Mode: mode(b.Mode), Serves: b.Serves}
			for _, g := range b.Gateways {
				a, err := federation.ParseAddress(g)
				if err != nil {
					t.Fatal(err)
				}
				fb.Gateways = append(fb.Gateways, a)
			}
			ft.Backends = append(ft.Backends, fb)
			i.Plan.Verdicts = append(i.Plan.Verdicts, federation.Verdict{Cluster: b.Cluster, Region: b.Region, Tier: n, Share: b.Share})
		}
		i.Plan.Tiers = append(i.Plan.Tiers, ft)
	}
	for _, c := range y.Candidates {
		i.Candidates = append(i.Candidates, &federation.Export{Cluster: c.Cluster, Service: i.Plan.Service, Mode: mode(c.Mode), Serves: c.Serves})
	}
	return i
}

func mode(s string) federation.Mode {
	if s == "passthrough" {
		return federation.Passthrough
	}
	return federation.Terminate
}

func readExport(t *testing.T, in string) Export {
	t.Helper()
	var y struct {
		Service    string
		Mode       string
		Callers    []federation.ClusterID
		AllCallers bool
		Ports      []ExportPort
	}
	readYAML(t, in, &y)
	return Export{Service: service(t, y.Service), Mode: mode(y.Mode), Callers: y.Callers, AllCallers: y.AllCallers, Ports: y.Ports}
}
