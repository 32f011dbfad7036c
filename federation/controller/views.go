package controller

import (
	"maps"
	"slices"
	"sync"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// views holds the records that agents are sent, by who may see them, and the
// streams that are to hear of changes. A record is encoded once, when it
// changes; a change costs a map entry for each stream that it concerns, and
// nothing for the others. It is safe for concurrent use.
type views struct {
	mu         sync.Mutex
	revision   federation.Revision
	recovering bool // after a restore: nobody is told that a set is full
	entries    map[string]*entry
	classes    map[string]*class
	streams    map[federation.ClusterID]map[*stream]struct{}
}

// entry is one record, ready to be sent. It is immutable.
type entry struct {
	key      string
	wire     []byte // as it stands in an Update: tag, length and message
	bucket   uint32
	hash     uint64
	audience audience
}

// class is the records of one audience with their digest.
type class struct {
	audience audience
	entries  map[string]*entry
	sums     federationv1.Sums
}

// change is one record's new state; a nil entry means that it is gone.
type change struct {
	key   string
	entry *entry
}

func newViews() *views {
	return &views{
		entries: map[string]*entry{},
		classes: map[string]*class{},
		streams: map[federation.ClusterID]map[*stream]struct{}{},
	}
}

// newEntry encodes a record for its audience.
func newEntry(r *federationv1.Record, a audience) (*entry, error) {
	value, err := r.Value()
	if err != nil {
		return nil, err
	}
	wire, err := encodePut(r)
	if err != nil {
		return nil, err
	}
	return &entry{
		key: r.Key, wire: wire, audience: a,
		bucket: federationv1.Bucket(r.Key), hash: federationv1.Hash(r.Key, value),
	}, nil
}

// apply moves the views to a revision and wakes the streams that a change
// concerns: those that could see the record before it, or can after it.
func (v *views) apply(rev federation.Revision, changes []change) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.revision = rev
	for _, c := range changes {
		old := v.entries[c.key]
		if old == nil && c.entry == nil {
			continue
		}
		if old != nil {
			v.drop(old)
		}
		if c.entry != nil {
			v.put(c.entry)
		}
		v.mark(c.key, old, c.entry)
	}
}

func (v *views) put(e *entry) {
	name := e.audience.class()
	cl := v.classes[name]
	if cl == nil {
		cl = &class{audience: e.audience, entries: map[string]*entry{}}
		v.classes[name] = cl
	}
	cl.entries[e.key] = e
	cl.sums[e.bucket] += e.hash
	v.entries[e.key] = e
}

func (v *views) drop(e *entry) {
	name := e.audience.class()
	cl := v.classes[name]
	delete(cl.entries, e.key)
	cl.sums[e.bucket] -= e.hash
	if len(cl.entries) == 0 {
		delete(v.classes, name)
	}
	delete(v.entries, e.key)
}

// mark notes a changed record for the streams that it concerns. Where an
// audience names clusters only, no other stream is looked at.
func (v *views) mark(key string, old, now *entry) {
	concerned := map[federation.ClusterID]struct{}{}
	for _, e := range []*entry{old, now} {
		if e == nil {
			continue
		}
		if e.audience.everyone || e.audience.shared && len(e.audience.visible.Regions) > 0 {
			for c := range v.streams {
				concerned[c] = struct{}{}
			}
			break
		}
		concerned[e.audience.owner] = struct{}{}
		if e.audience.shared {
			for _, c := range e.audience.visible.Clusters {
				concerned[c] = struct{}{}
			}
		}
	}
	for c := range concerned {
		for s := range v.streams[c] {
			sees := func(e *entry) bool { return e != nil && e.audience.includes(s.cluster, s.region) }
			if sees(old) || sees(now) {
				s.pending[key] = struct{}{}
				s.poke()
			}
		}
	}
}

// setRecovering says whether the store is recovering from a restore; the end
// of it owes every stream its full marker.
func (v *views) setRecovering(recovering bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.recovering == recovering {
		return
	}
	v.recovering = recovering
	if recovering {
		return
	}
	for _, streams := range v.streams {
		for s := range streams {
			s.poke()
		}
	}
}

// restart ends every stream: the store was restored, and what the streams were
// sent is of another history. Nothing is taken from them; their agents come
// again and compare what they have.
func (v *views) restart() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, streams := range v.streams {
		for s := range streams {
			s.over = true
			s.poke()
		}
	}
}

// stream is one agent's subscription. Its fields belong to views.mu, but wake.
type stream struct {
	cluster federation.ClusterID
	region  string
	pending map[string]struct{} // keys that changed since the last update
	sent    federation.Revision // of the last update
	full    bool                // the full marker was sent
	over    bool                // nothing is sent any more
	wake    chan struct{}       // room for one
}

func (s *stream) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// update is what a stream is to be sent next.
type update struct {
	revision federation.Revision
	puts     []*entry
	deletes  []string
	full     bool
}

func (u update) empty() bool { return len(u.puts) == 0 && len(u.deletes) == 0 && !u.full }

// subscribe adds a stream for an agent that holds a set with the digest have.
// It returns the buckets in which that set differs from the cluster's view, and
// the first update, which holds those buckets whole.
func (v *views) subscribe(c federation.ClusterID, region string, have federationv1.Sums) (s *stream, differing []uint32, first update) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s = &stream{
		cluster: c, region: region,
		pending: map[string]struct{}{},
		sent:    v.revision,
		full:    !v.recovering,
		wake:    make(chan struct{}, 1),
	}
	var sums federationv1.Sums
	var seen []*class
	for _, cl := range v.classes {
		if !cl.audience.includes(c, region) {
			continue
		}
		seen = append(seen, cl)
		for i, sum := range cl.sums {
			sums[i] += sum
		}
	}
	differing = sums.Differing(have)
	var wanted [federationv1.Buckets]bool
	for _, b := range differing {
		wanted[b] = true
	}
	if len(differing) > 0 {
		for _, cl := range seen {
			for _, e := range cl.entries {
				if wanted[e.bucket] {
					first.puts = append(first.puts, e)
				}
			}
		}
	}
	first.revision, first.full = v.revision, s.full
	if v.streams[c] == nil {
		v.streams[c] = map[*stream]struct{}{}
	}
	v.streams[c][s] = struct{}{}
	return s, differing, first
}

// unsubscribe ends a subscription.
func (v *views) unsubscribe(s *stream) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.streams[s.cluster], s)
	if len(v.streams[s.cluster]) == 0 {
		delete(v.streams, s.cluster)
	}
}

// next takes what a stream is to be sent now: every record that changed since
// its last update in the state that it has by now, however many revisions that
// skips. An update without records is progress; ok is false where there is not
// even that.
func (v *views) next(s *stream) (u update, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s.over {
		return update{}, false
	}
	u.revision = v.revision
	later := map[string]struct{}{}
	for _, key := range slices.Sorted(maps.Keys(s.pending)) {
		if e := v.entries[key]; e != nil && e.audience.includes(s.cluster, s.region) {
			u.puts = append(u.puts, e)
		} else if v.recovering {
			// It may be gone because the backup was older than it.
			later[key] = struct{}{}
		} else {
			u.deletes = append(u.deletes, key)
		}
	}
	if len(s.pending) > 0 {
		s.pending = later
	}
	if !s.full && !v.recovering {
		s.full, u.full = true, true
	}
	ok = !u.empty() || s.sent != v.revision
	s.sent = v.revision
	return u, ok
}
