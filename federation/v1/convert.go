package federationv1

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// EncodeMember makes the message of a member.
func EncodeMember(m federation.Member) *Member {
	out := &Member{
		Cluster:    string(m.Cluster),
		Region:     m.Region,
		Zone:       m.Zone,
		Network:    m.Network,
		Generation: m.Generation,
		State:      encodeState(m.State),
		Gateways:   EncodeAddresses(m.Gateways),
		MaxExports: clampInt32(m.MaxExports),
	}
	for _, g := range m.Grants {
		out.Grants = append(out.Grants, g.String())
	}
	if m.VIPs.IsValid() {
		out.Vips = m.VIPs.String()
	}
	return out
}

// Decode checks and reads a member.
func (m *Member) Decode() (federation.Member, error) {
	out, err := m.decode()
	if err != nil {
		return federation.Member{}, field("member "+clip(m.GetCluster()), err)
	}
	return out, nil
}

func (m *Member) decode() (out federation.Member, err error) {
	if m == nil {
		return out, errMissing
	}
	if out.Cluster, err = federation.ParseClusterID(m.Cluster); err != nil {
		return out, field("cluster", err)
	}
	if err := cmp.Or(optionalLabel("region", m.Region), optionalLabel("zone", m.Zone), optionalLabel("network", m.Network)); err != nil {
		return out, err
	}
	out.Region, out.Zone, out.Network = m.Region, m.Zone, m.Network
	if m.Generation < 0 {
		return out, fmt.Errorf("generation: %d is negative", m.Generation)
	}
	out.Generation = m.Generation
	if out.State, err = m.State.decode(); err != nil {
		return out, field("state", err)
	}
	if out.Grants, err = sorted("grants", maxGrants, m.Grants, federation.ParseGrant, compareGrants); err != nil {
		return out, err
	}
	if out.Gateways, err = sorted("gateways", maxGateways, m.Gateways, (*Address).Decode, federation.Address.Compare); err != nil {
		return out, err
	}
	if m.Vips != "" {
		if out.VIPs, err = netip.ParsePrefix(m.Vips); err != nil || out.VIPs != out.VIPs.Masked() {
			return out, fmt.Errorf("vips: %q: write it as ADDRESS/BITS, without host bits", clip(m.Vips))
		}
	}
	if err := within("max_exports", m.MaxExports, 0, maxEndpoints); err != nil {
		return out, err
	}
	out.MaxExports = int(m.MaxExports)
	return out, nil
}

func compareGrants(a, b federation.Grant) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func encodeState(s federation.MemberState) MemberState {
	switch s {
	case federation.MemberActive:
		return MemberState_MEMBER_STATE_ACTIVE
	case federation.MemberQuarantined:
		return MemberState_MEMBER_STATE_QUARANTINED
	case federation.MemberDeregistered:
		return MemberState_MEMBER_STATE_DEREGISTERED
	default:
		return MemberState_MEMBER_STATE_PENDING
	}
}

func (s MemberState) decode() (federation.MemberState, error) {
	switch s {
	case MemberState_MEMBER_STATE_PENDING:
		return federation.MemberPending, nil
	case MemberState_MEMBER_STATE_ACTIVE:
		return federation.MemberActive, nil
	case MemberState_MEMBER_STATE_QUARANTINED:
		return federation.MemberQuarantined, nil
	case MemberState_MEMBER_STATE_DEREGISTERED:
		return federation.MemberDeregistered, nil
	default:
		return 0, fmt.Errorf("unknown state %d", s)
	}
}

// EncodeAddress makes the message of an address.
func EncodeAddress(a federation.Address) *Address {
	return &Address{Host: a.Host, Port: uint32(a.Port)}
}

// EncodeAddresses makes the messages of a list of addresses.
func EncodeAddresses(list []federation.Address) []*Address {
	var out []*Address
	for _, a := range list {
		out = append(out, EncodeAddress(a))
	}
	return out
}

// Decode checks and reads an address.
func (a *Address) Decode() (federation.Address, error) {
	if a == nil {
		return federation.Address{}, errMissing
	}
	if err := within("port", a.Port, 1, 65535); err != nil {
		return federation.Address{}, err
	}
	if len(a.Host) > maxName {
		return federation.Address{}, fmt.Errorf("host: longer than %d bytes", maxName)
	}
	return federation.ParseAddress(federation.Address{Host: a.Host, Port: uint16(a.Port)}.String())
}

// EncodeRevision makes the message of a revision.
func EncodeRevision(r federation.Revision) *Revision {
	return &Revision{Incarnation: r.Incarnation, Number: r.Number}
}

// Decode checks and reads a revision. No revision at all is the zero one.
func (r *Revision) Decode() (federation.Revision, error) {
	switch {
	case r.GetIncarnation() == "" && r.GetNumber() == 0:
		return federation.Revision{}, nil
	case r.Incarnation == "":
		return federation.Revision{}, fmt.Errorf("revision: incarnation: missing")
	case r.Number < 0:
		return federation.Revision{}, fmt.Errorf("revision: number: %d is negative", r.Number)
	case strings.Contains(r.Incarnation, "/"):
		return federation.Revision{}, fmt.Errorf("revision: incarnation: %q holds a slash", clip(r.Incarnation))
	}
	if err := checkText("incarnation", r.Incarnation, maxName); err != nil {
		return federation.Revision{}, field("revision", err)
	}
	return federation.Revision{Incarnation: r.Incarnation, Number: r.Number}, nil
}

// EncodeExport makes the message of an export.
func EncodeExport(e federation.Export) *Export {
	out := &Export{
		Cluster:   string(e.Cluster),
		Namespace: e.Service.Namespace,
		Name:      e.Service.Name,
		Accepted:  e.Accepted,
		Network:   e.Network,
		Gateways:  EncodeAddresses(e.Gateways),
		Mode:      encodeMode(e.Mode),
		Visible:   encodeSelector(e.Visible),
	}
	for _, p := range e.Ports {
		out.Ports = append(out.Ports, &Port{Name: p.Name, Number: uint32(p.Number), Protocol: string(p.Protocol), AppProtocol: p.AppProtocol})
	}
	for _, id := range e.Serves {
		out.Serves = append(out.Serves, id.String())
	}
	return out
}

// Decode checks and reads an export.
func (e *Export) Decode() (federation.Export, error) {
	out, err := e.decode()
	if err != nil {
		return federation.Export{}, field(clip(fmt.Sprintf("export %s/%s/%s", e.GetCluster(), e.GetNamespace(), e.GetName())), err)
	}
	return out, nil
}

func (e *Export) decode() (out federation.Export, err error) {
	if e == nil {
		return out, errMissing
	}
	if out.Cluster, err = federation.ParseClusterID(e.Cluster); err != nil {
		return out, field("cluster", err)
	}
	if err := cmp.Or(label("namespace", e.Namespace), label("name", e.Name), optionalLabel("network", e.Network)); err != nil {
		return out, err
	}
	out.Service = federation.ServiceID{Namespace: e.Namespace, Name: e.Name}
	out.Network = e.Network
	if len(e.Ports) == 0 {
		return out, fmt.Errorf("ports: at least one is needed")
	}
	if out.Ports, err = all("ports", maxPorts, e.Ports, (*Port).decode); err != nil {
		return out, err
	}
	if err := federation.SortPorts(out.Ports); err != nil {
		return out, field("ports", err)
	}
	if e.Accepted < 0 {
		return out, fmt.Errorf("accepted: %d is negative", e.Accepted)
	}
	out.Accepted = e.Accepted
	if out.Gateways, err = sorted("gateways", maxGateways, e.Gateways, (*Address).Decode, federation.Address.Compare); err != nil {
		return out, err
	}
	if out.Mode, err = e.Mode.decode(); err != nil {
		return out, field("mode", err)
	}
	if out.Serves, err = sorted("serves", maxServes, e.Serves, parseID, compareIDs); err != nil {
		return out, err
	}
	if out.Visible, err = e.Visible.decode(); err != nil {
		return out, field("visible", err)
	}
	return out, nil
}

func parseID(s string) (spiffeid.ID, error) {
	if len(s) > 2048 {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID: longer than 2048 bytes")
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: %w", clip(s), err)
	}
	return id, nil
}

func compareIDs(a, b spiffeid.ID) int { return cmp.Compare(a.String(), b.String()) }

func (p *Port) decode() (federation.Port, error) {
	if p == nil {
		return federation.Port{}, errMissing
	}
	out := federation.Port{Name: p.Name, Number: uint16(p.Number), Protocol: federation.Protocol(p.Protocol), AppProtocol: p.AppProtocol}
	if p.Number == 0 || p.Number > 65535 {
		return out, fmt.Errorf("number: %d is not between 1 and 65535", p.Number)
	}
	return out, out.Check()
}

func encodeMode(m federation.Mode) Mode {
	if m == federation.Passthrough {
		return Mode_MODE_PASSTHROUGH
	}
	return Mode_MODE_TERMINATE
}

func (m Mode) decode() (federation.Mode, error) {
	switch m {
	case Mode_MODE_TERMINATE:
		return federation.Terminate, nil
	case Mode_MODE_PASSTHROUGH:
		return federation.Passthrough, nil
	default:
		return 0, fmt.Errorf("unknown mode %d", m)
	}
}

func encodeSelector(s federation.Selector) *Selector {
	if s.IsAll() {
		return nil
	}
	return &Selector{Clusters: clusterStrings(s.Clusters), Regions: s.Regions}
}

func clusterStrings(list []federation.ClusterID) []string {
	var out []string
	for _, c := range list {
		out = append(out, string(c))
	}
	return out
}

func (s *Selector) decode() (out federation.Selector, err error) {
	if out.Clusters, err = sorted("clusters", maxSelected, s.GetClusters(), federation.ParseClusterID, federation.ClusterID.Compare); err != nil {
		return out, err
	}
	out.Regions, err = sorted("regions", maxSelected, s.GetRegions(), parseRegion, strings.Compare)
	return out, err
}

// EncodeReadiness makes the message of a readiness.
func EncodeReadiness(r federation.Readiness) *Readiness {
	return &Readiness{Ready: clampInt32(r.Ready), Total: clampInt32(r.Total)}
}

// Decode checks and reads a readiness.
func (r *Readiness) Decode() (federation.Readiness, error) {
	if r == nil {
		return federation.Readiness{}, field("readiness", errMissing)
	}
	if err := cmp.Or(within("readiness: total", r.Total, 0, maxEndpoints), within("readiness: ready", r.Ready, 0, r.Total)); err != nil {
		return federation.Readiness{}, err
	}
	return federation.Readiness{Ready: int(r.Ready), Total: int(r.Total)}, nil
}
