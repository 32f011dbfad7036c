package identity

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Role is the kind of holder that an identity of the mesh's scheme names.
type Role uint8

// The roles, with the path that each has under the trust domain.
const (
	RoleUnknown    Role = iota // not of this scheme
	RoleController             // /controller/NAME
	RoleAgent                  // /cluster/C/agent
	RoleGateway                // /cluster/C/gateway
	RoleWorkload               // /cluster/C/ns/N/sa/S
	RoleOperator               // /operator/NAME: a person, never a peer of the mesh
)

var roleNames = [...]string{"unknown", "controller", "agent", "gateway", "workload", "operator"}

func (r Role) String() string {
	if int(r) < len(roleNames) {
		return roleNames[r]
	}
	return fmt.Sprintf("role(%d)", uint8(r))
}

// maxNameLength bounds a controller's or operator's name, so that no identity
// comes near SPIFFE's limit of 2048 bytes and every one fits in a log line.
const maxNameLength = 128

// Subject is an identity taken apart. Which fields are set follows the role.
type Subject struct {
	ID             spiffeid.ID
	Role           Role
	Cluster        string // of an agent, gateway or workload
	Namespace      string // of a workload
	ServiceAccount string // of a workload
	Name           string // of a controller or operator
}

// String is the SPIFFE ID.
func (s Subject) String() string { return s.ID.String() }

// LogValue logs a subject as its SPIFFE ID.
func (s Subject) LogValue() slog.Value { return slog.StringValue(s.ID.String()) }

// ControllerID is spiffe://TD/controller/NAME.
func ControllerID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	if err := checkName("controller", name); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "controller", name)
}

// AgentID is spiffe://TD/cluster/C/agent.
func AgentID(td spiffeid.TrustDomain, cluster string) (spiffeid.ID, error) {
	if err := CheckCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "cluster", cluster, "agent")
}

// GatewayID is spiffe://TD/cluster/C/gateway.
func GatewayID(td spiffeid.TrustDomain, cluster string) (spiffeid.ID, error) {
	if err := CheckCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "cluster", cluster, "gateway")
}

// WorkloadID is spiffe://TD/cluster/C/ns/N/sa/S. The namespace is a DNS label,
// the service account a DNS subdomain, as in Kubernetes.
func WorkloadID(td spiffeid.TrustDomain, cluster, namespace, serviceAccount string) (spiffeid.ID, error) {
	if err := CheckCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	if !isLabel(namespace) {
		return spiffeid.ID{}, fmt.Errorf("identity: namespace %q is not a DNS label (lower case letters, digits and -, at most 63)", namespace)
	}
	if !isSubdomain(serviceAccount) {
		return spiffeid.ID{}, fmt.Errorf("identity: service account %q is not a DNS name (lower case labels joined by dots, at most 253)", serviceAccount)
	}
	return spiffeid.FromSegments(td, "cluster", cluster, "ns", namespace, "sa", serviceAccount)
}

// OperatorID is spiffe://TD/operator/NAME.
func OperatorID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	if err := checkName("operator", name); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "operator", name)
}

// ParseID takes an identity apart. It fails for an ID outside the scheme, so
// that a path which merely looks like one of ours names nobody.
func ParseID(id spiffeid.ID) (Subject, error) {
	if id.IsZero() {
		return Subject{}, errors.New("identity: no SPIFFE ID")
	}
	segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	s := Subject{ID: id}
	var want spiffeid.ID
	var err error
	switch {
	case len(segments) == 2 && segments[0] == "controller":
		s.Role, s.Name = RoleController, segments[1]
		want, err = ControllerID(id.TrustDomain(), s.Name)
	case len(segments) == 2 && segments[0] == "operator":
		s.Role, s.Name = RoleOperator, segments[1]
		want, err = OperatorID(id.TrustDomain(), s.Name)
	case len(segments) == 3 && segments[0] == "cluster" && segments[2] == "agent":
		s.Role, s.Cluster = RoleAgent, segments[1]
		want, err = AgentID(id.TrustDomain(), s.Cluster)
	case len(segments) == 3 && segments[0] == "cluster" && segments[2] == "gateway":
		s.Role, s.Cluster = RoleGateway, segments[1]
		want, err = GatewayID(id.TrustDomain(), s.Cluster)
	case len(segments) == 6 && segments[0] == "cluster" && segments[2] == "ns" && segments[4] == "sa":
		s.Role, s.Cluster, s.Namespace, s.ServiceAccount = RoleWorkload, segments[1], segments[3], segments[5]
		want, err = WorkloadID(id.TrustDomain(), s.Cluster, s.Namespace, s.ServiceAccount)
	default:
		err = errors.New("its path is none of /controller/NAME, /cluster/C/agent, /cluster/C/gateway, /cluster/C/ns/N/sa/S, /operator/NAME")
	}
	if err != nil {
		return Subject{}, fmt.Errorf("identity: %s is not an identity of a mesh: %w", id, err)
	}
	if want != id {
		return Subject{}, fmt.Errorf("identity: %s is not in its canonical form %s", id, want)
	}
	return s, nil
}

// ClusterOf is the cluster that an agent's, gateway's or workload's identity
// lies under; false for every other identity.
func ClusterOf(id spiffeid.ID) (string, bool) {
	s, err := ParseID(id)
	if err != nil || s.Cluster == "" {
		return "", false
	}
	return s.Cluster, true
}

// CheckCluster says whether name can be a cluster's: one DNS label, or two
// joined by a dot. (A gateway's SNI is parsed by counting labels.)
func CheckCluster(name string) error {
	first, second, two := strings.Cut(name, ".")
	if isLabel(first) && (!two || isLabel(second)) {
		return nil
	}
	return fmt.Errorf("identity: %q cannot be a cluster's name: use one DNS label, or two joined by a dot (lower case letters, digits and -, each at most 63)", name)
}

// CheckTrustDomain refuses names that SPIFFE allows but X.509 URI name
// constraints cannot express: IP addresses, and labels that no DNS name has.
func CheckTrustDomain(td spiffeid.TrustDomain) error {
	name := td.Name()
	if !isSubdomain(name) || net.ParseIP(name) != nil {
		return fmt.Errorf("identity: trust domain %q must be a DNS name (lower case labels of letters, digits and -, joined by dots), not an IP address: the authorities are constrained to it", name)
	}
	return nil
}

func checkName(kind, name string) error {
	if err := spiffeid.ValidatePathSegment(name); err != nil {
		return fmt.Errorf("identity: %s name %q: %w (use letters, digits, '-', '.', '_')", kind, name, err)
	}
	if len(name) > maxNameLength {
		return fmt.Errorf("identity: %s name is %d bytes long, at most %d are allowed", kind, len(name), maxNameLength)
	}
	return nil
}

// isLabel reports whether s is a lower-case DNS label (RFC 1123).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return false
		}
	}
	return true
}
