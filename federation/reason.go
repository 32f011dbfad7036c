package federation

import "fmt"

// Reason is why a candidate is used or not.
type Reason uint8

// The reasons. Their codes (String) are part of the API: scripts match them.
const (
	// In the first tier, for its place in the order.
	ReasonSameCluster Reason = iota
	ReasonSameRegion
	ReasonNamedInOrder
	ReasonOtherRegion
	ReasonAny
	ReasonSpill
	ReasonDraining
	// In a later tier, or in the first for want of anything better.
	ReasonStandby
	ReasonSplitLeavesItOut
	ReasonSuspectDeprioritised
	ReasonExpiredDeprioritised
	ReasonGatewaySilent
	ReasonDrained
	// In no tier.
	ReasonNoReadyEndpoints
	ReasonSuspectRemoved
	ReasonExpiredRemoved
	ReasonDeniedByPolicy
	ReasonCallerUnattested
	ReasonNotInOrder
	ReasonPortNotExported
	ReasonPortConflict
	ReasonProtocolNotCarried
	ReasonNoGateway
	ReasonServesNobody
	ReasonMemberUnknown
	ReasonMemberPending
	ReasonMemberQuarantined
	ReasonMemberDeregistered
	ReasonOutsideGrant
	ReasonGatewayOutsideRegistration
)

// reasons has, for each Reason, its code, what it means, and whether it follows
// from the policy in force.
var reasons = [...]struct {
	code, meaning string
	byPolicy      bool
}{
	ReasonSameCluster:                {"same-cluster", "the caller's own cluster", true},
	ReasonSameRegion:                 {"same-region", "a cluster of the caller's region", true},
	ReasonNamedInOrder:               {"named-in-order", "a step of the order names the cluster, or its region", true},
	ReasonOtherRegion:                {"other-region", "taken by the step 'any', in another region than the caller's", true},
	ReasonAny:                        {"any", "taken by the step 'any', in the caller's own region or cluster", true},
	ReasonSpill:                      {"spill", "takes what a step before it lacks the capacity for, or drains away", true},
	ReasonDraining:                   {"draining", "an operator drains the cluster: it takes less and less", false},
	ReasonStandby:                    {"standby", "takes over when the tiers before it cannot be reached", true},
	ReasonSplitLeavesItOut:           {"split-leaves-it-out", "the split gives it nothing while others of its step can serve", true},
	ReasonSuspectDeprioritised:       {"suspect-deprioritised", "its control link is silent, and the policy puts it behind the others", true},
	ReasonExpiredDeprioritised:       {"expired-deprioritised", "its control link has been silent for long, and it stands behind the others", true},
	ReasonGatewaySilent:              {"gateway-silent", "the caller's gateways get no answer from its gateways", false},
	ReasonDrained:                    {"drained", "an operator has drained the cluster: used only if everything else fails", false},
	ReasonNoReadyEndpoints:           {"no-ready-endpoints", "none of its endpoints can serve", false},
	ReasonSuspectRemoved:             {"suspect-removed", "its control link is silent, and the policy removes it", true},
	ReasonExpiredRemoved:             {"expired-removed", "its control link has been silent for long, and the policy removes it", true},
	ReasonDeniedByPolicy:             {"denied-by-policy", "the policy denies the cluster or its region", true},
	ReasonCallerUnattested:           {"caller-unattested", "the policy denies callers without an attested identity", true},
	ReasonNotInOrder:                 {"not-in-order", "no step of the policy's order names it", true},
	ReasonPortNotExported:            {"port-not-exported", "it does not export the port", false},
	ReasonPortConflict:               {"port-conflict", "its port contradicts that of an export accepted earlier", false},
	ReasonProtocolNotCarried:         {"protocol-not-carried", "the port is not TCP, and only TCP is carried between clusters", false},
	ReasonNoGateway:                  {"no-gateway", "it names no gateway to reach it by", false},
	ReasonServesNobody:               {"serves-nobody", "it passes tunnels through without naming an identity, so no caller could verify whom it reaches", false},
	ReasonMemberUnknown:              {"member-unknown", "no cluster of this name is registered", false},
	ReasonMemberPending:              {"member-pending", "the cluster is registered, but has not enrolled yet", false},
	ReasonMemberQuarantined:          {"member-quarantined", "an operator has quarantined the cluster", false},
	ReasonMemberDeregistered:         {"member-deregistered", "the cluster has been deregistered", false},
	ReasonOutsideGrant:               {"outside-grant", "no grant of the cluster covers the service", false},
	ReasonGatewayOutsideRegistration: {"gateway-outside-registration", "it names a gateway that its cluster has not registered", false},
}

// String is the reason's code, for example "same-cluster".
func (r Reason) String() string {
	if int(r) < len(reasons) {
		return reasons[r].code
	}
	return fmt.Sprintf("unknown(%d)", uint8(r))
}

// Meaning is a sentence on what the reason means in general.
func (r Reason) Meaning() string {
	if int(r) < len(reasons) {
		return reasons[r].meaning
	}
	return "a reason that this version does not know"
}

func (r Reason) byPolicy() bool { return int(r) < len(reasons) && reasons[r].byPolicy }

// Reasons lists all reasons.
func Reasons() []Reason {
	list := make([]Reason, len(reasons))
	for i := range list {
		list[i] = Reason(i)
	}
	return list
}

// ParseReason reads what String writes.
func ParseReason(s string) (Reason, error) {
	for i := range reasons {
		if reasons[i].code == s {
			return Reason(i), nil
		}
	}
	return 0, fmt.Errorf("reason %.80q: not known", s)
}
