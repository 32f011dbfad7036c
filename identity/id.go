package identity

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
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
	Cluster        federation.ClusterID // of an agent, gateway or workload
	Namespace      string               // of a workload
	ServiceAccount string               // of a workload
	Name           string               // of a controller or operator
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
func AgentID(td spiffeid.TrustDomain, cluster federation.ClusterID) (spiffeid.ID, error) {
	if err := checkCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "cluster", string(cluster), "agent")
}

// GatewayID is spiffe://TD/cluster/C/gateway.
func GatewayID(td spiffeid.TrustDomain, cluster federation.ClusterID) (spiffeid.ID, error) {
	if err := checkCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "cluster", string(cluster), "gateway")
}

// WorkloadID is spiffe://TD/cluster/C/ns/N/sa/S. The namespace is a DNS label,
// the service account a DNS subdomain, as in Kubernetes.
func WorkloadID(td spiffeid.TrustDomain, cluster federation.ClusterID, namespace, serviceAccount string) (spiffeid.ID, error) {
	if err := checkCluster(cluster); err != nil {
		return spiffeid.ID{}, err
	}
	if err := federation.CheckLabel(namespace); err != nil {
		return spiffeid.ID{}, fmt.Errorf("identity: namespace %q: %w", namespace, err)
	}
	if !isSubdomain(serviceAccount) {
		return spiffeid.ID{}, fmt.Errorf("identity: service account %q is not a DNS name (lower case labels joined by dots, at most 253)", serviceAccount)
	}
	return spiffeid.FromSegments(td, "cluster", string(cluster), "ns", namespace, "sa", serviceAccount)
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
		s.Role, s.Cluster = RoleAgent, federation.ClusterID(segments[1])
		want, err = AgentID(id.TrustDomain(), s.Cluster)
	case len(segments) == 3 && segments[0] == "cluster" && segments[2] == "gateway":
		s.Role, s.Cluster = RoleGateway, federation.ClusterID(segments[1])
		want, err = GatewayID(id.TrustDomain(), s.Cluster)
	case len(segments) == 6 && segments[0] == "cluster" && segments[2] == "ns" && segments[4] == "sa":
		s.Role, s.Cluster, s.Namespace, s.ServiceAccount = RoleWorkload, federation.ClusterID(segments[1]), segments[3], segments[5]
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
func ClusterOf(id spiffeid.ID) (federation.ClusterID, bool) {
	s, err := ParseID(id)
	if err != nil || s.Cluster == "" {
		return "", false
	}
	return s.Cluster, true
}

// checkCluster keeps a name that was not parsed out of every identity.
func checkCluster(name federation.ClusterID) error {
	if _, err := federation.ParseClusterID(string(name)); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return nil
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

// isSubdomain reports whether s is lower-case DNS labels joined by dots.
func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if federation.CheckLabel(label) != nil {
			return false
		}
	}
	return true
}
