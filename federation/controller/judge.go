package controller

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// Limits of what one cluster may report. A registration may set its own for
// exports.
const (
	defaultMaxExports = 5000
	maxOwnPolicies    = 1000
	maxOwnFindings    = 1000
	maxRecordBytes    = 64 << 10
)

// judge decides what of a cluster's reports is taken. It knows what the cluster
// has in the store; nothing in it does I/O.
type judge struct {
	td     spiffeid.TrustDomain
	member federation.Member
	// own is what the cluster has in the store, by key: the deterministic
	// encoding without what the store adds (accepted).
	own map[string][]byte
	// count of own records by kind.
	count map[federationv1.KeyKind]int
}

func newJudge(td spiffeid.TrustDomain, m federation.Member, own map[string][]byte) *judge {
	j := &judge{td: td, member: m, own: own, count: map[federationv1.KeyKind]int{}}
	for key := range own {
		if k, err := federationv1.ParseKey(key); err == nil {
			j.count[k.Kind]++
		}
	}
	return j
}

// owns reports whether key is one that the cluster's reports may write.
func owns(c federation.ClusterID, k federationv1.Key) bool {
	switch k.Kind {
	case federationv1.KindExport, federationv1.KindReadiness, federationv1.KindFinding:
		return k.Cluster == c
	case federationv1.KindPolicy:
		return k.Policy.Origin == string(c)
	}
	return false
}

// verdict is what becomes of one reported record.
type verdict struct {
	key     federationv1.Key
	record  *federationv1.Record // to be written; nil where nothing changes
	value   []byte               // of record, as own keeps it
	ready   *federation.Readiness
	refused *federation.Finding
}

// put judges a record that the cluster reports. It changes nothing in j: took
// does, once the record is written.
func (j *judge) put(r *federationv1.Record) verdict {
	fact, err := r.Decode()
	if err != nil {
		return verdict{refused: j.refusal(federation.CodeRecordRefused, j.subject(r.GetKey()), "%v", err)}
	}
	v := verdict{key: fact.Key}
	if v.refused = j.refuse(&fact); v.refused != nil {
		return v
	}
	if n, ok := fact.Body.(federation.Readiness); ok {
		v.ready = &n
	}
	record := fact.Record()
	value, err := record.Value()
	switch {
	case err != nil:
		v.refused = j.refusal(federation.CodeRecordRefused, subjectOf(fact.Key), "%v", err)
	case len(value) > maxRecordBytes:
		v.refused = j.refusal(federation.CodeRecordRefused, subjectOf(fact.Key), "has %d bytes, at most %d are taken", len(value), maxRecordBytes)
	case bytes.Equal(value, j.own[record.Key]):
	default:
		v.record, v.value = record, value
	}
	return v
}

// refuse says why a fact is not taken, or nil, and strips what the cluster has
// no say in.
func (j *judge) refuse(f *federationv1.Fact) *federation.Finding {
	subject := subjectOf(f.Key)
	if !owns(j.member.Cluster, f.Key) {
		return j.refusal(federation.CodeClaimsOtherCluster, subject,
			"cluster %s may not write %s: it speaks for itself only", j.member.Cluster, f.Key)
	}
	limit := map[federationv1.KeyKind]int{
		federationv1.KindExport:    j.maxExports(),
		federationv1.KindReadiness: j.maxExports(),
		federationv1.KindPolicy:    maxOwnPolicies,
		federationv1.KindFinding:   maxOwnFindings,
	}[f.Key.Kind]
	if _, known := j.own[f.Key.String()]; !known && j.count[f.Key.Kind] >= limit {
		code := federation.CodeRecordRefused
		if f.Key.Kind == federationv1.KindExport {
			code = federation.CodeTooManyExports
		}
		return j.refusal(code, subject, "cluster %s has %d records of kind %q already, which is its limit", j.member.Cluster, j.count[f.Key.Kind], f.Key.Kind)
	}
	switch body := f.Body.(type) {
	case federation.Export:
		if finding := j.refuseExport(&body, subject); finding != nil {
			return finding
		}
		body.Accepted = 0
		f.Body = body
	case federation.Readiness:
		if _, ok := j.own[federationv1.ExportKey(f.Key.Export()).String()]; !ok {
			return j.refusal(federation.CodeRecordRefused, subject, "there is no such export to be ready")
		}
	case federation.Policy:
		body.Accepted = 0
		f.Body = body
	case federation.Finding:
		body.ReportedBy = string(j.member.Cluster)
		f.Body = body
	}
	return nil
}

func (j *judge) maxExports() int {
	if j.member.MaxExports > 0 {
		return j.member.MaxExports
	}
	return defaultMaxExports
}

func (j *judge) refuseExport(e *federation.Export, subject federation.Ref) *federation.Finding {
	c := j.member.Cluster
	if !j.member.Allows(e.Service) {
		return j.refusal(federation.CodeOutsideGrant, subject,
			"cluster %s has no grant for service %s; it has %v", c, e.Service, j.member.Grants)
	}
	for _, a := range e.Gateways {
		if !slices.Contains(j.member.Gateways, a) {
			return j.refusal(federation.CodeGatewayOutsideRegistration, subject,
				"gateway %s is not one of cluster %s's registered addresses %v", a, c, j.member.Gateways)
		}
	}
	for _, id := range e.Serves {
		under, ok := identity.ClusterOf(id)
		if !ok || under != c || id.TrustDomain() != j.td {
			return j.refusal(federation.CodeClaimsOtherCluster, subject,
				"identity %s does not lie under spiffe://%s/cluster/%s/", id, j.td.Name(), c)
		}
	}
	if e.Network != "" && e.Network != j.member.Network {
		return j.refusal(federation.CodeClaimsOtherCluster, subject,
			"network %q is not cluster %s's registered one (%q)", e.Network, c, j.member.Network)
	}
	return nil
}

// took notes that a record was written, or deleted where value is nil.
func (j *judge) took(k federationv1.Key, value []byte) {
	key := k.String()
	_, had := j.own[key]
	switch {
	case value == nil && had:
		delete(j.own, key)
		j.count[k.Kind]--
	case value != nil:
		j.own[key] = value
		if !had {
			j.count[k.Kind]++
		}
	}
}

func (j *judge) refusal(code federation.Code, subject federation.Ref, format string, args ...any) *federation.Finding {
	f := federation.NewFinding(code, subject, format, args...)
	f.ReportedBy = string(j.member.Cluster)
	return &f
}

// subject names what a record that could not be read is about, as far as its
// key can be read.
func (j *judge) subject(key string) federation.Ref {
	if k, err := federationv1.ParseKey(key); err == nil {
		return subjectOf(k)
	}
	return federation.Ref{Kind: "cluster", Name: string(j.member.Cluster)}
}

// subjectOf names what a record is about.
func subjectOf(k federationv1.Key) federation.Ref {
	switch k.Kind {
	case federationv1.KindExport, federationv1.KindReadiness:
		return federation.Ref{Kind: "export", Name: k.Export().String()}
	case federationv1.KindPolicy:
		return federation.Ref{Kind: "policy", Name: fmt.Sprintf("%s/%s", k.Policy.Origin, k.Policy)}
	case federationv1.KindFinding:
		return k.Subject
	case federationv1.KindBundle:
		return federation.Ref{Kind: "bundle", Name: "bundle"}
	default:
		return federation.Ref{Kind: "cluster", Name: string(k.Cluster)}
	}
}
