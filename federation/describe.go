package federation

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
)

// table writes rows of tab-separated cells in aligned columns.
func table(b *strings.Builder, rows []string) {
	w := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(w, r)
	}
	w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// Locality is a region and zone as people read them, for example "eu/eu-a".
func Locality(region, zone string) string {
	if zone == "" {
		return dash(region)
	}
	return dash(region) + "/" + zone
}

func (r Readiness) String() string { return strconv.Itoa(r.Ready) + "/" + strconv.Itoa(r.Total) }

// String is the selector as people read it, for example "clusters a,b; regions eu".
func (s Selector) String() string {
	if s.IsAll() {
		return "all"
	}
	var parts []string
	if len(s.Clusters) > 0 {
		parts = append(parts, "clusters "+commas(s.Clusters))
	}
	if len(s.Regions) > 0 {
		parts = append(parts, "regions "+commas(s.Regions))
	}
	return strings.Join(parts, "; ")
}

func commas[T ~string](list []T) string {
	s := make([]string, len(list))
	for i, v := range list {
		s[i] = string(v)
	}
	return strings.Join(s, ",")
}

func list[T fmt.Stringer](items []T) string {
	s := make([]string, len(items))
	for i, v := range items {
		s[i] = v.String()
	}
	return dash(strings.Join(s, ","))
}

// String is the step as people read it, for example "clusters eu-2,us-1 split eu-2:70 us-1:30".
func (s Step) String() string {
	out := s.Kind.String()
	switch s.Kind {
	case StepClusters:
		out += " " + commas(s.Clusters)
	case StepRegions:
		out += " " + commas(s.Regions)
	}
	if len(s.Split) > 0 {
		split := make([]string, len(s.Split))
		for i, w := range s.Split {
			split[i] = fmt.Sprintf("%s:%d", w.Cluster, w.Weight)
		}
		out += " split " + strings.Join(split, " ")
	}
	return out
}

// Target is what the policy is for, as people read it.
func (p *Policy) Target() string {
	switch {
	case p.TargetService != "":
		return p.target().String()
	case p.TargetNamespace != "":
		return p.TargetNamespace + "/*"
	default:
		return "mesh"
	}
}

// Describe is the policy in one line, without its name.
func (p *Policy) Describe() string {
	order := make([]string, 0, len(p.Order))
	for _, s := range p.Order {
		order = append(order, s.String())
	}
	if len(order) == 0 {
		order = []string{"local", "region", "any"}
	}
	out := "order " + strings.Join(order, ", ")
	if p.SpillBelow > 0 {
		out += "; spill below " + p.SpillBelow.String()
	}
	if d := p.Deny; len(d.Clusters) > 0 || len(d.Regions) > 0 {
		out += "; deny " + Selector{Clusters: d.Clusters, Regions: d.Regions}.String()
	}
	if p.Deny.Unattested {
		out += "; deny unattested callers"
	}
	if l := p.Liveness; l != (LivenessRule{}) {
		suspect, expire := l.Thresholds()
		onSuspect, onExpired := l.Actions()
		out += fmt.Sprintf("; suspect after %v: %v; expired after %v: %v", suspect, onSuspect, expire, onExpired)
	}
	return out
}

// String is the caller, for example "eu-1/eu-a as spiffe://...".
func (c Caller) String() string {
	s := string(c.Cluster)
	if c.Zone != "" {
		s += "/" + c.Zone
	}
	if !c.ID.IsZero() {
		s += " as " + c.ID.String()
	}
	return s
}

// String is the plan as a table of verdicts.
func (p Plan) String() string {
	var b strings.Builder
	b.WriteString(p.Service.String())
	if p.Port != 0 {
		fmt.Fprintf(&b, ":%d", p.Port)
	}
	policy := "default"
	if p.Policy != (PolicyID{}) {
		policy = p.Policy.String()
	}
	fmt.Fprintf(&b, "  seen from %s  catalog %s  policy %s\n", p.Caller, p.Revision, policy)
	if len(p.Verdicts) == 0 {
		b.WriteString("no cluster offers it here\n")
		return b.String()
	}
	rows := []string{"TIER\tCLUSTER\tLOCALITY\tREADY\tSHARE\tREASON\tWHY"}
	for _, v := range p.Verdicts {
		tier, share := "-", "-"
		if v.Tier >= 0 {
			tier, share = strconv.Itoa(v.Tier), v.Share.String()
		}
		rows = append(rows, strings.Join([]string{
			tier, string(v.Cluster), Locality(v.Region, v.Zone), v.Readiness.String(), share, v.Reason.String(), v.Detail,
		}, "\t"))
	}
	table(&b, rows)
	return b.String()
}

// Describe is the service with its ports, offers and findings.
func (s *Service) Describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  ports %s\n", s.ID, list(s.Ports))
	rows := []string{"CLUSTER\tPORTS\tMODE\tGATEWAYS\tVISIBLE\tACCEPTED\tIN USE"}
	for _, o := range s.Offers {
		use := "yes"
		if !o.InUse {
			use = "no: " + o.Reason.String()
		}
		rows = append(rows, strings.Join([]string{
			string(o.Cluster), list(o.Ports), o.Mode.String(), list(o.Gateways), o.Visible.String(), strconv.FormatInt(o.Accepted, 10), use,
		}, "\t"))
	}
	table(&b, rows)
	for _, f := range s.Findings {
		b.WriteString(f.String() + "\n")
	}
	return b.String()
}

// String is one line: the revision and how much there is.
func (c *Catalog) String() string {
	c = c.orEmpty()
	return fmt.Sprintf("catalog %s: %d clusters, %d services, %d policies", c.revision, c.members.len(), c.services.len(), c.policies.len())
}

// Describe is the whole catalog, for people to read: clusters, services and
// policies with all that is known of them, and the findings.
func (c *Catalog) Describe() string {
	var b strings.Builder
	b.WriteString(c.String() + "\n")
	rows := []string{"CLUSTER\tLOCALITY\tNETWORK\tSTATE\tGENERATION\tGRANTS\tGATEWAYS\tADDRESSES"}
	for m := range c.Members() {
		vips := "-"
		if m.VIPs.IsValid() {
			vips = m.VIPs.String()
		}
		rows = append(rows, strings.Join([]string{
			string(m.Cluster), Locality(m.Region, m.Zone), dash(m.Network), m.State.String(), strconv.FormatInt(m.Generation, 10),
			list(m.Grants), list(m.Gateways), vips,
		}, "\t"))
	}
	if len(rows) > 1 {
		b.WriteString("\n")
		table(&b, rows)
	}
	rows = []string{"SERVICE\tCLUSTER\tPORTS\tMODE\tVISIBLE\tACCEPTED\tIN USE"}
	for s := range c.Services() {
		for i, o := range s.Offers {
			name, use := s.ID.String(), "yes"
			if i > 0 {
				name = ""
			}
			if !o.InUse {
				use = "no: " + o.Reason.String()
			}
			rows = append(rows, strings.Join([]string{
				name, string(o.Cluster), list(o.Ports), o.Mode.String(), o.Visible.String(), strconv.FormatInt(o.Accepted, 10), use,
			}, "\t"))
		}
	}
	if len(rows) > 1 {
		b.WriteString("\n")
		table(&b, rows)
	}
	rows = []string{"POLICY\tORIGIN\tTARGET\tACCEPTED\tSAYS"}
	for p := range c.Policies() {
		rows = append(rows, strings.Join([]string{
			p.ID.String(), p.ID.Origin, p.Target(), strconv.FormatInt(p.Accepted, 10), p.Describe(),
		}, "\t"))
	}
	if len(rows) > 1 {
		b.WriteString("\n")
		table(&b, rows)
	}
	if findings := c.Findings(); len(findings) > 0 {
		b.WriteString("\n")
		for _, f := range findings {
			b.WriteString(f.String() + "\n")
		}
	}
	return b.String()
}
