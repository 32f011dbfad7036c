package federation

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// ClusterID names a member of the mesh: one DNS label, or two joined by a dot
// (the MCS API's rule for cluster ids). It appears in SPIFFE IDs, SNI names and
// etcd keys, so only ParseClusterID makes one from outside input.
type ClusterID string

// ParseClusterID checks s against the rule for cluster names. The name
// "controller" is reserved: it is the origin of operators' policies, and a
// member of that name would write in its place.
func ParseClusterID(s string) (ClusterID, error) {
	if s == OriginController {
		return "", fmt.Errorf("cluster name %q: the name is reserved, choose another", s)
	}
	labels := strings.Split(s, ".")
	if len(labels) > 2 {
		return "", fmt.Errorf("cluster name %q: at most two labels joined by a dot", s)
	}
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return "", fmt.Errorf("cluster name %q: %w", s, err)
		}
	}
	return ClusterID(s), nil
}

// Compare orders clusters by name.
func (c ClusterID) Compare(o ClusterID) int { return cmp.Compare(c, o) }

// ServiceID names a service everywhere in the mesh: the same namespace and
// name in two clusters is one service (MCS's namespace sameness).
type ServiceID struct{ Namespace, Name string }

// ParseServiceID reads "namespace/name".
func ParseServiceID(s string) (ServiceID, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok {
		return ServiceID{}, fmt.Errorf("service %q: write it as namespace/name", s)
	}
	for _, l := range []string{ns, name} {
		if err := checkLabel(l); err != nil {
			return ServiceID{}, fmt.Errorf("service %q: %w", s, err)
		}
	}
	return ServiceID{Namespace: ns, Name: name}, nil
}

func (s ServiceID) String() string { return s.Namespace + "/" + s.Name }

// Compare orders services by namespace, then name.
func (s ServiceID) Compare(o ServiceID) int {
	return cmp.Or(cmp.Compare(s.Namespace, o.Namespace), cmp.Compare(s.Name, o.Name))
}

// ExportID names one cluster's offer of one service.
type ExportID struct {
	Cluster ClusterID
	Service ServiceID
}

func (e ExportID) String() string { return string(e.Cluster) + "/" + e.Service.String() }

// Compare orders exports by service, then cluster.
func (e ExportID) Compare(o ExportID) int {
	return cmp.Or(e.Service.Compare(o.Service), cmp.Compare(e.Cluster, o.Cluster))
}

// Revision names one state of the catalog: the incarnation of the store (a
// restore from a backup makes a new one) and the store's modification number
// within it. Numbers of different incarnations do not compare.
type Revision struct {
	Incarnation string
	Number      int64
}

// String is "incarnation/number", or "-" for the zero revision.
func (r Revision) String() string {
	if r == (Revision{}) {
		return "-"
	}
	return r.Incarnation + "/" + strconv.FormatInt(r.Number, 10)
}

// ParseRevision reads what String writes.
func ParseRevision(s string) (Revision, error) {
	if s == "-" {
		return Revision{}, nil
	}
	inc, num, ok := strings.Cut(s, "/")
	n, err := strconv.ParseInt(num, 10, 64)
	if !ok || inc == "" || err != nil {
		return Revision{}, fmt.Errorf("revision %q: write it as incarnation/number", s)
	}
	return Revision{Incarnation: inc, Number: n}, nil
}

// Covers reports whether state r includes everything up to o: the same
// incarnation and a number at least as high.
func (r Revision) Covers(o Revision) bool {
	return r.Incarnation == o.Incarnation && r.Number >= o.Number
}

// Address is where a gateway listens: an IP address, or a DNS name that each
// importing agent resolves for itself.
type Address struct {
	Host string
	Port uint16
}

// ParseAddress reads "host:port"; an IPv6 host stands in brackets.
func ParseAddress(s string) (Address, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return Address{}, fmt.Errorf("address %q: write it as HOST:PORT", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return Address{}, fmt.Errorf("address %q: port must be a number from 1 to 65535", s)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.IsUnspecified() || ip.IsMulticast() {
			return Address{}, fmt.Errorf("address %q: nobody can connect to this host", s)
		}
	} else if err := checkHostname(host); err != nil {
		return Address{}, fmt.Errorf("address %q: %w", s, err)
	}
	return Address{Host: host, Port: uint16(n)}, nil
}

func (a Address) String() string { return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) }

// Compare orders addresses by host, then port.
func (a Address) Compare(b Address) int {
	return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port))
}

// Grant is what a registration allows a cluster to export: "namespace/name",
// where either part may be "*".
type Grant struct{ Namespace, Name string }

// ParseGrant reads "namespace/name" with "*" for any.
func ParseGrant(s string) (Grant, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok {
		return Grant{}, fmt.Errorf("grant %q: write it as namespace/name, for example 'shop/*'", s)
	}
	for _, l := range []string{ns, name} {
		if l == "*" {
			continue
		}
		if err := checkLabel(l); err != nil {
			return Grant{}, fmt.Errorf("grant %q: %w, or *", s, err)
		}
	}
	return Grant{Namespace: ns, Name: name}, nil
}

func (g Grant) String() string { return g.Namespace + "/" + g.Name }

// Allows reports whether g covers s.
func (g Grant) Allows(s ServiceID) bool {
	return (g.Namespace == "*" || g.Namespace == s.Namespace) && (g.Name == "*" || g.Name == s.Name)
}

var errLabel = errors.New("must be a DNS label: 1 to 63 of a-z, 0-9 and '-', with a letter or digit at both ends")

// checkLabel is RFC 1123's label, in lower case as Kubernetes has it.
func checkLabel(s string) error {
	if len(s) == 0 || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return errLabel
	}
	for i := range len(s) {
		c := s[i]
		if c != '-' && (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return errLabel
		}
	}
	return nil
}

// CheckLabel reports why s is no DNS label, the rule for regions, zones,
// networks, namespaces and port names.
func CheckLabel(s string) error { return checkLabel(s) }

func checkHostname(s string) error {
	if len(s) > 253 {
		return errors.New("a host name has at most 253 characters")
	}
	for l := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if err := checkLabel(strings.ToLower(l)); err != nil {
			return fmt.Errorf("host name: each part %w", err)
		}
	}
	return nil
}
