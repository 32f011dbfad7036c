package controller

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

const (
	election   = "leader"
	leaderTick = 100 * time.Millisecond
	// leaderPause is how long the leader waits after a failure.
	leaderPause = time.Second
	sweepEvery  = 10 * time.Minute
	// silenceNoticed is how long at most an agent has been silent when its session
	// ends: the time between two statuses, and keepalive's.
	silenceNoticed = 15 * time.Second
	// issuedKept is how long the journal keeps an identity past its end.
	issuedKept = 24 * time.Hour
)

// leader does what only one controller may do at a time. It lives for one term;
// every write of it compares the election. It has no locks: one goroutine runs
// it.
type leader struct {
	c    *Controller
	term *store.Term

	// Liveness: when each absent cluster was heard last, by this leader's clock.
	since map[federation.ClusterID]time.Time
	held  []federation.ClusterID

	ramps map[federation.ClusterID]*runningRamp

	// Clusterset addresses: the catalog that they were last reconciled with, and
	// which addresses are taken.
	reconciled *federation.Catalog
	taken      map[federation.ClusterID]map[string]federation.ServiceID
	without    map[federationv1.Key]bool // services that found no address free

	rotateAt, sweepAt, releaseAt time.Time
	wholeSince                   time.Time // since when every member has reported, in recovery
}

// runningRamp is a drain on its way, and the order that it follows.
type runningRamp struct {
	ramp
	order federation.Drain // without the share
	next  time.Time
}

// lead runs one term.
func (c *Controller) lead(ctx context.Context, term *store.Term) error {
	l := &leader{
		c: c, term: term,
		since: map[federation.ClusterID]time.Time{},
		ramps: map[federation.ClusterID]*runningRamp{},
		taken: map[federation.ClusterID]map[string]federation.ServiceID{}, without: map[federationv1.Key]bool{},
	}
	if err := c.state.reached(ctx, federation.Revision{}); err != nil {
		return err
	}
	l.start()
	c.metrics.leader.Set(1)
	defer c.metrics.leader.Set(0)
	tick := c.cfg.Clock.NewTimer(0)
	defer tick.Stop()
	for {
		changed := c.state.next()
		pause := leaderTick
		if err := l.work(ctx); err != nil {
			if errors.Is(err, store.ErrNotLeader) || ctx.Err() != nil {
				return err
			}
			c.log.WarnContext(ctx, "the leader's work is not done; trying again", "error", err)
			pause, changed = leaderPause, nil
		}
		tick.Reset(pause)
		select {
		case <-tick.C():
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// start takes over what earlier leaders have stored. A cluster that is silent
// has been so for the time that is stored, at least; all others count as heard
// just now.
func (l *leader) start() {
	now := l.c.cfg.Clock.Now()
	for _, f := range l.c.state.all(federationv1.KindSilence) {
		l.since[f.Key.Cluster] = now.Add(-f.Body.(time.Duration))
	}
	for _, f := range l.c.state.all(federationv1.KindVIP) {
		l.take(f.Key.Cluster, f.Body.(federation.VIP).Address.String(), f.Key.Service)
	}
}

// work does everything that is due. One duty's failure does not keep the others
// from being done.
func (l *leader) work(ctx context.Context) error {
	now := l.c.cfg.Clock.Now()
	snap := l.c.state.current()
	errs := []error{
		l.liveness(ctx, snap, now),
		l.drains(ctx, now),
		l.addresses(ctx, snap, now),
		l.recovery(ctx, snap, now),
	}
	if !now.Before(l.rotateAt) {
		wait, err := l.c.trust.rotate(ctx, l.term)
		if err != nil {
			wait = time.Minute
		}
		l.rotateAt = now.Add(wait)
		errs = append(errs, err)
	}
	if !now.Before(l.sweepAt) {
		l.sweepAt = now.Add(sweepEvery)
		errs = append(errs, l.sweep(ctx, now))
	}
	return errors.Join(errs...)
}

// swap writes records, one by one where all at once will not do: a record that
// has changed meanwhile does not keep the others. It returns once the state
// shows what was written, so that nothing is decided on older facts.
func (l *leader) swap(ctx context.Context, swaps []store.Swap) error {
	var last federation.Revision
	write := func(part []store.Swap) error {
		rev, err := l.term.Swap(ctx, part...)
		if err == nil {
			last = rev
		}
		return err
	}
	raced := func(err error) bool { return errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrExists) }
	for part := range slices.Chunk(swaps, store.MaxSwaps) {
		err := write(part)
		if err != nil && !raced(err) {
			return err
		}
		if err == nil {
			continue
		}
		for i := range part {
			// What has changed is decided on again when the state shows it.
			if err := write(part[i : i+1]); err != nil && !raced(err) {
				return err
			}
		}
	}
	if last == (federation.Revision{}) {
		return nil
	}
	return l.c.state.reached(ctx, last)
}

// liveness stores which clusters' control links are silent, and for how long.
// A session at any controller counts.
func (l *leader) liveness(ctx context.Context, snap *snapshot, now time.Time) error {
	present := l.c.store.Presences()
	members := 0
	absent := map[federation.ClusterID]bool{}
	for m := range snap.Catalog.Members() {
		if m.State != federation.MemberActive {
			continue
		}
		members++
		// A session here counts though etcd may be too slow to show it.
		if present[m.Cluster] == nil && l.c.sessions.of(m.Cluster) == nil {
			absent[m.Cluster] = true
		}
	}
	for c := range absent {
		if _, known := l.since[c]; !known {
			l.since[c] = now
			// Where the session was here, its agent fell silent before it ended.
			// The bound keeps what a session of long ago has left behind out.
			if heard, ok := l.c.sessions.lastHeard(c); ok && now.Sub(heard) < silenceNoticed {
				l.since[c] = heard
			}
		}
	}
	for c := range l.since {
		if !absent[c] {
			delete(l.since, c)
		}
	}
	var policies []federation.Policy
	for p := range snap.Catalog.Policies() {
		policies = append(policies, *p)
	}
	want, held := silences(now, l.since, members, thresholdsOf(policies))
	slices.Sort(held)
	if len(held) > 0 && !slices.Equal(held, l.held) {
		l.c.log.WarnContext(ctx, "many clusters fell silent at once: none of them expires", "clusters", held)
	}
	l.held = held
	l.c.metrics.silent.Set(float64(len(want)))
	var swaps []store.Swap
	stored := map[federation.ClusterID]time.Duration{}
	for _, f := range l.c.state.all(federationv1.KindSilence) {
		c, d := f.Key.Cluster, f.Body.(time.Duration)
		stored[c] = d
		switch w := want[c]; {
		case w == 0:
			swaps = append(swaps, store.Swap{Key: f.Key.String(), Old: f.Record()})
		case w != d:
			swaps = append(swaps, store.Swap{Key: f.Key.String(), Old: f.Record(), New: federationv1.SilenceRecord(c, w)})
		}
	}
	for c, w := range want {
		if stored[c] == 0 {
			r := federationv1.SilenceRecord(c, w)
			swaps = append(swaps, store.Swap{Key: r.Key, New: r})
		}
	}
	for _, w := range swaps {
		l.c.log.InfoContext(ctx, "silence of a cluster", "key", w.Key, "silent", w.New.GetSilence().GetSilent().AsDuration())
	}
	return l.swap(ctx, swaps)
}

// drains moves every drain one step on where its time has come.
func (l *leader) drains(ctx context.Context, now time.Time) error {
	var swaps []store.Swap
	seen := map[federation.ClusterID]bool{}
	for _, f := range l.c.state.all(federationv1.KindDrain) {
		c, d := f.Key.Cluster, f.Body.(federation.Drain)
		seen[c] = true
		order := d
		order.Remaining = 0
		r := l.ramps[c]
		if r == nil || r.order != order {
			r = &runningRamp{ramp: ramp{began: now, from: d.Remaining, over: d.Over}, order: order, next: now.Add(drainStep(d.Over))}
			if d.Undo {
				r.to = federation.All
			}
			l.ramps[c] = r
			if d.Over > 0 {
				continue
			}
		}
		if now.Before(r.next) && d.Over > 0 {
			continue
		}
		share, done := r.at(now)
		if done && d.Undo {
			swaps = append(swaps, store.Swap{Key: f.Key.String(), Old: f.Record()})
			continue
		}
		if share == d.Remaining {
			continue
		}
		r.next = now.Add(drainStep(d.Over))
		d.Remaining = share
		swaps = append(swaps, store.Swap{Key: f.Key.String(), Old: f.Record(), New: federationv1.DrainRecord(c, d)})
	}
	maps.DeleteFunc(l.ramps, func(c federation.ClusterID, _ *runningRamp) bool { return !seen[c] })
	return l.swap(ctx, swaps)
}

// sweep clears what nobody needs any more.
func (l *leader) sweep(ctx context.Context, now time.Time) error {
	_, err := l.c.store.SweepDeregistered(ctx)
	pruned, perr := l.term.PruneIssued(ctx, now.Add(-issuedKept))
	if pruned > 0 {
		l.c.log.InfoContext(ctx, "pruned the journal of identities", "count", pruned)
	}
	return errors.Join(err, perr)
}

// recoverySettles is how long every member must have been there, with a full
// report, before a recovery ends: longer than a presence that was restored with
// the backup lives on.
const recoverySettles = 2 * store.DefaultPresenceTTL

// recovery ends the recovery from a restore once every active member has
// reported.
func (l *leader) recovery(ctx context.Context, snap *snapshot, now time.Time) error {
	if !snap.recovering {
		l.wholeSince = time.Time{}
		return nil
	}
	present, sessions, reports := l.c.store.Presences(), l.c.store.Sessions(), l.c.store.Reports()
	for m := range snap.Catalog.Members() {
		if m.State != federation.MemberActive {
			continue
		}
		report := reports[m.Cluster]
		if present[m.Cluster] == nil || !report.GetFull() || report.GetEpoch() != sessions[m.Cluster].GetEpoch() {
			l.wholeSince = time.Time{}
			return nil
		}
	}
	if l.wholeSince.IsZero() {
		l.wholeSince = now
	}
	if now.Sub(l.wholeSince) < recoverySettles {
		return nil
	}
	l.c.log.InfoContext(ctx, "every member has reported: the recovery ends")
	return l.c.store.EndRecovery(ctx)
}
