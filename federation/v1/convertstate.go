package federationv1

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// EncodeSilence makes the message of a cluster's silence.
func EncodeSilence(d time.Duration) *Silence { return &Silence{Silent: encodeDuration(d)} }

// Decode checks and reads a silence.
func (s *Silence) Decode() (time.Duration, error) {
	if s == nil {
		return 0, field("silence", errMissing)
	}
	d, err := decodeDuration("silent", s.Silent)
	return d, field("silence", err)
}

// EncodeDrain makes the message of a drain.
func EncodeDrain(d federation.Drain) *Drain {
	return &Drain{
		RemainingPerMille:  clampInt32(int(d.Remaining)),
		Over:               encodeDuration(d.Over),
		Started:            encodeTime(d.Started),
		CloseExistingAfter: encodeDuration(d.CloseExistingAfter),
		By:                 d.By,
		Undo:               d.Undo,
	}
}

// Decode checks and reads a drain.
func (d *Drain) Decode() (federation.Drain, error) {
	if d == nil {
		return federation.Drain{}, field("drain", errMissing)
	}
	over, err1 := decodeDuration("over", d.Over)
	started, err2 := decodeTime("started", d.Started)
	closing, err3 := decodeDuration("close_existing_after", d.CloseExistingAfter)
	err := cmp.Or(
		within("remaining_per_mille", d.RemainingPerMille, 0, int32(federation.All)),
		err1, err2, err3,
		checkText("by", d.By, maxName),
	)
	if err != nil {
		return federation.Drain{}, field("drain", err)
	}
	return federation.Drain{
		Remaining: federation.PerMille(d.RemainingPerMille), Over: over, Started: started,
		CloseExistingAfter: closing, By: d.By, Undo: d.Undo,
	}, nil
}

// EncodeVIP makes the message of a clusterset address.
func EncodeVIP(v federation.VIP) *Vip {
	out := &Vip{Released: encodeTime(v.Released)}
	if v.Address.IsValid() {
		out.Address = v.Address.String()
	}
	return out
}

// Decode checks and reads a clusterset address.
func (v *Vip) Decode() (federation.VIP, error) {
	if v == nil {
		return federation.VIP{}, field("vip", errMissing)
	}
	a, err := netip.ParseAddr(v.Address)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return federation.VIP{}, fmt.Errorf("vip: address: %q is no address that a service can have", clip(v.Address))
	}
	released, err := decodeTime("released", v.Released)
	if err != nil {
		return federation.VIP{}, field("vip", err)
	}
	return federation.VIP{Address: a, Released: released}, nil
}

// EncodeDenial makes the message of a denial.
func EncodeDenial(d federation.Denial) *Denial {
	return &Denial{Cluster: string(d.Cluster), Generation: d.Generation, IssuedBefore: encodeTime(d.IssuedBefore), Reason: d.Reason}
}

// Decode checks and reads a denial.
func (d *Denial) Decode() (federation.Denial, error) {
	if d == nil {
		return federation.Denial{}, field("denial", errMissing)
	}
	c, err1 := federation.ParseClusterID(d.Cluster)
	before, err2 := decodeTime("issued_before", d.IssuedBefore)
	var err3 error
	if d.Generation < 0 {
		err3 = fmt.Errorf("generation: %d is negative", d.Generation)
	}
	if err := cmp.Or(field("cluster", err1), err2, err3, checkText("reason", d.Reason, maxText)); err != nil {
		return federation.Denial{}, field("denial", err)
	}
	return federation.Denial{Cluster: c, Generation: d.Generation, IssuedBefore: before, Reason: d.Reason}, nil
}

// EncodeBundle makes the message of a trust bundle. It shares the roots.
func EncodeBundle(b federation.Bundle) *Bundle {
	return &Bundle{TrustDomain: b.TrustDomain.Name(), Sequence: b.Sequence, Roots: b.Roots}
}

// Decode checks and reads a trust bundle, whose roots it shares. Whether they
// are certificates is for those to say who trust them.
func (b *Bundle) Decode() (federation.Bundle, error) {
	if b == nil {
		return federation.Bundle{}, field("bundle", errMissing)
	}
	if len(b.TrustDomain) > 255 {
		return federation.Bundle{}, errors.New("bundle: trust_domain: longer than 255 bytes")
	}
	td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
	if err != nil || td.Name() != b.TrustDomain {
		return federation.Bundle{}, fmt.Errorf("bundle: trust_domain: %q is none", clip(b.TrustDomain))
	}
	roots, err := all("roots", maxRoots, b.Roots, func(der []byte) ([]byte, error) {
		return der, within("length", len(der), 1, maxRoot)
	})
	if err != nil {
		return federation.Bundle{}, field("bundle", err)
	}
	return federation.Bundle{TrustDomain: td, Sequence: b.Sequence, Roots: roots}, nil
}

// EncodeFinding makes the message of a finding.
func EncodeFinding(f federation.Finding) *Finding {
	out := &Finding{
		Code:       string(f.Code),
		Severity:   Severity(f.Severity) + 1,
		Subject:    f.Subject.String(),
		Message:    f.Message,
		Fix:        f.Fix,
		ReportedBy: f.ReportedBy,
		Since:      encodeTime(f.Since),
	}
	for _, c := range f.DependsOn {
		out.DependsOn = append(out.DependsOn, string(c))
	}
	return out
}

// Decode checks and reads a finding.
func (f *Finding) Decode() (federation.Finding, error) {
	out, err := f.decode()
	if err != nil {
		return federation.Finding{}, field("finding", err)
	}
	return out, nil
}

func (f *Finding) decode() (out federation.Finding, err error) {
	if f == nil {
		return out, errMissing
	}
	if out.Code, err = federation.ParseCode(f.Code); err != nil {
		return out, field("code", err)
	}
	if f.Severity < Severity_SEVERITY_INFO || f.Severity > Severity_SEVERITY_ERROR {
		return out, fmt.Errorf("severity: unknown severity %d", f.Severity)
	}
	out.Severity = federation.Severity(f.Severity - 1)
	err = cmp.Or(
		checkText("subject", f.Subject, maxName),
		checkText("message", f.Message, maxText),
		checkText("fix", f.Fix, maxText),
		checkText("reported_by", f.ReportedBy, maxName),
	)
	if err != nil {
		return out, err
	}
	if out.Subject, err = federation.ParseRef(f.Subject); err != nil {
		return out, field("subject", err)
	}
	out.Message, out.Fix, out.ReportedBy = f.Message, f.Fix, f.ReportedBy
	if out.DependsOn, err = all("depends_on", maxSelected, f.DependsOn, federation.ParseCode); err != nil {
		return out, err
	}
	out.Since, err = decodeTime("since", f.Since)
	return out, err
}

// Decode reads a probe's outcome; one that this version does not know is
// unknown.
func (p Probe) Decode() federation.Probe {
	switch p {
	case Probe_PROBE_ANSWERS:
		return federation.ProbeAnswers
	case Probe_PROBE_SILENT:
		return federation.ProbeSilent
	default:
		return federation.ProbeUnknown
	}
}

// EncodeProbe makes the message of a probe's outcome.
func EncodeProbe(p federation.Probe) Probe {
	switch p {
	case federation.ProbeAnswers:
		return Probe_PROBE_ANSWERS
	case federation.ProbeSilent:
		return Probe_PROBE_SILENT
	default:
		return Probe_PROBE_UNSPECIFIED
	}
}
