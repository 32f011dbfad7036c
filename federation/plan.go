package federation

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Plan says where one caller's traffic for one service goes, and why. It is
// never changed after it has been made.
type Plan struct {
	Revision Revision // of the catalog that it was made from
	Service  ServiceID
	Port     uint16 // 0 stands for the ports that all its backends share
	Caller   Caller
	Policy   PolicyID // zero if no policy is for the service
	// Tiers[0] takes the traffic; each later tier is the immediate fallback of
	// the data plane where all before it cannot be reached. No tier is empty,
	// and a cluster is in one tier at most.
	Tiers []Tier
	// Verdicts has every candidate that the caller may see, the used ones first,
	// in the order of the tiers.
	Verdicts []Verdict
}

// Tier is a set of backends that share traffic.
type Tier struct {
	Backends []Backend // by falling share, then cluster; the shares add up to All, none is 0
}

// Backend is one cluster's part in a tier.
type Backend struct {
	Cluster  ClusterID
	Share    PerMille
	Local    bool // the caller's own cluster: no gateway in between
	Mode     Mode
	Gateways []Address     // shared with the catalog: read only
	Serves   []spiffeid.ID // shared with the catalog: read only
}

// Verdict says what became of one candidate, and why.
type Verdict struct {
	Cluster   ClusterID
	Region    string
	Zone      string
	Readiness Readiness
	Tier      int      // -1 if it is in none
	Share     PerMille // of its tier
	Reason    Reason
	Detail    string   // the reason as a sentence for people, with the facts of this case
	Policy    PolicyID // that the reason follows from; zero if it follows from no policy
}
