package federationv1

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/weftmesh/weft/federation"
)

// EncodePolicy makes the message of a policy.
func EncodePolicy(p federation.Policy) *Policy {
	out := &Policy{
		Origin:             p.ID.Origin,
		Namespace:          p.ID.Namespace,
		Name:               p.ID.Name,
		TargetNamespace:    p.TargetNamespace,
		TargetService:      p.TargetService,
		SpillBelowPerMille: clampInt32(int(p.SpillBelow)),
		Accepted:           p.Accepted,
		Liveness: &LivenessRule{
			SuspectAfter: encodeDuration(p.Liveness.SuspectAfter),
			ExpireAfter:  encodeDuration(p.Liveness.ExpireAfter),
			OnSuspect:    LivenessAction(p.Liveness.OnSuspect),
			OnExpired:    LivenessAction(p.Liveness.OnExpired),
		},
		Deny: &Deny{
			Clusters:   clusterStrings(p.Deny.Clusters),
			Regions:    p.Deny.Regions,
			Unattested: p.Deny.Unattested,
		},
	}
	for _, s := range p.Order {
		step := &Step{Kind: StepKind(s.Kind) + 1, Clusters: clusterStrings(s.Clusters), Regions: s.Regions}
		for _, w := range s.Split {
			step.Split = append(step.Split, &Weight{Cluster: string(w.Cluster), Weight: clampInt32(w.Weight)})
		}
		out.Order = append(out.Order, step)
	}
	return out
}

// Decode checks and reads a policy.
func (p *Policy) Decode() (federation.Policy, error) {
	out, err := p.decode()
	if err != nil {
		return federation.Policy{}, field(clip(fmt.Sprintf("policy %s/%s", p.GetNamespace(), p.GetName())), err)
	}
	return out, nil
}

func (p *Policy) decode() (out federation.Policy, err error) {
	if p == nil {
		return out, errMissing
	}
	if out.ID, err = parsePolicyID(p.Origin, p.Namespace, p.Name); err != nil {
		return out, err
	}
	if err := cmp.Or(optionalLabel("target_namespace", p.TargetNamespace), optionalLabel("target_service", p.TargetService)); err != nil {
		return out, err
	}
	if p.TargetService != "" && p.TargetNamespace == "" {
		return out, errors.New("target_namespace: missing, though target_service is set")
	}
	out.TargetNamespace, out.TargetService = p.TargetNamespace, p.TargetService
	if out.Order, err = all("order", maxSteps, p.Order, (*Step).decode); err != nil {
		return out, err
	}
	if err := within("spill_below_per_mille", p.SpillBelowPerMille, 0, int32(federation.All)); err != nil {
		return out, err
	}
	out.SpillBelow = federation.PerMille(p.SpillBelowPerMille)
	if out.Deny, err = p.Deny.decode(); err != nil {
		return out, field("deny", err)
	}
	if out.Liveness, err = p.Liveness.decode(); err != nil {
		return out, field("liveness", err)
	}
	if p.Accepted < 0 {
		return out, fmt.Errorf("accepted: %d is negative", p.Accepted)
	}
	out.Accepted = p.Accepted
	return out, nil
}

func (s *Step) decode() (out federation.Step, err error) {
	if s == nil {
		return out, errMissing
	}
	if s.Kind < StepKind_STEP_KIND_LOCAL || s.Kind > StepKind_STEP_KIND_ANY {
		return out, fmt.Errorf("kind: unknown kind %d", s.Kind)
	}
	out.Kind = federation.StepKind(s.Kind - 1)
	if out.Clusters, err = unique("clusters", maxSelected, s.Clusters, federation.ParseClusterID); err != nil {
		return out, err
	}
	if out.Regions, err = unique("regions", maxSelected, s.Regions, parseRegion); err != nil {
		return out, err
	}
	if named := len(out.Clusters) > 0; named != (out.Kind == federation.StepClusters) {
		return out, errors.New("clusters: must be named where the kind is 'clusters', and nowhere else")
	}
	if named := len(out.Regions) > 0; named != (out.Kind == federation.StepRegions) {
		return out, errors.New("regions: must be named where the kind is 'regions', and nowhere else")
	}
	if out.Split, err = all("split", maxSelected, s.Split, (*Weight).decode); err != nil {
		return out, err
	}
	seen := make(map[federation.ClusterID]bool)
	for i, w := range out.Split {
		if seen[w.Cluster] {
			return out, fmt.Errorf("split[%d]: %s stands there twice", i, w.Cluster)
		}
		seen[w.Cluster] = true
	}
	return out, nil
}

func (w *Weight) decode() (federation.Weight, error) {
	if w == nil {
		return federation.Weight{}, errMissing
	}
	c, err := federation.ParseClusterID(w.Cluster)
	if err != nil {
		return federation.Weight{}, field("cluster", err)
	}
	return federation.Weight{Cluster: c, Weight: int(w.Weight)}, within("weight", w.Weight, 0, maxWeight)
}

func (d *Deny) decode() (out federation.Deny, err error) {
	if out.Clusters, err = unique("clusters", maxSelected, d.GetClusters(), federation.ParseClusterID); err != nil {
		return out, err
	}
	if out.Regions, err = unique("regions", maxSelected, d.GetRegions(), parseRegion); err != nil {
		return out, err
	}
	out.Unattested = d.GetUnattested()
	return out, nil
}

func (l *LivenessRule) decode() (out federation.LivenessRule, err error) {
	if out.SuspectAfter, err = decodeDuration("suspect_after", l.GetSuspectAfter()); err != nil {
		return out, err
	}
	if out.ExpireAfter, err = decodeDuration("expire_after", l.GetExpireAfter()); err != nil {
		return out, err
	}
	if out.OnSuspect, err = l.GetOnSuspect().decode(); err != nil {
		return out, field("on_suspect", err)
	}
	if out.OnExpired, err = l.GetOnExpired().decode(); err != nil {
		return out, field("on_expired", err)
	}
	if suspect, expire := out.Thresholds(); expire < suspect {
		return out, fmt.Errorf("expire_after: %v is shorter than suspect_after, %v", expire, suspect)
	}
	return out, nil
}

func (a LivenessAction) decode() (federation.LivenessAction, error) {
	if a < 0 || a > LivenessAction_LIVENESS_ACTION_REMOVE {
		return 0, fmt.Errorf("unknown action %d", a)
	}
	return federation.LivenessAction(a), nil
}
