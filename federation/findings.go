package federation

import (
	"fmt"
	"slices"
	"strings"
)

// Findings lists what is wrong in the catalog, the gravest first. They follow
// from the catalog alone, whatever the way it came about; computing them goes
// through all of it.
func (c *Catalog) Findings() []Finding {
	var list []Finding
	list = append(list, c.memberFindings()...)
	for s := range c.Services() {
		list = append(list, s.Findings...)
	}
	list = append(list, c.policyFindings()...)
	slices.SortFunc(list, Finding.Compare)
	return list
}

func (c *Catalog) memberFindings() []Finding {
	var list []Finding
	owners := make(map[Address]ClusterID)
	for _, r := range c.orEmpty().members.all() {
		m := &r.value
		add := func(code Code, format string, args ...any) {
			list = append(list, NewFinding(code, refCluster(m.Cluster), format, args...))
		}
		if r.contested {
			add(CodeMemberContested, "several registrations differ; that of generation %d is used", m.Generation)
		}
		switch m.State {
		case MemberPending:
			add(CodeMemberPending, "registered, not enrolled")
		case MemberQuarantined:
			add(CodeMemberQuarantined, "quarantined by an operator")
		case MemberDeregistered:
			continue
		}
		if len(m.Grants) == 0 {
			add(CodeNoGrants, "its registration has no grant")
		}
		for _, g := range m.Gateways {
			if first, taken := owners[g]; taken {
				add(CodeSharedGateway, "gateway %s is registered by %s too", g, first)
			} else {
				owners[g] = m.Cluster
			}
		}
	}
	return list
}

// serviceFindings are those about one service and its offers.
func (c *Catalog) serviceFindings(s *Service, conflicts []portConflict) []Finding {
	var list []Finding
	records, _ := c.orEmpty().services.get(s.ID)
	for i := range s.Offers {
		o := &s.Offers[i]
		add := func(code Code, format string, args ...any) {
			list = append(list, NewFinding(code, refExport(o.ID()), format, args...))
		}
		if r, _ := records.get(o.Cluster); r.contested {
			add(CodeExportContested, "several exports differ; the one accepted first, at %d, is used", o.Accepted)
		}
		if !o.InUse {
			code := map[Reason]Code{
				ReasonMemberUnknown:              CodeExportOfUnknownMember,
				ReasonOutsideGrant:               CodeOutsideGrant,
				ReasonGatewayOutsideRegistration: CodeGatewayOutsideRegistration,
			}[o.Reason]
			if code == "" {
				code = CodeExportOfInactiveMember
			}
			add(code, "not used: %s", o.Detail)
			continue
		}
		if len(o.Gateways) == 0 {
			add(CodeNoGateway, "no other cluster can reach it")
		}
		if len(o.Ports) == 0 || !distinct(o.Ports) {
			add(CodeBadPorts, "its ports are %v", o.Ports)
		}
		for _, p := range o.Ports {
			if p.Protocol != TCP {
				add(CodeProtocolNotCarried, "port %s", p)
			}
		}
		if o.Mode == Passthrough && len(o.Serves) == 0 {
			add(CodePassthroughServesNobody, "mode is passthrough, serves is empty")
		}
		if !o.Visible.IsAll() && !c.selectsOthers(o.Export) {
			add(CodeVisibleToNobody, "visible to clusters %v and regions %v", o.Visible.Clusters, o.Visible.Regions)
		}
	}
	// Each export in conflict gets one finding that lists its conflicts.
	in := make(map[ClusterID][]string)
	for _, p := range conflicts {
		if p.winner == p.loser {
			continue // two ports of one export: CodeBadPorts
		}
		in[p.loser.Cluster] = append(in[p.loser.Cluster], p.String())
		in[p.winner.Cluster] = append(in[p.winner.Cluster], p.String())
	}
	for i := range s.Offers {
		if about := in[s.Offers[i].Cluster]; len(about) > 0 {
			const shown = 3
			if len(about) > shown {
				about = append(about[:shown:shown], fmt.Sprintf("and %d more", len(about)-shown))
			}
			list = append(list, NewFinding(CodePortConflict, refExport(s.Offers[i].ID()), "%s", strings.Join(about, "; ")))
		}
	}
	slices.SortFunc(list, Finding.Compare)
	return list
}

// selectsOthers reports whether an export's visibility chooses any cluster but
// its own.
func (c *Catalog) selectsOthers(e *Export) bool {
	for _, id := range e.Visible.Clusters {
		if _, ok := c.Member(id); ok && id != e.Cluster {
			return true
		}
	}
	if len(e.Visible.Regions) > 0 {
		for m := range c.Members() {
			if m.Cluster != e.Cluster && slices.Contains(e.Visible.Regions, m.Region) {
				return true
			}
		}
	}
	return false
}

// policyFindings are those about policies.
func (c *Catalog) policyFindings() []Finding {
	c = c.orEmpty()
	regions := make(map[string]bool)
	for m := range c.Members() {
		regions[m.Region] = true
	}
	var list []Finding
	for _, r := range c.policies.all() {
		p := &r.value
		add := func(code Code, format string, args ...any) {
			list = append(list, NewFinding(code, refPolicy(p.ID), format, args...))
		}
		if r.contested {
			add(CodePolicyContested, "several policies differ; the one accepted first, at %d, is used", p.Accepted)
		}
		if err := p.Check(); err != nil {
			add(CodePolicyInvalid, "passed over: %v", err)
			continue
		}
		if p.ID.Origin != OriginController {
			if _, ok := c.Member(ClusterID(p.ID.Origin)); !ok {
				add(CodePolicyUnknownOrigin, "cluster %s is not registered", p.ID.Origin)
			}
		}
		if first := c.shadowing(p); first != nil {
			add(CodePolicyShadowed, "not in force: %s has the same target and was accepted first", first.ID)
		}
		if p.TargetService != "" {
			if _, ok := c.services.get(p.target()); !ok {
				add(CodePolicyNoTarget, "nobody exports %s", p.target())
			}
		}
		c.nameFindings(p, regions, add)
		p.orderFindings(add)
	}
	return list
}

// shadowing is the policy of the same origin and target that is in force
// instead of p, or nil.
func (c *Catalog) shadowing(p *Policy) *Policy {
	set, _ := c.targeting.get(p.target())
	var first *Policy
	for _, r := range set.all() {
		if o := &r.value; o.ID.Origin == p.ID.Origin && o.Check() == nil && (first == nil || o.before(first)) {
			first = o
		}
	}
	if first == nil || first.ID == p.ID {
		return nil
	}
	return first
}

// nameFindings are those about names in a policy that nothing has.
func (c *Catalog) nameFindings(p *Policy, regions map[string]bool, add func(Code, string, ...any)) {
	cluster := func(where string, id ClusterID) {
		if _, ok := c.Member(id); !ok {
			add(CodePolicyUnknownCluster, "%s names the cluster %s", where, id)
		}
	}
	region := func(where, r string) {
		if !regions[r] {
			add(CodePolicyUnknownRegion, "%s names the region %s", where, r)
		}
	}
	for i, s := range p.Order {
		where := fmt.Sprintf("order[%d]", i)
		for _, id := range s.Clusters {
			cluster(where, id)
		}
		for _, r := range s.Regions {
			region(where, r)
		}
		for _, w := range s.Split {
			if !slices.Contains(s.Clusters, w.Cluster) {
				cluster(where+".split", w.Cluster)
			}
		}
	}
	for _, id := range p.Deny.Clusters {
		cluster("deny", id)
	}
	for _, r := range p.Deny.Regions {
		region("deny", r)
	}
}

// orderFindings are those about steps that an order makes pointless, whichever
// clusters there are.
func (p *Policy) orderFindings(add func(Code, string, ...any)) {
	seen := make(map[StepKind]bool)
	named := make(map[string]bool)
	for i, s := range p.Order {
		pointless := seen[StepAny] || seen[s.Kind] && (s.Kind == StepLocal || s.Kind == StepRegion)
		switch s.Kind {
		case StepClusters:
			all := true
			for _, id := range s.Clusters {
				all = all && named["cluster "+string(id)]
				named["cluster "+string(id)] = true
			}
			pointless = pointless || all
			for _, w := range s.Split {
				if !slices.Contains(s.Clusters, w.Cluster) {
					add(CodePolicySplitStray, "order[%d].split names %s, which the step does not", i, w.Cluster)
				}
			}
		case StepRegions:
			all := true
			for _, r := range s.Regions {
				all = all && named["region "+r]
				named["region "+r] = true
			}
			pointless = pointless || all
		}
		if pointless {
			add(CodePolicyStepUnreached, "order[%d] (%v) comes after steps that name all its clusters", i, s.Kind)
		}
		seen[s.Kind] = true
	}
}
