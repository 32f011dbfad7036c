package federation

import (
	"cmp"
	"fmt"
)

// target is what a policy is for, as an index key: a service; a namespace, with
// an empty name; or, all empty, the whole mesh.
func (p *Policy) target() ServiceID {
	return ServiceID{Namespace: p.TargetNamespace, Name: p.TargetService}
}

// before reports whether p is in force where both p and o have one target and
// could be: a member's own policy before an operator's, then the first
// accepted.
func (p *Policy) before(o *Policy) bool {
	if own := p.ID.Origin != OriginController; own != (o.ID.Origin != OriginController) {
		return own
	}
	return cmp.Or(cmp.Compare(p.Accepted, o.Accepted), p.ID.Compare(o.ID)) < 0
}

// Check is why a policy cannot be carried out at all, or nil. What merely has no
// effect, such as a cluster that nobody knows, is no such flaw.
func (p *Policy) Check() error {
	if p.TargetService != "" && p.TargetNamespace == "" {
		return fmt.Errorf("its target names the service %q without a namespace", p.TargetService)
	}
	if p.SpillBelow < 0 || p.SpillBelow > All {
		return fmt.Errorf("spillBelow is %v, which is not between 0%% and 100%%", p.SpillBelow)
	}
	if suspect, expire := p.Liveness.Thresholds(); suspect < 0 || expire < suspect {
		return fmt.Errorf("liveness expires after %v, before it suspects, after %v", expire, suspect)
	}
	if p.Liveness.OnSuspect > ActionRemove || p.Liveness.OnExpired > ActionRemove {
		return fmt.Errorf("liveness names an action that does not exist")
	}
	for i, s := range p.Order {
		switch {
		case s.Kind > StepAny:
			return fmt.Errorf("order[%d] is of a kind that does not exist", i)
		case s.Kind == StepClusters && len(s.Clusters) == 0:
			return fmt.Errorf("order[%d] names no clusters", i)
		case s.Kind == StepRegions && len(s.Regions) == 0:
			return fmt.Errorf("order[%d] names no regions", i)
		}
		for _, w := range s.Split {
			if w.Weight < 0 || w.Weight > MaxWeight {
				return fmt.Errorf("order[%d] gives %s the weight %d, which is not between 0 and %d", i, w.Cluster, w.Weight, MaxWeight)
			}
		}
	}
	return nil
}

// MaxWeight is the highest weight in a split.
const MaxWeight = 1_000_000

// String is the share as a percentage, for example "25%" or "12.5%".
func (p PerMille) String() string {
	if p%10 == 0 {
		return fmt.Sprintf("%d%%", int(p)/10)
	}
	return fmt.Sprintf("%.1f%%", float64(p)/10)
}
