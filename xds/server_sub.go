package xds

import (
	"math"
	"strings"
	"unicode/utf8"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// sub is what one stream has been sent, and wants, of one type. It is guarded
// by the view's mutex.
type sub struct {
	active   bool // a request came
	fresh    bool // nothing has been compared or sent since the first request
	wildcard bool
	// known are the versions that the proxy had at its first request.
	known map[string]string
	names map[string]struct{} // where not wildcard
	nonce string              // of the last response

	// Changes up to sent, and removals up to gone, have been sent or concern
	// nothing that the stream wants. What is between them and the view's head
	// is the stream's queue, of bounded size.
	sent, gone uint64
	// pending are names to send whatever sent says; true: the proxy has a
	// version of it.
	pending map[string]bool
	owed    bool // a response is due, even an empty one

	flight   *flight
	retry    [][]string // parts of refused responses, to be sent again alone
	rejected map[string]refusal
}

// refusal is a rejection that stands until a version of the resource is taken.
type refusal struct {
	Rejection
	floor uint64 // what changed up to here is not concerned
}

// flight is a response without an answer yet. There is at most one for each
// type: a slow proxy skips what is changed again before it is ready.
type flight struct {
	names []string
	floor uint64 // what changed up to here is not in it
}

// batch is one response to be sent.
type batch struct {
	typ      Type
	live     []*discoveryv3.Resource // shared
	emptied  []string                // endpoints to withdraw: Envoy ignores their removal
	removed  []string
	nonce    string
	revision string
}

func (b *batch) empty() bool { return len(b.live)+len(b.emptied)+len(b.removed) == 0 }

func (u *sub) wants(name string) bool {
	if u.wildcard {
		return true
	}
	_, ok := u.names[name]
	return ok
}

// pend queues a name to be sent; had says that the proxy has some version.
func (u *sub) pend(name string, had bool) {
	if u.pending == nil {
		u.pending = make(map[string]bool)
	}
	u.pending[name] = had || u.pending[name]
}

// addDone is the change up to which additions of the type are in use. Types
// that nobody asked for hold nothing back.
func (s *stream) addDone(t Type) uint64 {
	u, l := &s.subs[t], &s.view.records[t]
	done := s.view.head
	if !u.active {
		return done
	}
	if u.fresh {
		return 0
	}
	if l.head() > u.sent {
		done = min(done, u.sent)
	}
	for name := range u.pending {
		if rec := l.byName[name]; rec != nil {
			done = min(done, rec.seq-1)
		}
	}
	for _, group := range u.retry {
		done = min(done, l.floor(group))
	}
	if u.flight != nil {
		done = min(done, u.flight.floor)
	}
	return done
}

// goneDone is the same for removals.
func (s *stream) goneDone(t Type) uint64 {
	u, l := &s.subs[t], &s.view.records[t]
	done := s.view.head
	if !u.active {
		return done
	}
	if l.head() > u.gone {
		done = min(done, u.gone)
	}
	if u.flight != nil {
		done = min(done, u.flight.floor)
	}
	return done
}

// floor is below the last change of all these resources.
func (l *records) floor(names []string) uint64 {
	floor := uint64(math.MaxUint64)
	for _, n := range names {
		if rec := l.byName[n]; rec != nil {
			floor = min(floor, rec.seq-1)
		}
	}
	return floor
}

// limits are the changes up to which additions and removals of a type may go
// out: what is referred to is in use before what refers to it is sent, and is
// removed after that is gone.
func (s *stream) limits(t Type) (add, gone uint64) {
	head := s.view.head
	switch t {
	case TypeCluster:
		return head, min(s.addDone(TypeListener), s.goneDone(TypeListener), s.addDone(TypeRoutes), s.goneDone(TypeRoutes))
	case TypeEndpoints:
		return head, s.goneDone(TypeCluster)
	case TypeListener, TypeRoutes:
		return min(s.addDone(TypeCluster), s.addDone(TypeEndpoints)), head
	default:
		return head, head
	}
}

// next is the next response to send, or nil. It counts as sent.
func (s *stream) next() *batch {
	for t := range Type(typeCount) {
		u := &s.subs[t]
		if !u.active || u.flight != nil {
			continue
		}
		if u.fresh {
			s.start(t, u)
		}
		b := s.collect(t, u)
		if b == nil {
			continue
		}
		s.nonces++
		b.nonce = s.nonceOf()
		b.revision = s.view.revision.String()
		u.nonce = b.nonce
		u.flight = &flight{names: b.names(), floor: s.view.records[t].floor(b.names())}
		u.owed = false
		if t == TypeCluster {
			s.followClusters(b)
		}
		return b
	}
	return nil
}

func (b *batch) names() []string {
	names := make([]string, 0, len(b.live)+len(b.emptied)+len(b.removed))
	for _, r := range b.live {
		names = append(names, r.GetName())
	}
	names = append(names, b.emptied...)
	return append(names, b.removed...)
}

// start compares what the proxy says that it has with the view: after a
// reconnect, nothing is sent again that it has in its present version.
func (s *stream) start(t Type, u *sub) {
	u.fresh = false
	l := &s.view.records[t]
	u.gone = s.view.head
	if u.wildcard && len(u.known) == 0 || s.whole && t.all() {
		return // all of it, from the first change on
	}
	u.sent = s.view.head
	for name, version := range u.known {
		if rec := l.live(name); u.wants(name) && (rec == nil || rec.wire.GetVersion() != version) {
			u.pend(name, true)
		}
	}
	if u.wildcard {
		for name, rec := range l.byName {
			if _, ok := u.known[name]; !ok && rec.wire != nil {
				u.pend(name, false)
			}
		}
	}
	for name := range u.names {
		if _, ok := u.known[name]; !ok {
			u.pend(name, false)
		}
	}
	u.known = nil
	if t == TypeEndpoints {
		for name := range s.clusters {
			if u.wants(name) {
				u.pend(name, true)
			}
		}
		s.clusters = nil
	}
}

// followClusters sends the endpoints of clusters that were sent again: a
// changed cluster warms until they come, and Envoy does not ask for them.
func (s *stream) followClusters(b *batch) {
	endpoints := &s.subs[TypeEndpoints]
	if !endpoints.active || endpoints.fresh {
		if s.clusters == nil {
			s.clusters = make(map[string]struct{})
		}
		for _, r := range b.live {
			s.clusters[r.GetName()] = struct{}{}
		}
		return
	}
	for _, r := range b.live {
		if endpoints.wants(r.GetName()) {
			endpoints.pend(r.GetName(), true)
		}
	}
}

// collect chooses what a response of type t would hold, or nil if there is no
// cause for one.
func (s *stream) collect(t Type, u *sub) *batch {
	if s.whole && t.all() {
		return s.collectWhole(t, u)
	}
	b := &batch{typ: t}
	if len(u.retry) > 0 {
		group := u.retry[0]
		u.retry = u.retry[1:]
		for _, name := range group {
			b.add(s.view, name, true)
		}
		return b
	}
	size := 0
	taken := u.pending
	for name, had := range u.pending {
		if size > maxBatch {
			// What is in b is not pending any more.
			u.pending = without(u.pending, b.names())
			return b
		}
		size += b.add(s.view, name, had)
	}
	u.pending = nil
	l := &s.view.records[t]
	addLimit, goneLimit := s.limits(t)
	for _, rec := range l.since(min(u.sent, u.gone), max(addLimit, goneLimit)) {
		switch {
		case rec.wire != nil && rec.seq > u.sent && rec.seq <= addLimit:
			if size > maxBatch {
				addLimit = rec.seq - 1
				continue
			}
			if _, ok := taken[rec.name]; !ok && u.wants(rec.name) {
				size += b.add(s.view, rec.name, true)
			}
		case rec.wire == nil && rec.seq > u.gone && rec.seq <= goneLimit:
			if _, ok := taken[rec.name]; !ok && u.wants(rec.name) {
				b.add(s.view, rec.name, true)
			}
		}
	}
	u.sent, u.gone = max(u.sent, addLimit), max(u.gone, goneLimit)
	if s.whole {
		b.removed = nil // cannot be said; what is missing is not answered
	}
	if b.empty() && !u.owed {
		return nil
	}
	return b
}

// maxBatch is the size in bytes from which a response is cut short: the rest
// follows when it was taken.
const maxBatch = 1 << 20

// collectWhole is for streams without deltas, where a response of clusters or
// listeners replaces all that the proxy has.
func (s *stream) collectWhole(t Type, u *sub) *batch {
	l := &s.view.records[t]
	limit, _ := s.limits(t)
	due := u.owed
	for _, rec := range l.since(u.sent, limit) {
		due = due || u.wants(rec.name)
	}
	u.sent, u.gone = max(u.sent, limit), max(u.gone, limit)
	u.pending = nil
	if !due {
		return nil
	}
	b := &batch{typ: t}
	for rec := l.oldest; rec != nil; rec = rec.newer {
		if rec.wire != nil && u.wants(rec.name) {
			b.live = append(b.live, rec.wire)
		}
	}
	return b
}

// add puts the present state of a resource into b and returns its size in
// bytes. had says that the proxy has a version of it.
func (b *batch) add(v *view, name string, had bool) int {
	if rec := v.records[b.typ].live(name); rec != nil {
		b.live = append(b.live, rec.wire)
		return len(rec.wire.GetResource().GetValue())
	}
	if had && b.typ == TypeEndpoints {
		b.emptied = append(b.emptied, name)
	} else {
		b.removed = append(b.removed, name)
	}
	return len(name)
}

func without(pending map[string]bool, names []string) map[string]bool {
	for _, n := range names {
		delete(pending, n)
	}
	return pending
}

// accept ends a flight that the proxy took.
func (u *sub) accept() []string {
	names := u.flight.names
	u.flight = nil
	for _, n := range names {
		delete(u.rejected, n)
	}
	delete(u.rejected, "")
	return names
}

// refuse ends a flight that the proxy did not take. If it is not plain which
// resource is to blame, the response is cut into parts that are sent again:
// what the proxy's words name each alone, all else together, or halves. It
// returns the name that is to blame, if that is plain.
func (u *sub) refuse(cause string, whole bool) (blamed string, ok bool) {
	names := u.flight.names
	u.flight = nil
	if len(names) == 1 {
		return names[0], true
	}
	named, others := splitNamed(names, cause)
	switch {
	case len(names) == 0:
	case whole:
		// Parts cannot be sent: they would replace the whole.
		if len(named) > 0 {
			return named[0], true
		}
		return "", true
	case len(named) == 0 || len(others) == 0:
		u.retry = append(u.retry, names[:len(names)/2], names[len(names)/2:])
	default:
		u.retry = append(u.retry, others)
		for _, n := range named {
			u.retry = append(u.retry, []string{n})
		}
	}
	return "", false
}

// splitNamed parts the names that occur in text, as words, from the others.
func splitNamed(names []string, text string) (named, others []string) {
	for _, n := range names {
		if mentions(text, n) {
			named = append(named, n)
		} else {
			others = append(others, n)
		}
	}
	return named, others
}

func mentions(text, name string) bool {
	for rest := text; ; {
		i := strings.Index(rest, name)
		if i < 0 {
			return false
		}
		before, _ := utf8.DecodeLastRuneInString(rest[:i])
		after, _ := utf8.DecodeRuneInString(rest[i+len(name):])
		if !partOfName(before) && !partOfName(after) {
			return true
		}
		rest = rest[i+len(name):]
	}
}

func partOfName(r rune) bool {
	return r == '-' || r == '/' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
}
