package controller

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// state is what this controller knows of the mesh, as the store's watch tells
// it: the same on every controller at the same revision. One goroutine (run)
// changes it; it is safe to read from any.
type state struct {
	log     *slog.Logger
	views   *views
	denials *identity.Denials
	// bundle hears of every bundle in force.
	bundle func(federation.Bundle)

	mu         sync.Mutex
	now        *snapshot
	facts      facts
	changed    chan struct{} // closed at the next batch
	thresholds []federation.PerMille
}

// snapshot is the mesh at one revision. It is immutable.
type snapshot struct {
	federationv1.Mesh
	recovering bool
}

func newState(log *slog.Logger, denials *identity.Denials, bundle func(federation.Bundle)) *state {
	return &state{
		log: log, views: newViews(), denials: denials, bundle: bundle,
		facts: facts{}, changed: make(chan struct{}),
	}
}

// facts are the records by kind and key.
type facts map[federationv1.KeyKind]map[federationv1.Key]federationv1.Fact

func (f facts) get(key federationv1.Key) (federationv1.Fact, bool) {
	fact, ok := f[key.Kind][key]
	return fact, ok
}

func (f facts) put(fact federationv1.Fact) {
	kind := f[fact.Key.Kind]
	if kind == nil {
		kind = map[federationv1.Key]federationv1.Fact{}
		f[fact.Key.Kind] = kind
	}
	kind[fact.Key] = fact
}

func (f facts) delete(key federationv1.Key) { delete(f[key.Kind], key) }

// run follows the store until ctx ends.
func (s *state) run(ctx context.Context, w *store.Watch) error {
	for {
		b, err := w.Next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow the store: %w", err)
		}
		s.take(ctx, b)
	}
}

// take brings one batch in.
func (s *state) take(ctx context.Context, b store.Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	deletes := b.Deletes
	if b.Full {
		deletes = s.missing(b.Puts)
	}
	var before federationv1.Mesh
	if s.now != nil {
		before = s.now.Mesh
	}
	mesh, facts, errs := before.Apply(b.Revision, b.Puts, deletes)
	for _, err := range errs {
		s.log.ErrorContext(ctx, "a stored record is not taken; its last good version stays in use", "error", err)
	}
	touched := s.remember(facts, deletes)
	s.now = &snapshot{Mesh: mesh, recovering: b.Recovering}

	kinds := map[federationv1.KeyKind]bool{}
	for key := range touched {
		kinds[key.Kind] = true
	}
	if kinds[federationv1.KindPolicy] {
		s.thresholds = spillThresholds(mesh.Catalog)
	}
	if kinds[federationv1.KindDenial] || kinds[federationv1.KindMember] {
		s.denials.Replace(s.deniedNow(mesh.Catalog))
	}
	if old := before.Catalog.Revision().Incarnation; b.Full && old != "" && old != b.Revision.Incarnation {
		s.views.restart()
	}
	s.views.setRecovering(b.Recovering)
	s.views.apply(b.Revision, s.changes(ctx, touched))
	close(s.changed)
	s.changed = make(chan struct{})
	if kinds[federationv1.KindBundle] {
		if f, ok := s.facts.get(federationv1.BundleKey()); ok {
			s.bundle(f.Body.(federation.Bundle))
		}
	}
}

// remember brings the facts up to date and lists the keys whose entries in the
// views are to be made again: readiness goes with its export, whose audience it
// has.
func (s *state) remember(facts []federationv1.Fact, deletes []string) map[federationv1.Key]bool {
	touched := map[federationv1.Key]bool{}
	touch := func(key federationv1.Key) {
		touched[key] = true
		if key.Kind == federationv1.KindExport {
			touched[federationv1.ReadinessKey(key.Export())] = true
		}
	}
	for _, text := range deletes {
		if key, err := federationv1.ParseKey(text); err == nil {
			touch(key)
			s.facts.delete(key)
		}
	}
	for _, f := range facts {
		touch(f.Key)
		s.facts.put(f)
	}
	return touched
}

// changes makes the views' entries of what was touched.
func (s *state) changes(ctx context.Context, touched map[federationv1.Key]bool) []change {
	out := make([]change, 0, len(touched))
	for key := range touched {
		c := change{key: key.String()}
		if f, ok := s.facts.get(key); ok && key.Kind != federationv1.KindFinding {
			e, err := newEntry(f.Record(), audienceOf(key, s.export(key)))
			if err != nil {
				s.log.ErrorContext(ctx, "a record cannot be sent", "key", c.key, "error", err)
				continue
			}
			c.entry = e
		}
		out = append(out, c)
	}
	return out
}

// missing lists what s has and a full set has not.
func (s *state) missing(puts []*federationv1.Record) []string {
	there := make(map[string]bool, len(puts))
	for _, r := range puts {
		there[r.GetKey()] = true
	}
	var gone []string
	for _, kind := range s.facts {
		for key := range kind {
			if text := key.String(); !there[text] {
				gone = append(gone, text)
			}
		}
	}
	slices.Sort(gone)
	return gone
}

// export is the export that an export's or readiness's key is about, or nil.
func (s *state) export(key federationv1.Key) *federation.Export {
	if key.Kind != federationv1.KindExport && key.Kind != federationv1.KindReadiness {
		return nil
	}
	f, _ := s.facts.get(federationv1.ExportKey(key.Export()))
	e, ok := f.Body.(federation.Export)
	if !ok {
		return nil
	}
	return &e
}

// deniedNow are the denials that verifiers must heed: not those of a generation
// that has a successor, which the store allows only when no leaf of it can live.
func (s *state) deniedNow(c *federation.Catalog) []identity.Denial {
	var out []identity.Denial
	for key := range s.facts[federationv1.KindDenial] {
		if m, ok := c.Member(key.Cluster); ok && m.Generation > key.Generation {
			continue
		}
		out = append(out, identity.Denial{Cluster: key.Cluster, Generation: key.Generation})
	}
	return out
}

// spillThresholds are the ready fractions at which some policy changes its
// mind.
func spillThresholds(c *federation.Catalog) []federation.PerMille {
	var out []federation.PerMille
	for p := range c.Policies() {
		if p.SpillBelow > 0 {
			out = append(out, p.SpillBelow)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// current is the mesh as it is known now; nil before the first batch.
func (s *state) current() *snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// next is closed when something has changed after this call.
func (s *state) next() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// spills are the thresholds of spillThresholds now. Read only.
func (s *state) spills() []federation.PerMille {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.thresholds
}

// fact reads one record.
func (s *state) fact(key federationv1.Key) (federationv1.Fact, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.facts.get(key)
}

// all reads every record of a kind, in no order.
func (s *state) all(kind federationv1.KeyKind) []federationv1.Fact {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.facts[kind]))
}

// reached waits until the state includes a revision; the zero one is any.
func (s *state) reached(ctx context.Context, rev federation.Revision) error {
	for {
		changed := s.next()
		if now := s.current(); now != nil {
			at := now.Catalog.Revision()
			if rev == (federation.Revision{}) || at.Covers(rev) || at.Incarnation != rev.Incarnation {
				return nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
