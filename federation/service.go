package federation

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Service is what the mesh makes of all the offers of one service.
type Service struct {
	ID ServiceID
	// Ports is the union of the ports of all offers in use. Where two offers
	// disagree about a port, the one accepted first decides.
	Ports []Port
	// Offers has every export, used or not, by cluster.
	Offers []Offer
	// Findings about this service and its offers, the gravest first.
	Findings []Finding
}

// Offer is one export as the mesh judges it.
type Offer struct {
	*Export // the catalog's: read only
	// InUse is false where the registration does not bear the export out; Reason
	// and Detail then say why.
	InUse  bool
	Reason Reason
	Detail string
}

// Service returns a service as the whole mesh sees it.
func (c *Catalog) Service(id ServiceID) (*Service, bool) { return c.ServiceFrom(id, "") }

// ServiceFrom returns a service as one cluster sees it: made of the exports that
// are visible there alone. A cluster sees its own export in use also while its
// registration is pending or quarantined, since its own callers need nobody's
// leave. An empty viewer sees everything.
func (c *Catalog) ServiceFrom(id ServiceID, viewer ClusterID) (*Service, bool) {
	list := c.offers(id, viewer)
	if len(list) == 0 {
		return nil, false
	}
	s := &Service{ID: id, Offers: list}
	var conflicts []portConflict
	s.Ports, conflicts = mergePorts(list)
	s.Findings = c.serviceFindings(s, conflicts)
	return s, true
}

// Services goes through all services as the whole mesh sees them, by name.
func (c *Catalog) Services() iter.Seq[*Service] { return c.ServicesFrom("") }

// ServicesFrom goes through all services that one cluster sees, by name.
func (c *Catalog) ServicesFrom(viewer ClusterID) iter.Seq[*Service] {
	return func(yield func(*Service) bool) {
		for id := range c.ServiceIDs() {
			if s, ok := c.ServiceFrom(id, viewer); ok && !yield(s) {
				return
			}
		}
	}
}

// ServiceIDs goes through the names of all services.
func (c *Catalog) ServiceIDs() iter.Seq[ServiceID] {
	return func(yield func(ServiceID) bool) {
		for id := range c.orEmpty().services.all() {
			if !yield(id) {
				return
			}
		}
	}
}

// offers judges the exports of a service that viewer sees, by cluster.
func (c *Catalog) offers(id ServiceID, viewer ClusterID) []Offer {
	exports, ok := c.orEmpty().services.get(id)
	if !ok {
		return nil
	}
	list := make([]Offer, 0, exports.len())
	for _, r := range exports.all() {
		if e := &r.value; viewer == "" || c.Sees(viewer, e) {
			list = append(list, c.judge(e, viewer))
		}
	}
	return list
}

// judge compares an export with its cluster's registration.
func (c *Catalog) judge(e *Export, viewer ClusterID) Offer {
	refuse := func(r Reason, format string, args ...any) Offer {
		return Offer{Export: e, Reason: r, Detail: fmt.Sprintf(format, args...)}
	}
	m, ok := c.Member(e.Cluster)
	if e.Cluster == viewer && (!ok || m.State != MemberActive) {
		return Offer{Export: e, InUse: true}
	}
	if !ok {
		return refuse(ReasonMemberUnknown, "no cluster of this name is registered")
	}
	switch m.State {
	case MemberActive:
	case MemberQuarantined:
		return refuse(ReasonMemberQuarantined, "the cluster is quarantined by an operator")
	case MemberDeregistered:
		return refuse(ReasonMemberDeregistered, "the cluster is deregistered")
	default:
		return refuse(ReasonMemberPending, "the cluster has not enrolled yet")
	}
	if !m.Allows(e.Service) {
		return refuse(ReasonOutsideGrant, "no grant of the cluster covers %s", e.Service)
	}
	for _, g := range e.Gateways {
		if _, registered := slices.BinarySearchFunc(m.Gateways, g, Address.Compare); !registered {
			return refuse(ReasonGatewayOutsideRegistration, "it names the gateway %s, which is not in the cluster's registration", g)
		}
	}
	return Offer{Export: e, InUse: true}
}

// portConflict is a port of one offer that another, accepted earlier, has
// otherwise.
type portConflict struct {
	winner, loser *Export
	kept, lost    Port
}

func (p portConflict) String() string {
	return fmt.Sprintf("%s has %s, %s has %s", p.winner.Cluster, p.kept, p.loser.Cluster, p.lost)
}

// mergePorts joins the ports of the offers in use by the MCS API's rule: by
// name first, then by protocol and number; the first accepted export decides,
// among equals the first by cluster.
func mergePorts(list []Offer) (ports []Port, conflicts []portConflict) {
	type source struct {
		port Port
		from *Export
	}
	inUse := make([]*Export, 0, len(list))
	alike := true
	for _, o := range list {
		if !o.InUse {
			continue
		}
		inUse = append(inUse, o.Export)
		alike = alike && slices.Equal(o.Ports, inUse[0].Ports)
	}
	if len(inUse) == 0 {
		return nil, nil
	}
	if alike && distinct(inUse[0].Ports) {
		return slices.Clone(inUse[0].Ports), nil
	}
	slices.SortFunc(inUse, func(a, b *Export) int {
		return cmp.Or(cmp.Compare(a.Accepted, b.Accepted), a.Cluster.Compare(b.Cluster))
	})
	type socket struct {
		number   uint16
		protocol Protocol
	}
	byName := make(map[string]source)
	bySocket := make(map[socket]source)
	for _, e := range inUse {
		for _, p := range e.Ports {
			at := socket{p.Number, p.Protocol}
			kept, found := bySocket[at]
			if p.Name != "" {
				if named, ok := byName[p.Name]; ok {
					kept, found = named, true
				}
			}
			if found {
				if kept.port != p {
					conflicts = append(conflicts, portConflict{winner: kept.from, loser: e, kept: kept.port, lost: p})
				}
				continue
			}
			bySocket[at] = source{p, e}
			if p.Name != "" {
				byName[p.Name] = source{p, e}
			}
			ports = append(ports, p)
		}
	}
	slices.SortFunc(ports, Port.Compare)
	return ports, conflicts
}

// distinct reports whether no two ports have one name, or one number and
// protocol.
func distinct(ports []Port) bool {
	for i, p := range ports {
		for _, q := range ports[:i] {
			if p.Name != "" && p.Name == q.Name || p.Number == q.Number && p.Protocol == q.Protocol {
				return false
			}
		}
	}
	return true
}

// serves says whether an offer can take TCP connections to a number among the
// merged ports, and if not, why.
func (o *Offer) serves(number uint16, merged []Port) (Reason, string, bool) {
	var asked *Port // the merged port of that number
	for i, p := range merged {
		if p.Number == number && p.Protocol == TCP {
			asked = &merged[i]
		}
	}
	for _, p := range o.Ports {
		switch {
		case p.Number == number && p.Protocol == TCP:
			if p.Name != "" {
				for _, m := range merged {
					if m.Name == p.Name && (m.Number != number || m.Protocol != TCP) {
						return ReasonPortConflict, fmt.Sprintf("its port %s loses to %s of an export accepted earlier", p, m), false
					}
				}
			}
			return 0, "", true
		case asked != nil && p.Name != "" && p.Name == asked.Name:
			return ReasonPortConflict, fmt.Sprintf("it has %s where an export accepted earlier has %s", p, *asked), false
		}
	}
	for _, p := range o.Ports {
		if p.Number == number {
			return ReasonProtocolNotCarried, fmt.Sprintf("its port %s is not TCP, and only TCP is carried between clusters", p), false
		}
	}
	return ReasonPortNotExported, fmt.Sprintf("it does not export port %d", number), false
}

// tcp reports whether an export has a port that can be carried at all.
func (e *Export) tcp() bool {
	return slices.ContainsFunc(e.Ports, func(p Port) bool { return p.Protocol == TCP })
}

// Port returns the merged port of a number and protocol.
func (s *Service) Port(number uint16, protocol Protocol) (Port, bool) {
	for _, p := range s.Ports {
		if p.Number == number && p.Protocol == protocol {
			return p, true
		}
	}
	return Port{}, false
}

// String is one line: name, ports and the clusters that offer it.
func (s *Service) String() string {
	var b strings.Builder
	b.WriteString(s.ID.String())
	for _, p := range s.Ports {
		b.WriteString(" " + p.String())
	}
	b.WriteString(" from")
	for _, o := range s.Offers {
		b.WriteString(" " + string(o.Cluster))
		if !o.InUse {
			b.WriteString("(" + o.Reason.String() + ")")
		}
	}
	return b.String()
}
