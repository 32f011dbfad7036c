package federation

import "fmt"

// Reason is why a candidate is used or not.
type Reason uint8

// The reasons. Their codes (String) are part of the API: scripts match them.
const (
	// Used in the first tier.
	ReasonSameCluster  Reason = iota // by the step "local"
	ReasonSameRegion                 // by the step "region"
	ReasonNamedInOrder               // by a step that names it or its region
	ReasonOtherRegion                // by the step "any", in another region than the caller
	ReasonAny                        // by the step "any", in the caller's own region or cluster
	ReasonSpill                      // takes what a step before it has no capacity for, or drains away
	ReasonDraining                   // takes less and less
	// Used in a later tier.
	ReasonStandby              // takes over when the tiers before it cannot be reached
	ReasonSplitLeavesItOut     // the split gives it nothing while others of its step can serve
	ReasonSuspectDeprioritised // silent control link, policy puts it behind the others
	ReasonExpiredDeprioritised // the same, for longer
	ReasonGatewaySilent        // the caller's gateways get no answer from its gateways
	ReasonDrained              // share 0: only when everything else fails
	// Not used.
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
	ReasonMemberUnknown
	ReasonMemberPending
	ReasonMemberQuarantined
	ReasonMemberDeregistered
	ReasonOutsideGrant
	ReasonGatewayOutsideRegistration
)

var reasonNames = [...]string{
	"same-cluster", "same-region", "named-in-order", "other-region", "any", "spill", "draining",
	"standby", "split-leaves-it-out", "suspect-deprioritised", "expired-deprioritised", "gateway-silent", "drained",
	"no-ready-endpoints", "suspect-removed", "expired-removed", "denied-by-policy", "caller-unattested", "not-in-order",
	"port-not-exported", "port-conflict", "protocol-not-carried", "no-gateway",
	"member-unknown", "member-pending", "member-quarantined", "member-deregistered", "outside-grant", "gateway-outside-registration",
}

// String is the reason's code, for example "same-cluster".
func (r Reason) String() string { return enumName(r, reasonNames[:]...) }

// ParseReason reads what String writes.
func ParseReason(s string) (Reason, error) {
	for i, n := range reasonNames {
		if n == s {
			return Reason(i), nil
		}
	}
	return 0, fmt.Errorf("reason %.80q: not known", s)
}
