package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// maxQueue is how many batches wait for a consumer before they are joined.
const maxQueue = 64

// Batch is one step from one state of the records to the next. It holds all
// that one revision of the store changed, or, for a consumer that was slow,
// what several revisions changed: never a part of a revision.
type Batch struct {
	// Revision of the catalog after the batch. Findings are not part of the
	// catalog: a batch that holds findings alone repeats the last revision.
	Revision federation.Revision
	// Puts are new and changed records, sorted by key, the exports and policies
	// with the revision of their first acceptance. They are shared between
	// consumers: do not change them.
	Puts []*federationv1.Record
	// Deletes are keys of records that are gone, sorted.
	Deletes []string
	// Full: Puts is everything there is. So is a consumer's first batch, and the
	// first of a new incarnation; then Deletes holds what the consumer knew and
	// the restored store does not have.
	Full bool
	// Recovering: the store was restored, and members may not have reported
	// since. What is missing may be missing for that reason only.
	Recovering bool
}

// item is one key of the view.
type item struct {
	created, modified int64
	record            *federationv1.Record // of a record's key
	state             *federationv1.State  // of a key of the store's own
}

// view is the watched state of the whole prefix, the journal excepted, and
// those who follow it. One goroutine (run) changes it.
type view struct {
	store *Store

	mu        sync.Mutex
	loaded    bool
	revision  int64  // etcd's: everything up to it is in
	cluster   uint64 // etcd's cluster id
	items     map[string]item
	own       map[string]map[string]*federationv1.State // of items, by folder
	consumers map[*Watch]struct{}
	sessions  map[federation.ClusterID][]*Session
}

func newView(s *Store) *view {
	return &view{
		store: s, items: make(map[string]item), own: make(map[string]map[string]*federationv1.State), consumers: make(map[*Watch]struct{}),
		sessions: make(map[federation.ClusterID][]*Session),
	}
}

// Watch is one consumer's place in the stream of batches.
type Watch struct {
	view  *view
	ready chan struct{} // holds a token while the queue may be non-empty

	mu    sync.Mutex
	queue []*batch
}

// batch is a Batch in the making.
type batch struct {
	revision   federation.Revision
	puts       map[string]*federationv1.Record
	deletes    map[string]struct{}
	full       bool
	recovering bool
}

func newBatch() *batch {
	return &batch{puts: make(map[string]*federationv1.Record), deletes: make(map[string]struct{})}
}

// Watch begins to follow the records. The first batch is full, and comes as
// soon as the store's own watch has listed them. Close it when done.
func (s *Store) Watch() *Watch {
	w := &Watch{view: s.view, ready: make(chan struct{}, 1)}
	v := s.view
	v.mu.Lock()
	defer v.mu.Unlock()
	v.consumers[w] = struct{}{}
	s.metrics.consumers.Set(float64(len(v.consumers)))
	if v.loaded {
		w.push(v.everything())
	}
	return w
}

// Close ends w; a pending Next returns ErrClosed only with its context, so end
// that as well.
func (w *Watch) Close() {
	v := w.view
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.consumers, w)
	v.store.metrics.consumers.Set(float64(len(v.consumers)))
}

// Next waits for the next batch. ErrClosed when the store was closed.
func (w *Watch) Next(ctx context.Context) (Batch, error) {
	for {
		w.mu.Lock()
		if len(w.queue) > 0 {
			b := w.queue[0]
			w.queue = w.queue[1:]
			w.mu.Unlock()
			return b.finish(), nil
		}
		w.mu.Unlock()
		select {
		case <-w.ready:
		case <-ctx.Done():
			return Batch{}, ctx.Err()
		case <-w.view.store.closed:
			return Batch{}, ErrClosed
		}
	}
}

// push queues b, which w owns from now on.
func (w *Watch) push(b *batch) {
	w.mu.Lock()
	switch n := len(w.queue); {
	case b.full:
		// Nothing before it matters but what it took away.
		for _, q := range w.queue {
			b.remember(q)
		}
		w.queue = []*batch{b}
	case n >= maxQueue:
		w.queue[n-1].join(b)
	default:
		w.queue = append(w.queue, b)
	}
	w.mu.Unlock()
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// remember notes in the full batch b what the earlier batch q would have made
// its consumer delete.
func (b *batch) remember(q *batch) {
	for k := range q.deletes {
		if _, ok := b.puts[k]; !ok {
			b.deletes[k] = struct{}{}
		}
	}
}

// join adds the later batch n to b.
func (b *batch) join(n *batch) {
	for k, r := range n.puts {
		b.puts[k] = r
		delete(b.deletes, k)
	}
	for k := range n.deletes {
		delete(b.puts, k)
		b.deletes[k] = struct{}{}
	}
	b.revision, b.recovering = n.revision, n.recovering
}

func (b *batch) clone() *batch {
	return &batch{
		revision: b.revision, puts: maps.Clone(b.puts), deletes: maps.Clone(b.deletes), full: b.full, recovering: b.recovering,
	}
}

func (b *batch) finish() Batch {
	out := Batch{Revision: b.revision, Full: b.full, Recovering: b.recovering, Deletes: slices.Sorted(maps.Keys(b.deletes))}
	for _, k := range slices.Sorted(maps.Keys(b.puts)) {
		out.Puts = append(out.Puts, b.puts[k])
	}
	return out
}

func (v *view) meta() *federationv1.Meta { return v.items[keyMeta].state.GetMeta() }

func (v *view) catalog() federation.Revision {
	return federation.Revision{Incarnation: v.meta().GetIncarnation(), Number: v.items[keyHead].modified}
}

// stamp fills in b what the view knows after it.
func (v *view) stamp(b *batch) *batch {
	b.revision, b.recovering = v.catalog(), v.meta().GetRecovering()
	return b
}

// everything is a full batch.
func (v *view) everything() *batch {
	b := newBatch()
	b.full = true
	for k, it := range v.items {
		if it.record != nil {
			b.puts[k] = it.record
		}
	}
	return v.stamp(b)
}

// publish hands b to every consumer.
func (v *view) publish(b *batch) {
	for w := range v.consumers {
		w.push(b.clone())
	}
}

// set takes one key's new entry into the view, and into b. A value that cannot
// be read changes nothing but the item's revision: its last good version stays.
func (v *view) set(key string, e entry, b *batch) {
	old := v.items[key]
	if old.modified == e.modified && old.created == e.created {
		return
	}
	it := item{created: e.created, modified: e.modified}
	var err error
	switch {
	case isRecord(key):
		if it.record, err = decodeRecord(key, e.value, e.created); err == nil {
			b.puts[key] = it.record
			delete(b.deletes, key)
		}
	case dirOf(key) == dirElection, dirOf(key) == dirAuthority, dirOf(key) == dirToken:
		// Not kept: the election's values are not ours, the others are secrets
		// that are read when they are needed.
	default:
		it.state, err = decodeState(key, e.value)
	}
	if err != nil {
		it.record, it.state = old.record, old.state
		v.store.metrics.badValues.Inc()
		v.store.log.Error("a value cannot be read; its last good version stays in use", "key", key, "error", err)
	}
	v.items[key] = it
	if dir := dirOf(key); it.state != nil {
		if v.own[dir] == nil {
			v.own[dir] = make(map[string]*federationv1.State)
		}
		v.own[dir][key] = it.state
	}
	v.sessionChanged(key, e.modified)
}

// remove takes a key out of the view, and notes that in b.
func (v *view) remove(key string, at int64, b *batch) {
	old, ok := v.items[key]
	if !ok {
		return
	}
	delete(v.items, key)
	delete(v.own[dirOf(key)], key)
	if old.record != nil {
		delete(b.puts, key)
		b.deletes[key] = struct{}{}
	}
	v.sessionChanged(key, at)
}

// replace makes the view what a list found. It is the one way in which deletes
// are found that no event told of.
func (v *view) replace(found map[string]entry, where listed) {
	v.mu.Lock()
	defer v.mu.Unlock()
	before := v.meta().GetIncarnation()
	if before != "" && (where.cluster != v.cluster || where.revision < v.revision) {
		// Another history: its revision numbers say nothing about ours.
		for k, it := range v.items {
			it.modified = -1
			v.items[k] = it
		}
	}
	b := newBatch()
	for key := range v.items {
		if _, ok := found[key]; !ok {
			v.remove(key, where.revision, b)
		}
	}
	for key, e := range found {
		v.set(key, e, b)
	}
	first := !v.loaded
	v.loaded, v.revision, v.cluster = true, where.revision, where.cluster
	switch {
	case first:
		b = v.everything()
	case before != v.meta().GetIncarnation():
		b = v.anew(b)
	}
	v.gauges()
	if v.stamp(b).matters() || b.full {
		v.publish(b)
	}
}

// anew is the full batch with which a new incarnation begins, after the changes
// in b. Sessions of the old one are over.
func (v *view) anew(b *batch) *batch {
	full := v.everything()
	full.deletes = b.deletes
	for _, of := range v.sessions {
		for _, ss := range of {
			if ss.incarnation != full.revision.Incarnation {
				ss.end()
			}
		}
	}
	return full
}

func (b *batch) matters() bool { return len(b.puts) > 0 || len(b.deletes) > 0 }

// apply takes in all events of one revision.
func (v *view) apply(revision int64, puts map[string]entry, deletes []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if revision <= v.revision {
		return // seen before a reconnection
	}
	before, head := v.meta().GetIncarnation(), v.items[keyHead].modified
	b := newBatch()
	for _, k := range deletes {
		v.remove(k, revision, b)
	}
	for k, e := range puts {
		v.set(k, e, b)
	}
	v.revision = revision
	v.gauges()
	if before != v.meta().GetIncarnation() {
		b = v.anew(b)
	}
	if v.stamp(b).matters() || b.full || head != v.items[keyHead].modified {
		v.publish(b)
	}
}

// advance notes that nothing happened up to revision.
func (v *view) advance(revision int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.revision = max(v.revision, revision)
	v.gauges()
}

func (v *view) gauges() {
	v.store.metrics.revision.Set(float64(v.revision))
	v.store.metrics.keys.Set(float64(len(v.items)))
}

// at is where the view is: etcd's revision and cluster id.
func (v *view) at() (revision int64, cluster uint64, incarnation string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.revision, v.cluster, v.meta().GetIncarnation()
}

// differences counts the keys in which the view differs from a list of the same
// revision.
func (v *view) differences(found map[string]entry) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := 0
	for k, e := range found {
		if it, ok := v.items[k]; !ok || it.modified != e.modified || it.created != e.created {
			n++
		}
	}
	for k := range v.items {
		if _, ok := found[k]; !ok {
			n++
		}
	}
	return n
}

// states are the decoded values below dir, a folder of the store's own.
func (v *view) states(dir string) map[string]*federationv1.State {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.own[dir])
}

// follow ends ss when the watch sees that it is not the newest session.
func (v *view) follow(ss *Session) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sessions[ss.cluster] = append(v.sessions[ss.cluster], ss)
	if ss.incarnation != v.meta().GetIncarnation() {
		return // the view is behind: what it knows is of another history
	}
	if it, ok := v.items[sessionKey(ss.cluster)]; ok && it.modified > ss.opened || !ok && v.revision > ss.opened {
		ss.end()
	}
}

func (v *view) unfollow(ss *Session) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sessions[ss.cluster] = slices.DeleteFunc(v.sessions[ss.cluster], func(o *Session) bool { return o == ss })
	if len(v.sessions[ss.cluster]) == 0 {
		delete(v.sessions, ss.cluster)
	}
}

// sessionChanged ends the sessions that a change of key at a revision makes old.
func (v *view) sessionChanged(key string, at int64) {
	if dirOf(key) != dirSession {
		return
	}
	for _, ss := range v.sessions[federation.ClusterID(strings.TrimPrefix(key, dirSession))] {
		if at > ss.opened && ss.incarnation == v.meta().GetIncarnation() {
			ss.end()
		}
	}
}

// Synced waits until the store's own watch has listed everything once.
func (s *Store) Synced(ctx context.Context) error {
	w := s.Watch()
	defer w.Close()
	if _, err := w.Next(ctx); err != nil {
		return fmt.Errorf("store: first list: %w", err)
	}
	return nil
}
