package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/manifest"
	v1 "github.com/weftmesh/weft/federation/v1"
)

// protoMessage is proto.Message, named so that constraints can embed it.
type protoMessage = proto.Message

func clusterView() view[*v1.Cluster] {
	return view[*v1.Cluster]{
		kind: "cluster",
		name: func(c *v1.Cluster) string { return c.GetMember().GetCluster() },
		columns: []column[*v1.Cluster]{
			{title: "CLUSTER", value: func(c *v1.Cluster) cell { return text("%s", c.GetMember().GetCluster()) }},
			{title: "REGION", value: func(c *v1.Cluster) cell { return text("%s", c.GetMember().GetRegion()) }},
			{title: "ZONE", value: func(c *v1.Cluster) cell { return text("%s", c.GetMember().GetZone()) }},
			{title: "STATE", value: stateCell},
			{title: "LIVENESS", value: livenessCell},
			{title: "SHARE", right: true, value: drainCell},
			{title: "EXPORTS", right: true, value: func(c *v1.Cluster) cell { return text("%d", c.GetExports()) }},
			{title: "GATEWAYS", right: true, value: func(c *v1.Cluster) cell { return text("%d", c.GetGateways()) }},
			{title: "APPLIED", right: true, value: func(c *v1.Cluster) cell { return text("%s", revision(c.GetApplied())) }},
			{title: "ACKED", right: true, value: func(c *v1.Cluster) cell { return text("%s", revision(c.GetAcked())) }},
			{title: "NETWORK", wide: true, value: func(c *v1.Cluster) cell { return text("%s", c.GetMember().GetNetwork()) }},
			{title: "GRANTS", wide: true, value: func(c *v1.Cluster) cell { return text("%s", strings.Join(c.GetMember().GetGrants(), ",")) }},
			{title: "ADDRESSES", wide: true, value: func(c *v1.Cluster) cell { return text("%s", addresses(c.GetMember().GetGateways())) }},
			{title: "SESSION", wide: true, value: func(c *v1.Cluster) cell { return text("%s", c.GetSession()) }},
			{title: "AGENT", wide: true, value: func(c *v1.Cluster) cell { return text("%s", c.GetAgentVersion()) }},
		},
	}
}

func stateCell(c *v1.Cluster) cell {
	switch s := c.GetMember().GetState(); s {
	case v1.MemberState_MEMBER_STATE_ACTIVE:
		return cell{"active", good}
	case v1.MemberState_MEMBER_STATE_PENDING:
		return cell{"pending", warn}
	default:
		return cell{strings.ToLower(strings.TrimPrefix(s.String(), "MEMBER_STATE_")), bad}
	}
}

func livenessCell(c *v1.Cluster) cell {
	switch l := c.GetLiveness(); {
	case c.GetMember().GetState() == v1.MemberState_MEMBER_STATE_PENDING && c.GetLastHeard() == nil:
		return cell{}
	case l == federation.Fresh.String():
		return cell{l, good}
	case l == federation.Suspect.String():
		return cell{l, warn}
	default:
		return cell{l, bad}
	}
}

func drainCell(c *v1.Cluster) cell {
	if c.GetDrain() == nil {
		return cell{text: "100%"}
	}
	return cell{perMille(c.GetDrain().GetRemainingPerMille()), warn}
}

func addresses(list []*v1.Address) string {
	out := make([]string, 0, len(list))
	for _, a := range list {
		out = append(out, federation.Address{Host: a.GetHost(), Port: uint16(a.GetPort())}.String())
	}
	return strings.Join(out, ",")
}

func describeCluster(w io.Writer, o *v1.Object) {
	c := o.GetCluster()
	m := c.GetMember()
	heard := "never"
	if t := c.GetLastHeard(); t != nil {
		heard = age(time.Since(t.AsTime())) + " ago"
	}
	printFields(w, []field{
		{"Cluster", text("%s", m.GetCluster())},
		{"Region, zone", text("%s, %s", dash(m.GetRegion()), dash(m.GetZone()))},
		{"Network", text("%s", m.GetNetwork())},
		{"State", stateCell(c)},
		{"Generation", text("%d", m.GetGeneration())},
		{"Liveness", livenessCell(c)},
		{"Last heard", text("%s", heard)},
		{"Session", text("%s", c.GetSession())},
		{"Agent version", text("%s", c.GetAgentVersion())},
		{"May export", text("%s", strings.Join(m.GetGrants(), ", "))},
		{"Gateway addresses", text("%s", addresses(m.GetGateways()))},
		{"Clusterset range", text("%s", m.GetVips())},
		{"Exports", text("%d", c.GetExports())},
		{"Gateways", text("%d", c.GetGateways())},
		{"Share", drainCell(c)},
		{"Applied, acked", text("%s, %s", revision(c.GetApplied()), revision(c.GetAcked()))},
	})
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func portsCell(ports []*v1.Port) cell {
	var out []string
	for _, p := range ports {
		t := fmt.Sprint(p.GetNumber())
		if p.GetProtocol() != string(federation.TCP) {
			t += "/" + p.GetProtocol()
		}
		if p.GetName() != "" {
			t = p.GetName() + ":" + t
		}
		out = append(out, t)
	}
	return text("%s", strings.Join(out, ","))
}

func serviceName(s *v1.Service) string { return s.GetNamespace() + "/" + s.GetName() }

func serviceView() view[*v1.Service] {
	return view[*v1.Service]{
		kind: "service", name: serviceName,
		columns: []column[*v1.Service]{
			{title: "SERVICE", value: func(s *v1.Service) cell { return text("%s", serviceName(s)) }},
			{title: "PORTS", value: func(s *v1.Service) cell { return portsCell(s.GetPorts()) }},
			{title: "CLUSTERS", value: func(s *v1.Service) cell {
				var names []string
				for _, e := range s.GetExports() {
					names = append(names, e.GetExport().GetCluster())
				}
				return text("%s", strings.Join(names, ","))
			}},
			{title: "READY", right: true, value: func(s *v1.Service) cell {
				var ready, total int32
				for _, e := range s.GetExports() {
					ready += e.GetReadiness().GetReady()
					total += e.GetReadiness().GetTotal()
				}
				return readyCell(ready, total)
			}},
			{title: "POLICY", value: func(s *v1.Service) cell { return text("%s", s.GetPolicy()) }},
			{title: "FINDINGS", right: true, value: func(s *v1.Service) cell {
				if n := len(s.GetFindings()); n > 0 {
					return cell{fmt.Sprint(n), warn}
				}
				return cell{text: "0"}
			}},
		},
	}
}

func readyCell(ready, total int32) cell {
	c := text("%d/%d", ready, total)
	switch {
	case ready == 0:
		c.tone = bad
	case ready < total:
		c.tone = warn
	default:
		c.tone = good
	}
	return c
}

func describeService(w io.Writer, o *v1.Object) {
	s := o.GetService()
	policy := s.GetPolicy()
	if policy == "" {
		policy = "none: same cluster, then same region, then anywhere"
	}
	printFields(w, []field{
		{"Service", text("%s", serviceName(s))},
		{"Name", text("%s.%s.svc.clusterset.local", s.GetName(), s.GetNamespace())},
		{"Ports", portsCell(s.GetPorts())},
		{"Policy", text("%s", policy)},
	})
	fmt.Fprintln(w, "\nExports")
	printTable(w, exportView().columns, s.GetExports(), true)
	if len(s.GetFindings()) > 0 {
		fmt.Fprintln(w, "\nFindings")
		printTable(w, findingView().columns, s.GetFindings(), true)
	}
}

func exportName(e *v1.ExportStatus) string {
	x := e.GetExport()
	return x.GetCluster() + "/" + x.GetNamespace() + "/" + x.GetName()
}

func exportView() view[*v1.ExportStatus] {
	return view[*v1.ExportStatus]{
		kind: "export", name: exportName,
		columns: []column[*v1.ExportStatus]{
			{title: "CLUSTER", value: func(e *v1.ExportStatus) cell { return text("%s", e.GetExport().GetCluster()) }},
			{title: "SERVICE", value: func(e *v1.ExportStatus) cell {
				return text("%s/%s", e.GetExport().GetNamespace(), e.GetExport().GetName())
			}},
			{title: "PORTS", value: func(e *v1.ExportStatus) cell { return portsCell(e.GetExport().GetPorts()) }},
			{title: "READY", right: true, value: func(e *v1.ExportStatus) cell {
				return readyCell(e.GetReadiness().GetReady(), e.GetReadiness().GetTotal())
			}},
			{title: "MODE", value: func(e *v1.ExportStatus) cell { return text("%s", modeName(e.GetExport().GetMode())) }},
			{title: "USED", value: func(e *v1.ExportStatus) cell {
				if u := e.GetUnused(); u != "" {
					return cell{"no: " + u, bad}
				}
				return cell{"yes", good}
			}},
			{title: "GATEWAYS", wide: true, value: func(e *v1.ExportStatus) cell { return text("%s", addresses(e.GetExport().GetGateways())) }},
			{title: "VISIBLE TO", wide: true, value: func(e *v1.ExportStatus) cell {
				v := e.GetExport().GetVisible()
				if len(v.GetClusters())+len(v.GetRegions()) == 0 {
					return cell{text: "all"}
				}
				return text("%s", strings.Join(append(v.GetClusters(), v.GetRegions()...), ","))
			}},
			{title: "ACCEPTED", wide: true, right: true, value: func(e *v1.ExportStatus) cell { return text("%d", e.GetExport().GetAccepted()) }},
		},
	}
}

func modeName(m v1.Mode) string {
	return strings.ToLower(strings.TrimPrefix(m.String(), "MODE_"))
}

func describeExport(w io.Writer, o *v1.Object) {
	e := o.GetExport()
	x := e.GetExport()
	used := cell{"yes", good}
	if e.GetUnused() != "" {
		used = cell{"no: " + e.GetUnused(), bad}
	}
	printFields(w, []field{
		{"Export", text("%s", exportName(e))},
		{"Used", used},
		{"Ports", portsCell(x.GetPorts())},
		{"Ready", readyCell(e.GetReadiness().GetReady(), e.GetReadiness().GetTotal())},
		{"Mode", text("%s", modeName(x.GetMode()))},
		{"Identities", text("%s", strings.Join(x.GetServes(), ", "))},
		{"Gateways", text("%s", addresses(x.GetGateways()))},
		{"Network", text("%s", x.GetNetwork())},
		{"Accepted at", text("%d", x.GetAccepted())},
	})
}

func gatewayName(g *v1.Gateway) string { return g.GetCluster() + "/" + g.GetName() }

func gatewayView() view[*v1.Gateway] {
	return view[*v1.Gateway]{
		kind: "gateway", name: gatewayName,
		columns: []column[*v1.Gateway]{
			{title: "CLUSTER", value: func(g *v1.Gateway) cell { return text("%s", g.GetCluster()) }},
			{title: "NAME", value: func(g *v1.Gateway) cell { return text("%s", g.GetName()) }},
			{title: "ROLE", value: func(g *v1.Gateway) cell { return text("%s", g.GetRole()) }},
			{title: "ADDRESS", value: func(g *v1.Gateway) cell { return text("%s", g.GetAddress()) }},
			{title: "ENGINE", value: func(g *v1.Gateway) cell { return text("%s", g.GetEngine()) }},
			{title: "ACKED", right: true, value: func(g *v1.Gateway) cell { return text("%s", revision(g.GetAcked())) }},
			{title: "PEERS", value: peersCell},
			{title: "SVID EXPIRES", value: expiryCell},
			{title: "VERSION", wide: true, value: func(g *v1.Gateway) cell { return text("%s", g.GetVersion()) }},
			{title: "IDENTITY", wide: true, value: func(g *v1.Gateway) cell { return text("%s", g.GetSpiffeId()) }},
			{title: "REFUSAL", wide: true, value: func(g *v1.Gateway) cell { return cell{g.GetNack(), bad} }},
		},
	}
}

func peersCell(g *v1.Gateway) cell {
	if len(g.GetPeers()) == 0 {
		return cell{}
	}
	answers := 0
	var silent []string
	for _, p := range g.GetPeers() {
		if p.GetProbe() == v1.Probe_PROBE_SILENT {
			silent = append(silent, p.GetCluster())
		} else {
			answers++
		}
	}
	if len(silent) > 0 {
		return cell{fmt.Sprintf("%d answer, silent: %s", answers, strings.Join(silent, ",")), bad}
	}
	return cell{fmt.Sprintf("%d answer", answers), good}
}

func expiryCell(g *v1.Gateway) cell {
	if g.GetSvidExpires() == nil {
		return cell{}
	}
	left := time.Until(g.GetSvidExpires().AsTime())
	c := text("in %s", age(left))
	if left <= 0 {
		c = cell{age(-left) + " ago", bad}
	}
	return c
}

func describeGateway(w io.Writer, o *v1.Object) {
	g := o.GetGateway()
	printFields(w, []field{
		{"Gateway", text("%s", gatewayName(g))},
		{"Role", text("%s", g.GetRole())},
		{"Identity", text("%s", g.GetSpiffeId())},
		{"Address", text("%s", g.GetAddress())},
		{"Engine", text("%s %s", g.GetEngine(), g.GetVersion())},
		{"Acked", text("%s", revision(g.GetAcked()))},
		{"Last refusal", cell{g.GetNack(), bad}},
		{"SVID expires", expiryCell(g)},
	})
	if len(g.GetPeers()) > 0 {
		fmt.Fprintln(w, "\nPeers")
		printTable(w, []column[*v1.Peer]{
			{title: "CLUSTER", value: func(p *v1.Peer) cell { return text("%s", p.GetCluster()) }},
			{title: "ADDRESS", value: func(p *v1.Peer) cell { return text("%s", p.GetAddress()) }},
			{title: "PROBE", value: func(p *v1.Peer) cell {
				if p.GetProbe() == v1.Probe_PROBE_SILENT {
					return cell{"silent", bad}
				}
				return cell{"answers", good}
			}},
			{title: "RTT", right: true, value: func(p *v1.Peer) cell { return text("%s", p.GetRtt().AsDuration().Round(10*time.Microsecond)) }},
		}, g.GetPeers(), false)
	}
}

func policyName(p *v1.Policy) string { return p.GetNamespace() + "/" + p.GetName() }

func policyView() view[*v1.Policy] {
	return view[*v1.Policy]{
		kind: "policy", name: policyName,
		object: policyManifest,
		columns: []column[*v1.Policy]{
			{title: "POLICY", value: func(p *v1.Policy) cell { return text("%s", policyName(p)) }},
			{title: "TARGET", value: func(p *v1.Policy) cell { return text("%s", targetOf(p)) }},
			{title: "ORDER", value: func(p *v1.Policy) cell { return text("%s", orderOf(p)) }},
			{title: "SPILL BELOW", right: true, value: func(p *v1.Policy) cell {
				if p.GetSpillBelowPerMille() == 0 {
					return cell{}
				}
				return text("%s", perMille(p.GetSpillBelowPerMille()))
			}},
			{title: "DENY", value: func(p *v1.Policy) cell {
				return text("%s", strings.Join(append(p.GetDeny().GetClusters(), p.GetDeny().GetRegions()...), ","))
			}},
			{title: "ORIGIN", wide: true, value: func(p *v1.Policy) cell { return text("%s", p.GetOrigin()) }},
		},
	}
}

func targetOf(p *v1.Policy) string {
	switch {
	case p.GetTargetNamespace() == "":
		return "every service"
	case p.GetTargetService() == "":
		return p.GetTargetNamespace() + "/*"
	default:
		return p.GetTargetNamespace() + "/" + p.GetTargetService()
	}
}

func orderOf(p *v1.Policy) string {
	if len(p.GetOrder()) == 0 {
		return "local, region, any"
	}
	var out []string
	for _, s := range p.GetOrder() {
		switch s.GetKind() {
		case v1.StepKind_STEP_KIND_CLUSTERS:
			out = append(out, "["+strings.Join(s.GetClusters(), " ")+"]")
		case v1.StepKind_STEP_KIND_REGIONS:
			out = append(out, "regions ["+strings.Join(s.GetRegions(), " ")+"]")
		default:
			out = append(out, strings.ToLower(strings.TrimPrefix(s.GetKind().String(), "STEP_KIND_")))
		}
	}
	return strings.Join(out, ", ")
}

// policyManifest is a policy as the file that makes it, so that what get
// prints can be applied again.
func policyManifest(p *v1.Policy) (any, error) {
	pol, err := p.Decode()
	if err != nil {
		return nil, err
	}
	var m any
	err = yaml.Unmarshal(manifest.EncodePolicy(pol), &m)
	return m, err
}

func describePolicy(w io.Writer, o *v1.Object) {
	p, err := o.GetPolicy().Decode()
	if err != nil {
		fmt.Fprintf(w, "policy %s cannot be shown: %v\n", policyName(o.GetPolicy()), err)
		return
	}
	_, _ = w.Write(manifest.EncodePolicy(p))
}

func findingView() view[*v1.Finding] {
	return view[*v1.Finding]{
		kind: "finding",
		name: func(f *v1.Finding) string { return f.GetCode() + "/" + f.GetSubject() },
		columns: []column[*v1.Finding]{
			{title: "CODE", value: func(f *v1.Finding) cell { return text("%s", f.GetCode()) }},
			{title: "SEVERITY", value: severityCell},
			{title: "SUBJECT", value: func(f *v1.Finding) cell { return text("%s", f.GetSubject()) }},
			{title: "MESSAGE", value: func(f *v1.Finding) cell { return text("%s", f.GetMessage()) }},
			{title: "REPORTED BY", wide: true, value: func(f *v1.Finding) cell { return text("%s", f.GetReportedBy()) }},
			{title: "FIX", wide: true, value: func(f *v1.Finding) cell { return text("%s", f.GetFix()) }},
		},
	}
}

func severityCell(f *v1.Finding) cell {
	switch f.GetSeverity() {
	case v1.Severity_SEVERITY_ERROR:
		return cell{"error", bad}
	case v1.Severity_SEVERITY_WARNING:
		return cell{"warning", warn}
	default:
		return cell{"info", plain}
	}
}

func describeFinding(w io.Writer, o *v1.Object) {
	f := o.GetFinding()
	since := ""
	if t := f.GetSince(); t != nil {
		since = age(time.Since(t.AsTime()))
	}
	printFields(w, []field{
		{"Finding", text("%s", f.GetCode())},
		{"Severity", severityCell(f)},
		{"Subject", text("%s", f.GetSubject())},
		{"Message", text("%s", f.GetMessage())},
		{"Fix", text("%s", f.GetFix())},
		{"Reported by", text("%s", f.GetReportedBy())},
		{"For", text("%s", since)},
		{"Caused by", text("%s", strings.Join(f.GetDependsOn(), ", "))},
	})
}
