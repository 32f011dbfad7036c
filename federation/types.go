package federation

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Protocol is the transport protocol of a port.
type Protocol string

// The protocols of the Kubernetes API. Only TCP is carried between clusters so
// far; the others are merged, with a finding.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)

// Port is one port of a service as its callers see it.
type Port struct {
	Name        string // DNS label, or empty where a service has only one port
	Number      uint16
	Protocol    Protocol
	AppProtocol string // as in Kubernetes: "http", "kubernetes.io/h2c", ...; may be empty
}

// Check reports what is wrong with p.
func (p Port) Check() error {
	switch {
	case p.Name != "" && checkLabel(p.Name) != nil:
		return fmt.Errorf("name: %.80q: %w", p.Name, errLabel)
	case p.Number == 0:
		return errors.New("number: must be from 1 to 65535")
	case p.Protocol != TCP && p.Protocol != UDP && p.Protocol != SCTP:
		return fmt.Errorf("protocol: %.80q is none of TCP, UDP and SCTP", p.Protocol)
	case len(p.AppProtocol) > 253 || strings.Trim(p.AppProtocol, appProtocolChars) != "":
		return errors.New("appProtocol: at most 253 letters, digits and -_./, for example kubernetes.io/h2c")
	}
	return nil
}

const appProtocolChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./"

func (p Port) String() string {
	s := strconv.Itoa(int(p.Number)) + "/" + string(p.Protocol)
	if p.Name != "" {
		s = p.Name + ":" + s
	}
	if p.AppProtocol != "" {
		s += "(" + p.AppProtocol + ")"
	}
	return s
}

// Compare orders ports by number, then protocol, then name.
func (p Port) Compare(o Port) int {
	return cmp.Or(cmp.Compare(p.Number, o.Number), cmp.Compare(p.Protocol, o.Protocol),
		cmp.Compare(p.Name, o.Name), cmp.Compare(p.AppProtocol, o.AppProtocol))
}

// SortPorts puts the ports of one export in order and reports why they cannot
// stand together: each name, and each number with its protocol, once, and no
// port without a name beside others.
func SortPorts(ports []Port) error {
	slices.SortFunc(ports, Port.Compare)
	names := make(map[string]bool, len(ports))
	var before Port
	for _, p := range ports {
		switch {
		case p.Name == "" && len(ports) > 1:
			return fmt.Errorf("port %s needs a name, since there are several", p)
		case names[p.Name]:
			return fmt.Errorf("two ports have the name %q", p.Name)
		case before.Number == p.Number && before.Protocol == p.Protocol:
			return fmt.Errorf("two ports are %d/%s", p.Number, p.Protocol)
		}
		names[p.Name], before = true, p
	}
	return nil
}

// Mode says where the mTLS of a tunnel ends in the serving cluster.
type Mode uint8

// The two modes.
const (
	// Terminate: the gateway ends the tunnel and dials the endpoint.
	Terminate Mode = iota
	// Passthrough: the gateway forwards the TLS bytes by SNI to the service's
	// own proxy, so that identity is end to end.
	Passthrough
)

func (m Mode) String() string {
	if m == Passthrough {
		return "passthrough"
	}
	return "terminate"
}

// Selector chooses clusters by name or region. The zero value chooses all.
type Selector struct {
	Clusters []ClusterID // sorted, unique
	Regions  []string    // sorted, unique
}

// IsAll reports whether s chooses every cluster.
func (s Selector) IsAll() bool { return len(s.Clusters) == 0 && len(s.Regions) == 0 }

// Selects reports whether s chooses the cluster c of the given region.
func (s Selector) Selects(c ClusterID, region string) bool {
	return s.IsAll() || slices.Contains(s.Clusters, c) || slices.Contains(s.Regions, region)
}

// MemberState says whether a member takes part in the mesh.
type MemberState uint8

// The states of a registration.
const (
	// MemberPending: registered, not enrolled yet (or known by a valid SVID
	// without a record, after a restore). Its exports are kept, not used.
	MemberPending MemberState = iota
	// MemberActive: enrolled; it reports and serves.
	MemberActive
	// MemberQuarantined: denied by an operator; its exports are kept, not used.
	MemberQuarantined
	// MemberDeregistered: a tombstone. The name is known, nothing is in use.
	MemberDeregistered
)

func (s MemberState) String() string {
	switch s {
	case MemberActive:
		return "active"
	case MemberQuarantined:
		return "quarantined"
	case MemberDeregistered:
		return "deregistered"
	default:
		return "pending"
	}
}

// Member is one cluster's registration: what an operator allowed it to be.
type Member struct {
	Cluster    ClusterID
	Region     string
	Zone       string
	Network    string // direct addresses are usable inside one network only
	Generation int64  // of the registration; a name that is used again has a higher one
	State      MemberState
	Grants     []Grant      // sorted, unique; no grant, no export
	Gateways   []Address    // sorted, unique: the only addresses its exports may name
	VIPs       netip.Prefix // range of its clusterset addresses; invalid if it has none
	MaxExports int          // 0 means the mesh's default limit
}

// Allows reports whether the registration allows the export of s.
func (m *Member) Allows(s ServiceID) bool {
	return slices.ContainsFunc(m.Grants, func(g Grant) bool { return g.Allows(s) })
}

// Export is one cluster's offer of one service. It changes rarely; how many
// endpoints stand behind it is Readiness.
type Export struct {
	Cluster  ClusterID
	Service  ServiceID
	Ports    []Port // sorted by number, then protocol; unique
	Accepted int64  // store revision of the first acceptance: the lowest wins a conflict
	Network  string
	Gateways []Address // sorted, unique
	Mode     Mode
	Serves   []spiffeid.ID // identities that a caller must see at the far end; sorted
	Visible  Selector      // clusters that may import it
}

// ID names the export.
func (e *Export) ID() ExportID { return ExportID{Cluster: e.Cluster, Service: e.Service} }

// Readiness counts the endpoints behind one export: how many can serve now, of
// how many there are.
type Readiness struct{ Ready, Total int }

// Probe is what a cluster's own gateways see of another cluster's gateways.
type Probe uint8

// The outcomes of probing. Unknown is also "not probed".
const (
	ProbeUnknown Probe = iota
	ProbeAnswers
	ProbeSilent
)

func (p Probe) String() string {
	switch p {
	case ProbeAnswers:
		return "answers"
	case ProbeSilent:
		return "silent"
	default:
		return "unknown"
	}
}

// Caller is whose traffic a plan is for.
type Caller struct {
	Cluster ClusterID
	Zone    string
	ID      spiffeid.ID // attested by the caller's own cluster, or zero
}

// PerMille is a share: 1000 is all of it.
type PerMille int

// All is the whole of a share.
const All PerMille = 1000

// PolicyID names a policy. Origin is "controller", or the member that wrote
// it, whose policies govern its own callers only.
type PolicyID struct{ Origin, Namespace, Name string }

func (p PolicyID) String() string { return p.Namespace + "/" + p.Name }

// Compare orders policies by namespace, name, then origin.
func (p PolicyID) Compare(o PolicyID) int {
	return cmp.Or(cmp.Compare(p.Namespace, o.Namespace), cmp.Compare(p.Name, o.Name), cmp.Compare(p.Origin, o.Origin))
}

// OriginController marks policies that operators wrote at the controller.
const OriginController = "controller"

// Policy is a FailoverPolicy: how callers of its target are spread over
// clusters, and what follows when those cannot serve.
type Policy struct {
	ID PolicyID
	// Namespace and Service say what the policy is for: both set is one
	// service, Service empty is a namespace, both empty is the whole mesh. The
	// most specific policy of a service is the one that counts; among equals a
	// member's own, then the first accepted.
	TargetNamespace string
	TargetService   string
	Order           []Step   // empty means local, region, any
	SpillBelow      PerMille // ready fraction of a step under which traffic spills; 0 is never before it is empty
	Deny            Deny
	Liveness        LivenessRule
	Accepted        int64 // store revision of its first acceptance
}

// StepKind is the way in which a step of a policy's order names clusters.
type StepKind uint8

// The kinds of steps.
const (
	StepLocal    StepKind = iota // the caller's own cluster
	StepRegion                   // clusters of the caller's region
	StepClusters                 // named clusters
	StepRegions                  // clusters of named regions
	StepAny                      // every cluster
)

func (k StepKind) String() string {
	return enumName(k, "local", "region", "clusters", "regions", "any")
}

// Step is one rank of a policy's order. A cluster belongs to the first step
// that names it.
type Step struct {
	Kind     StepKind
	Clusters []ClusterID // StepClusters
	Regions  []string    // StepRegions
	Split    []Weight    // inside the step; empty means by ready endpoints
}

// Weight is one cluster's part in a split, relative to the others named. A
// cluster of the step that the split leaves out gets nothing while one that it
// names can serve.
type Weight struct {
	Cluster ClusterID
	Weight  int
}

// Deny says which candidates a policy forbids, and which callers.
type Deny struct {
	Clusters   []ClusterID
	Regions    []string
	Unattested bool // callers without an attested identity
}

// Liveness is how a silent control link counts, by a policy's thresholds.
type Liveness uint8

// The states of liveness.
const (
	Fresh Liveness = iota
	Suspect
	Expired
)

func (l Liveness) String() string { return enumName(l, "fresh", "suspect", "expired") }

// LivenessAction is what a policy does with a suspect or expired cluster.
type LivenessAction uint8

// The actions. The zero value means the default: keep for suspect,
// deprioritise for expired.
const (
	ActionDefault LivenessAction = iota
	ActionKeep
	ActionDeprioritise
	ActionRemove
)

func (a LivenessAction) String() string {
	return enumName(a, "default", "keep", "deprioritise", "remove")
}

// LivenessRule turns a cluster's silence into a state and an action. Zero
// durations mean the defaults, 10 s and 60 s.
type LivenessRule struct {
	SuspectAfter, ExpireAfter time.Duration
	OnSuspect, OnExpired      LivenessAction
}

// Thresholds are the times of silence from which a cluster is suspect and
// expired, with the defaults filled in.
func (r LivenessRule) Thresholds() (suspect, expire time.Duration) {
	return cmp.Or(r.SuspectAfter, DefaultSuspectAfter), cmp.Or(r.ExpireAfter, DefaultExpireAfter)
}

// Actions are what the rule does with suspect and expired clusters, with the
// defaults filled in.
func (r LivenessRule) Actions() (onSuspect, onExpired LivenessAction) {
	return cmp.Or(r.OnSuspect, ActionKeep), cmp.Or(r.OnExpired, ActionDeprioritise)
}

// Of is how a silence counts by the rule, and what the rule does with it.
func (r LivenessRule) Of(silence time.Duration) (Liveness, LivenessAction) {
	suspect, expire := r.Thresholds()
	onSuspect, onExpired := r.Actions()
	switch {
	case silence >= expire:
		return Expired, onExpired
	case silence >= suspect:
		return Suspect, onSuspect
	default:
		return Fresh, ActionKeep
	}
}

// Default thresholds of liveness.
const (
	DefaultSuspectAfter = 10 * time.Second
	DefaultExpireAfter  = 60 * time.Second
)

// enumName is the name of a constant; a value outside the constants prints its
// number instead of failing.
func enumName[E ~uint8](e E, names ...string) string {
	if int(e) < len(names) {
		return names[e]
	}
	return fmt.Sprintf("unknown(%d)", uint8(e))
}

// Drain is an operator's order to take traffic away from a cluster, with the
// step that it has reached.
type Drain struct {
	Remaining PerMille      // of its share, now; the leader lowers it step by step
	Over      time.Duration // from all to nothing
	Started   time.Time
	// CloseExistingAfter is how long established connections may go on once
	// Remaining is 0; zero is for ever.
	CloseExistingAfter time.Duration
	By                 string // who asked for it
	// Undo: the share rises to all of it, at the pace of Over; then the order
	// is forgotten.
	Undo bool
}

// VIP is the clusterset address of one service in one cluster.
type VIP struct {
	Address netip.Addr
	// Released is when the service vanished, or zero while it exists. The
	// address goes to no other service for 24 h from then.
	Released time.Time
}

// Denial refuses the identities of one generation of a cluster.
type Denial struct {
	Cluster    ClusterID
	Generation int64
	// IssuedBefore bounds the denial to identities issued before it; zero
	// denies them all.
	IssuedBefore time.Time
	Reason       string
}

// Bundle is the trust bundle of the mesh's trust domain.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	Sequence    uint64   // higher is newer
	Roots       [][]byte // DER of each root certificate
}
