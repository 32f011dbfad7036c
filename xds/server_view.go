package xds

import (
	"math"
	"slices"
	"sync"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/federation"
)

// view is what all proxies of one kind are sent. Each resource has a record,
// and the records of a type form a list in the order of their last change: what
// a stream has not seen yet is the tail of that list, each resource once,
// however long ago the stream fell behind. A removed resource's record stays,
// empty, until every stream has passed it.
//
// One mutex guards a view, its records and its streams' state. It is never
// held while something is sent.
type view struct {
	key View

	mu       sync.Mutex
	ready    bool   // Set was called: the view is complete
	dropped  bool   // Drop was called
	head     uint64 // number of the last change
	revision federation.Revision
	// marks says which revision was complete at which change, for the last
	// Sets: streams that lag have applied one of those.
	marks   []mark
	records [typeCount]records
	streams map[*stream]struct{}
}

type mark struct {
	head     uint64
	revision federation.Revision
}

const maxMarks = 256

// record is the current state of one resource.
type record struct {
	name string
	seq  uint64 // of its last change
	// wire is nil once the resource has been removed. It is shared by all
	// responses and never changed.
	wire *discoveryv3.Resource

	older, newer *record
}

// records are the resources of one type.
type records struct {
	byName map[string]*record
	newest *record
	oldest *record
	gone   int // records of removed resources
}

func newView(key View) *view {
	v := &view{key: key, streams: make(map[*stream]struct{})}
	for t := range v.records {
		v.records[t].byName = make(map[string]*record)
	}
	return v
}

// set applies a change and wakes the streams.
func (v *view) set(rev federation.Revision, d Delta) {
	v.mu.Lock()
	defer v.mu.Unlock()
	// Within one change, what is referred to is numbered before what refers to
	// it, and is removed after it: streams may stop anywhere in between. (Of a
	// cluster that is gone, no proxy wants the endpoints any more.)
	for t := range Type(typeCount) {
		for _, r := range d.Changed {
			if r.Type == t {
				v.put(r)
			}
		}
	}
	for _, t := range [...]Type{TypeListener, TypeRoutes, TypeCluster, TypeEndpoints, TypeSecret} {
		for _, n := range d.Removed {
			if n.Type == t {
				v.remove(n)
			}
		}
	}
	v.ready = true
	v.revision = rev
	if n := len(v.marks); n > 0 && v.marks[n-1].head == v.head {
		v.marks[n-1].revision = rev
	} else {
		if n == maxMarks {
			v.marks = append(v.marks[:0], v.marks[n/2:]...)
		}
		v.marks = append(v.marks, mark{v.head, rev})
	}
	v.prune()
	for s := range v.streams {
		s.wake()
	}
}

func (v *view) put(r *Resource) {
	l := &v.records[r.Type]
	rec := l.byName[r.Name.Name]
	switch {
	case rec == nil:
		rec = &record{name: r.Name.Name}
		l.byName[rec.name] = rec
	case rec.wire == nil:
		l.gone--
		l.unlink(rec)
	case rec.wire.GetVersion() == r.Version:
		return
	default:
		l.unlink(rec)
	}
	rec.wire = &discoveryv3.Resource{
		Name:     r.Name.Name,
		Version:  r.Version,
		Resource: &anypb.Any{TypeUrl: r.Type.url(), Value: r.Body},
	}
	v.touch(l, rec)
}

func (v *view) remove(n Name) {
	l := &v.records[n.Type]
	rec := l.byName[n.Name]
	if rec == nil || rec.wire == nil {
		return
	}
	rec.wire = nil
	l.gone++
	l.unlink(rec)
	v.touch(l, rec)
}

func (v *view) touch(l *records, rec *record) {
	v.head++
	rec.seq = v.head
	rec.older, rec.newer = l.newest, nil
	if l.newest != nil {
		l.newest.newer = rec
	} else {
		l.oldest = rec
	}
	l.newest = rec
}

func (l *records) unlink(rec *record) {
	if rec.older != nil {
		rec.older.newer = rec.newer
	} else {
		l.oldest = rec.newer
	}
	if rec.newer != nil {
		rec.newer.older = rec.older
	} else {
		l.newest = rec.older
	}
}

// since are the records that changed after from, up to limit, oldest first.
func (l *records) since(from, limit uint64) []*record {
	var changed []*record
	for rec := l.newest; rec != nil && rec.seq > from; rec = rec.older {
		if rec.seq <= limit {
			changed = append(changed, rec)
		}
	}
	slices.Reverse(changed)
	return changed
}

// head is the number of the newest change in the list.
func (l *records) head() uint64 {
	if l.newest == nil {
		return 0
	}
	return l.newest.seq
}

func (l *records) live(name string) *record {
	if rec := l.byName[name]; rec != nil && rec.wire != nil {
		return rec
	}
	return nil
}

// prune forgets removed resources that every stream has passed, now and then:
// when they are a quarter of a list.
func (v *view) prune() {
	for t := range v.records {
		l := &v.records[t]
		if l.gone < 64 || l.gone*4 < len(l.byName) {
			continue
		}
		passed := uint64(math.MaxUint64)
		for s := range v.streams {
			if s.subs[t].active {
				passed = min(passed, s.subs[t].gone)
			}
		}
		for rec := l.oldest; rec != nil; {
			next := rec.newer
			if rec.wire == nil && rec.seq <= passed {
				l.unlink(rec)
				delete(l.byName, rec.name)
				l.gone--
			}
			rec = next
		}
	}
}

// revisionAt is the newest revision that is complete at change seq.
func (v *view) revisionAt(seq uint64) (federation.Revision, bool) {
	for _, m := range slices.Backward(v.marks) {
		if m.head <= seq {
			return m.revision, true
		}
	}
	return federation.Revision{}, false
}
