package manifest

import (
	"bytes"
	"fmt"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/weftmesh/weft/federation"
)

// EncodePolicy writes a policy as a document that Decode reads back. Its origin
// and acceptance, which no document has, are left out.
func EncodePolicy(p federation.Policy) []byte {
	target := pairs{}
	switch {
	case p.TargetService != "":
		target.add("service", p.TargetService)
	case p.TargetNamespace != "":
		target.add("allServices", true)
	default:
		target.add("mesh", true)
	}
	spec := pairs{}
	spec.add("target", target)
	if len(p.Order) > 0 {
		var order []any
		for _, s := range p.Order {
			order = append(order, encodeStep(s))
		}
		spec.add("order", order)
	}
	if p.SpillBelow != 0 {
		spec.add("spillBelow", p.SpillBelow.String())
	}
	deny := pairs{}
	deny.addList("clusters", strs(p.Deny.Clusters))
	deny.addList("regions", strs(p.Deny.Regions))
	if p.Deny.Unattested {
		deny.add("unattestedCallers", true)
	}
	spec.addPairs("deny", deny)
	l := pairs{}
	l.addDuration("suspectAfter", p.Liveness.SuspectAfter)
	l.addDuration("expireAfter", p.Liveness.ExpireAfter)
	if p.Liveness.OnSuspect != federation.ActionDefault {
		l.add("onSuspect", p.Liveness.OnSuspect.String())
	}
	if p.Liveness.OnExpired != federation.ActionDefault {
		l.add("onExpired", p.Liveness.OnExpired.String())
	}
	spec.addPairs("liveness", l)
	return document(KindFailoverPolicy, federation.ServiceID{Namespace: p.ID.Namespace, Name: p.ID.Name}, spec)
}

// encodeStep is a word, where one says it all, or a mapping.
func encodeStep(s federation.Step) any {
	step := pairs{}
	switch {
	case s.Kind == federation.StepClusters:
		step.addList("clusters", strs(s.Clusters))
	case s.Kind == federation.StepRegions:
		step.addList("regions", strs(s.Regions))
	case len(s.Split) == 0:
		return s.Kind.String()
	default:
		step.add(s.Kind.String(), true)
	}
	if len(s.Split) > 0 {
		split := pairs{}
		for _, w := range s.Split {
			split.add(string(w.Cluster), w.Weight)
		}
		step.add("split", split)
	}
	return step
}

// EncodeService writes a service as a document that Decode reads back.
func EncodeService(s Service) []byte {
	spec := pairs{}
	spec.add("export", s.Export)
	spec.add("mode", s.Mode.String())
	visible := pairs{}
	visible.addList("clusters", strs(s.Visible.Clusters))
	visible.addList("regions", strs(s.Visible.Regions))
	spec.addPairs("visibility", visible)
	spec.addList("serviceAccounts", strs(s.ServiceAccounts))
	var ports []any
	for _, p := range s.Ports {
		port := pairs{}
		if p.Name != "" {
			port.add("name", p.Name)
		}
		port.add("port", int(p.Number))
		port.add("protocol", string(p.Protocol))
		if p.AppProtocol != "" {
			port.add("appProtocol", p.AppProtocol)
		}
		ports = append(ports, port)
	}
	spec.addList("ports", ports)
	var endpoints []any
	for _, e := range s.Endpoints {
		end, at := pairs{}, pairs{}
		end.add("address", e.Address.String())
		for _, p := range s.Ports {
			if e.Ports[p] != p.Number {
				at.add(portName(p), int(e.Ports[p]))
			}
		}
		end.addPairs("ports", at)
		if e.Zone != "" {
			end.add("zone", e.Zone)
		}
		if e.Proxy.IsValid() {
			end.add("proxy", e.Proxy.String())
		}
		endpoints = append(endpoints, end)
	}
	spec.addList("endpoints", endpoints)
	if h := s.HealthCheck; h != nil {
		check, probe := pairs{}, pairs{}
		if h.Path != "" {
			probe.add("path", h.Path)
		}
		probe.add("port", portName(h.Port))
		if h.Path != "" {
			check.add("http", probe)
		} else {
			check.add("tcp", probe)
		}
		check.addDuration("interval", h.Interval)
		check.addDuration("timeout", h.Timeout)
		check.add("unhealthyAfter", h.UnhealthyAfter)
		check.add("healthyAfter", h.HealthyAfter)
		spec.add("healthCheck", check)
	}
	return document(KindService, s.ID, spec)
}

// portName is how a document refers to a port of its service.
func portName(p federation.Port) string {
	if p.Name != "" {
		return p.Name
	}
	return strconv.Itoa(int(p.Number))
}

func document(kind string, id federation.ServiceID, spec pairs) []byte {
	meta, doc := pairs{}, pairs{}
	meta.add("name", id.Name)
	meta.add("namespace", id.Namespace)
	doc.add("apiVersion", APIVersion)
	doc.add("kind", kind)
	doc.add("metadata", meta)
	doc.add("spec", spec)
	var b bytes.Buffer
	out := yaml.NewEncoder(&b)
	out.SetIndent(2)
	// Nothing in pairs can fail to be written, nor can a buffer.
	if err := out.Encode(doc.node()); err != nil {
		panic(fmt.Sprintf("manifest: %v", err))
	}
	return b.Bytes()
}

// pairs is a mapping with an order: names and their values in turn. A value is
// a string, int, bool, pairs, or list of those.
type pairs []any

func (p *pairs) add(name string, value any) { *p = append(*p, name, value) }

func (p *pairs) addList(name string, list []any) {
	if len(list) > 0 {
		p.add(name, list)
	}
}

func (p *pairs) addPairs(name string, value pairs) {
	if len(value) > 0 {
		p.add(name, value)
	}
}

func (p *pairs) addDuration(name string, d time.Duration) {
	if d != 0 {
		p.add(name, d.String())
	}
}

func strs[T ~string](list []T) []any {
	var out []any
	for _, v := range list {
		out = append(out, string(v))
	}
	return out
}

func (p pairs) node() *yaml.Node { return node(p) }

func node(v any) *yaml.Node {
	n := new(yaml.Node)
	switch v := v.(type) {
	case pairs:
		n.Kind, n.Tag = yaml.MappingNode, "!!map"
		for _, item := range v {
			n.Content = append(n.Content, node(item))
		}
	case []any:
		n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
		for _, item := range v {
			n.Content = append(n.Content, node(item))
		}
	case string:
		n.SetString(v) // quotes what would read as something else
	case int:
		n.Kind, n.Tag, n.Value = yaml.ScalarNode, "!!int", strconv.Itoa(v)
	case bool:
		n.Kind, n.Tag, n.Value = yaml.ScalarNode, "!!bool", strconv.FormatBool(v)
	}
	return n
}
