package federationv1

import (
	"fmt"

	"github.com/weftmesh/weft/federation"
)

// EncodePlan makes the message of a plan. What only a data plane needs (the
// identities served, the caller's zone and identity) stays behind.
func EncodePlan(p federation.Plan) *Plan {
	out := &Plan{
		Revision:      EncodeRevision(p.Revision),
		Namespace:     p.Service.Namespace,
		Name:          p.Service.Name,
		Port:          uint32(p.Port),
		CallerCluster: string(p.Caller.Cluster),
	}
	if p.Policy != (federation.PolicyID{}) {
		out.Policy = p.Policy.String()
	}
	backends := make(map[federation.ClusterID]federation.Backend)
	for _, t := range p.Tiers {
		for _, b := range t.Backends {
			backends[b.Cluster] = b
		}
	}
	for _, v := range p.Verdicts {
		m := &Verdict{
			Cluster:       string(v.Cluster),
			Region:        v.Region,
			Zone:          v.Zone,
			Readiness:     EncodeReadiness(v.Readiness),
			Tier:          int32(v.Tier),
			SharePerMille: int32(v.Share),
			Reason:        v.Reason.String(),
			Why:           v.Detail,
		}
		if b, used := backends[v.Cluster]; used {
			m.Mode = encodeMode(b.Mode)
			m.Gateways = EncodeAddresses(b.Gateways)
		}
		out.Verdicts = append(out.Verdicts, m)
	}
	return out
}

// Decode checks and reads a plan, whose tiers it builds again from the
// verdicts.
func (p *Plan) Decode() (federation.Plan, error) {
	out, err := p.decode()
	if err != nil {
		return federation.Plan{}, field("plan", err)
	}
	return out, nil
}

func (p *Plan) decode() (out federation.Plan, err error) {
	if p == nil {
		return out, errMissing
	}
	if out.Revision, err = p.Revision.Decode(); err != nil {
		return out, err
	}
	if out.Service, err = federation.ParseServiceID(p.Namespace + "/" + p.Name); err != nil {
		return out, err
	}
	if p.Port > 65535 {
		return out, fmt.Errorf("port: %d is above 65535", p.Port)
	}
	out.Port = uint16(p.Port)
	if out.Caller.Cluster, err = federation.ParseClusterID(p.CallerCluster); err != nil {
		return out, field("caller_cluster", err)
	}
	if p.Policy != "" {
		id, err := federation.ParseServiceID(p.Policy)
		if err != nil {
			return out, field("policy", err)
		}
		out.Policy = federation.PolicyID{Namespace: id.Namespace, Name: id.Name}
	}
	if out.Verdicts, err = all("verdicts", maxSelected, p.Verdicts, (*Verdict).decode); err != nil {
		return out, err
	}
	for i, v := range out.Verdicts {
		if v.Tier < 0 {
			continue
		}
		if v.Tier > len(out.Tiers) || v.Tier < len(out.Tiers)-1 {
			return out, fmt.Errorf("verdicts[%d]: tier %d is out of order", i, v.Tier)
		}
		if v.Tier == len(out.Tiers) {
			out.Tiers = append(out.Tiers, federation.Tier{})
		}
		m := p.Verdicts[i]
		mode, err := m.Mode.decode()
		if err != nil {
			return out, fmt.Errorf("verdicts[%d]: mode: %w", i, err)
		}
		gateways, err := all("gateways", maxGateways, m.Gateways, (*Address).Decode)
		if err != nil {
			return out, fmt.Errorf("verdicts[%d]: %w", i, err)
		}
		t := &out.Tiers[v.Tier]
		t.Backends = append(t.Backends, federation.Backend{
			Cluster: v.Cluster, Share: v.Share, Local: v.Cluster == out.Caller.Cluster, Mode: mode,
			Gateways: gateways,
		})
	}
	return out, nil
}

func (v *Verdict) decode() (out federation.Verdict, err error) {
	if v == nil {
		return out, errMissing
	}
	if out.Cluster, err = federation.ParseClusterID(v.Cluster); err != nil {
		return out, field("cluster", err)
	}
	if out.Readiness, err = v.Readiness.Decode(); err != nil {
		return out, err
	}
	if out.Reason, err = federation.ParseReason(v.Reason); err != nil {
		return out, err
	}
	for _, err := range []error{
		optionalLabel("region", v.Region),
		optionalLabel("zone", v.Zone),
		within("tier", v.Tier, -1, maxSelected),
		within("share_per_mille", v.SharePerMille, 0, int32(federation.All)),
		checkText("why", v.Why, maxText),
	} {
		if err != nil {
			return out, err
		}
	}
	out.Region, out.Zone, out.Tier, out.Share, out.Detail = v.Region, v.Zone, int(v.Tier), federation.PerMille(v.SharePerMille), v.Why
	return out, nil
}
