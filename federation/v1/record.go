package federationv1

import (
	"errors"
	"fmt"
	"time"

	"github.com/weftmesh/weft/federation"
)

// MemberRecord is a member under its key.
func MemberRecord(m federation.Member) *Record {
	return &Record{Key: MemberKey(m.Cluster).String(), Body: &Record_Member{EncodeMember(m)}}
}

// ExportRecord is an export under its key.
func ExportRecord(e federation.Export) *Record {
	return &Record{Key: ExportKey(e.ID()).String(), Body: &Record_Export{EncodeExport(e)}}
}

// ReadinessRecord is the readiness of an export under its key.
func ReadinessRecord(e federation.ExportID, r federation.Readiness) *Record {
	return &Record{Key: ReadinessKey(e).String(), Body: &Record_Readiness{EncodeReadiness(r)}}
}

// PolicyRecord is a policy under its key.
func PolicyRecord(p federation.Policy) *Record {
	return &Record{Key: PolicyKey(p.ID).String(), Body: &Record_Policy{EncodePolicy(p)}}
}

// SilenceRecord is a cluster's silence under its key.
func SilenceRecord(c federation.ClusterID, d time.Duration) *Record {
	return &Record{Key: SilenceKey(c).String(), Body: &Record_Silence{EncodeSilence(d)}}
}

// DrainRecord is a cluster's drain under its key.
func DrainRecord(c federation.ClusterID, d federation.Drain) *Record {
	return &Record{Key: DrainKey(c).String(), Body: &Record_Drain{EncodeDrain(d)}}
}

// VIPRecord is a service's clusterset address in one cluster under its key.
func VIPRecord(c federation.ClusterID, s federation.ServiceID, v federation.VIP) *Record {
	return &Record{Key: VIPKey(c, s).String(), Body: &Record_Vip{EncodeVIP(v)}}
}

// DenialRecord is a denial under its key.
func DenialRecord(d federation.Denial) *Record {
	return &Record{Key: DenialKey(d.Cluster, d.Generation).String(), Body: &Record_Denial{EncodeDenial(d)}}
}

// BundleRecord is the trust bundle under its key.
func BundleRecord(b federation.Bundle) *Record {
	return &Record{Key: BundleKey().String(), Body: &Record_Bundle{EncodeBundle(b)}}
}

// FindingRecord is a finding that cluster c reports under its key.
func FindingRecord(c federation.ClusterID, f federation.Finding) *Record {
	return &Record{Key: FindingKey(c, f.Code, f.Subject).String(), Body: &Record_Finding{EncodeFinding(f)}}
}

// Fact is a record that has been checked: Body is a federation.Member, Export,
// Readiness, Policy, Drain, VIP, Denial, Bundle or Finding, or, for a silence, a
// time.Duration; the key's kind says which.
type Fact struct {
	Key  Key
	Body any
}

var errBody = errors.New("its body does not belong under its key")

// Decode checks a record wholly: its key, its body, and that the body is the
// one that the key names, so that a record under a key of cluster C speaks of C
// alone.
func (r *Record) Decode() (Fact, error) {
	k, err := ParseKey(r.GetKey())
	if err != nil {
		return Fact{}, err
	}
	body, belongs, err := r.decodeBody(k)
	switch {
	case err != nil:
		return Fact{}, fmt.Errorf("record %s: %w", k, err)
	case !belongs:
		return Fact{}, fmt.Errorf("record %s: %w", k, errBody)
	}
	return Fact{Key: k, Body: body}, nil
}

func (r *Record) decodeBody(k Key) (body any, belongs bool, err error) {
	switch b := r.GetBody().(type) {
	case *Record_Member:
		m, err := b.Member.Decode()
		return m, k == MemberKey(m.Cluster), err
	case *Record_Export:
		e, err := b.Export.Decode()
		return e, k == ExportKey(e.ID()), err
	case *Record_Readiness:
		n, err := b.Readiness.Decode()
		return n, k.Kind == KindReadiness, err
	case *Record_Policy:
		p, err := b.Policy.Decode()
		return p, k == PolicyKey(p.ID), err
	case *Record_Silence:
		d, err := b.Silence.Decode()
		return d, k.Kind == KindSilence, err
	case *Record_Drain:
		d, err := b.Drain.Decode()
		return d, k.Kind == KindDrain, err
	case *Record_Vip:
		v, err := b.Vip.Decode()
		return v, k.Kind == KindVIP, err
	case *Record_Denial:
		d, err := b.Denial.Decode()
		return d, k == DenialKey(d.Cluster, d.Generation), err
	case *Record_Bundle:
		t, err := b.Bundle.Decode()
		return t, k.Kind == KindBundle, err
	case *Record_Finding:
		f, err := b.Finding.Decode()
		return f, k == FindingKey(k.Cluster, f.Code, f.Subject), err
	default:
		return nil, false, errors.New("it has no body that this version knows")
	}
}

// Record makes the record of a fact again.
func (f Fact) Record() *Record {
	switch b := f.Body.(type) {
	case federation.Member:
		return MemberRecord(b)
	case federation.Export:
		return ExportRecord(b)
	case federation.Readiness:
		return ReadinessRecord(f.Key.Export(), b)
	case federation.Policy:
		return PolicyRecord(b)
	case time.Duration:
		return SilenceRecord(f.Key.Cluster, b)
	case federation.Drain:
		return DrainRecord(f.Key.Cluster, b)
	case federation.VIP:
		return VIPRecord(f.Key.Cluster, f.Key.Service, b)
	case federation.Denial:
		return DenialRecord(b)
	case federation.Bundle:
		return BundleRecord(b)
	case federation.Finding:
		return FindingRecord(f.Key.Cluster, b)
	default:
		return &Record{Key: f.Key.String()}
	}
}
