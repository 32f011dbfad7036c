package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// reload makes the judge anew from what the cluster has in the store.
func (a *session) reload() error {
	member, err := a.stored.Member().Decode()
	if err != nil {
		return err
	}
	records, err := a.stored.Stored()
	if err != nil {
		return err
	}
	own := make(map[string][]byte, len(records))
	for _, r := range records {
		value, err := ownValue(r)
		if err != nil {
			return err
		}
		own[r.GetKey()] = value
		if n := r.GetReadiness(); n != nil {
			if key, err := federationv1.ParseKey(r.GetKey()); err == nil {
				if _, known := a.damper.written[key.Export()]; !known {
					a.damper.wrote(key.Export(), federation.Readiness{Ready: int(n.GetReady()), Total: int(n.GetTotal())}, time.Time{})
				}
			}
		}
	}
	a.judge = newJudge(a.c.cfg.TrustDomain, member, own)
	return nil
}

// ownValue is a stored record as its cluster would report it: without the
// revision of its acceptance, which the store adds.
func ownValue(r *federationv1.Record) ([]byte, error) {
	if e, p := r.GetExport(), r.GetPolicy(); e != nil {
		e.Accepted = 0
	} else if p != nil {
		p.Accepted = 0
	}
	return r.Value()
}

// reported is the digest of the cluster's stored exports and readiness.
func (a *session) reported() (federationv1.Sums, error) {
	var s federationv1.Sums
	for key, value := range a.judge.own {
		k, err := federationv1.ParseKey(key)
		if err != nil {
			return s, err
		}
		if k.Kind == federationv1.KindExport || k.Kind == federationv1.KindReadiness {
			s.Add(key, value)
		}
	}
	return s, nil
}

// report handles one Report message. What is refused comes back as findings;
// the rest is written. The findings of a full set come with its end.
func (a *session) report(ctx context.Context, r *federationv1.Report) (*federationv1.ReportResult, error) {
	if r.GetFullBegin() {
		a.set = &fullSet{}
	}
	if a.set != nil {
		a.set.records = append(a.set.records, r.GetPuts()...)
		if limit := 2*a.judge.maxExports() + maxOwnPolicies + maxOwnFindings; len(a.set.records) > 2*limit {
			return nil, status.Errorf(codes.ResourceExhausted, "a full report of more than %d records", 2*limit)
		}
		if !r.GetFullEnd() {
			return &federationv1.ReportResult{Sequence: r.GetSequence()}, nil
		}
	}
	now := a.c.cfg.Clock.Now()
	if wait := a.pace.ReserveN(now, 1).DelayFrom(now); wait > 0 {
		if err := clock.Sleep(ctx, a.c.cfg.Clock, wait); err != nil {
			return nil, err
		}
	}
	var (
		written store.Written
		refused []*federation.Finding
		err     error
	)
	for range reportAttempts {
		if a.set != nil {
			written, refused, err = a.writeFull(ctx)
		} else {
			written, refused, err = a.writeDelta(ctx, r)
		}
		if !errors.Is(err, store.ErrConflict) {
			break
		}
		// The registration has changed: judge by the new one.
		if err := a.reload(); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	a.set = nil
	a.c.metrics.reported(written.Puts, written.Deletes, len(refused))
	result := &federationv1.ReportResult{Sequence: r.GetSequence(), Revision: federationv1.EncodeRevision(written.Revision)}
	for _, f := range refused {
		f.Since = a.c.cfg.Clock.Now()
		result.Refused = append(result.Refused, federationv1.EncodeFinding(*f))
		a.log.WarnContext(ctx, "refused a reported record", "finding", f.String())
	}
	return result, nil
}

// exportsFirst sorts records so that an export comes before its readiness.
func exportsFirst(records []*federationv1.Record) []*federationv1.Record {
	out := slices.Clone(records)
	slices.SortStableFunc(out, func(a, b *federationv1.Record) int { return cmp.Compare(a.GetKey(), b.GetKey()) })
	return out
}

// writeDelta writes what a delta changes.
func (a *session) writeDelta(ctx context.Context, r *federationv1.Report) (store.Written, []*federation.Finding, error) {
	var (
		refused []*federation.Finding
		puts    []*federationv1.Record
		deletes []string
		now     = a.c.cfg.Clock.Now()
		spills  = a.c.state.spills()
	)
	for _, record := range exportsFirst(r.GetPuts()) {
		v := a.judge.put(record)
		switch {
		case v.refused != nil:
			refused = append(refused, v.refused)
			continue
		case v.ready != nil && !a.damper.offer(v.key.Export(), *v.ready, now, spills):
			continue
		case v.record == nil:
			continue
		}
		puts = append(puts, v.record)
		a.judge.took(v.key, v.value)
	}
	for _, text := range r.GetDeletes() {
		key, err := federationv1.ParseKey(text)
		if err != nil || !owns(a.cluster, key) {
			refused = append(refused, a.judge.refusal(federation.CodeClaimsOtherCluster, a.judge.subject(text),
				"cluster %s may not delete %q: it speaks for itself only", a.cluster, clip(text)))
			continue
		}
		deletes = append(deletes, text)
		a.judge.took(key, nil)
		if key.Kind == federationv1.KindExport {
			ready := federationv1.ReadinessKey(key.Export())
			deletes = append(deletes, ready.String())
			a.judge.took(ready, nil)
			a.damper.forget(key.Export())
		}
	}
	if len(puts) == 0 && len(deletes) == 0 {
		now := a.c.state.current()
		return store.Written{Revision: now.Catalog.Revision()}, refused, nil
	}
	written, err := a.stored.Report(ctx, puts, deletes)
	return written, refused, err
}

// writeFull makes what the cluster has in the store what the full set says. A
// record of the set that is refused leaves its last good version in place.
func (a *session) writeFull(ctx context.Context) (store.Written, []*federation.Finding, error) {
	old := a.judge
	fresh := newJudge(old.td, old.member, map[string][]byte{})
	stored, err := a.stored.Stored()
	if err != nil {
		return store.Written{}, nil, err
	}
	lastGood := make(map[string]*federationv1.Record, len(stored))
	for _, r := range stored {
		lastGood[r.GetKey()] = r
	}
	var refused []*federation.Finding
	all := map[string]*federationv1.Record{}
	ready := map[federation.ExportID]federation.Readiness{}
	for _, record := range exportsFirst(a.set.records) {
		v := fresh.put(record)
		switch {
		case v.refused != nil:
			refused = append(refused, v.refused)
			if r := lastGood[record.GetKey()]; r != nil {
				value, err := ownValue(r)
				if err != nil {
					return store.Written{}, nil, err
				}
				key, err := federationv1.ParseKey(r.GetKey())
				if err != nil {
					return store.Written{}, nil, err
				}
				all[r.GetKey()] = r
				fresh.took(key, value)
			}
		case v.record != nil:
			all[v.record.GetKey()] = v.record
			fresh.took(v.key, v.value)
			if v.ready != nil {
				ready[v.key.Export()] = *v.ready
			}
		}
	}
	records := make([]*federationv1.Record, 0, len(all))
	for _, r := range all {
		records = append(records, r)
	}
	written, err := a.stored.ReportFull(ctx, records)
	if err != nil {
		return written, nil, err
	}
	a.judge, a.damper = fresh, newDamper()
	for e, r := range ready {
		a.damper.wrote(e, r, a.c.cfg.Clock.Now())
	}
	return written, refused, nil
}

// writeDamped writes the readiness that has waited long enough.
func (a *session) writeDamped(ctx context.Context) error {
	var puts []*federationv1.Record
	for e, r := range a.damper.due(a.c.cfg.Clock.Now()) {
		v := a.judge.put(federationv1.ReadinessRecord(e, r))
		if v.record == nil {
			continue
		}
		puts = append(puts, v.record)
		a.judge.took(v.key, v.value)
	}
	if len(puts) == 0 {
		return nil
	}
	var err error
	for range reportAttempts {
		if _, err = a.stored.Report(ctx, puts, nil); !errors.Is(err, store.ErrConflict) {
			break
		}
	}
	if err != nil {
		return a.c.storeError(fmt.Errorf("write readiness: %w", err))
	}
	a.c.metrics.reported(len(puts), 0, 0)
	return nil
}

// clip shortens a hostile string for a message.
func clip(s string) string {
	const limit = 200
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "..."
}
