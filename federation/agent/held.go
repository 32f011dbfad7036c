package agent

import (
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// held is the set of records that the agent has of the mesh, and the rule by
// which it grows and shrinks: additions count at once, removals only when the
// controller has said what is gone. That is a delete of a session whose full
// set is complete, or the absence from a full set in one of the buckets that
// the controller announced it would send whole. A restart, a reconnect,
// another incarnation or a half-sent set therefore removes nothing.
//
// Denials are sticky: absence removes none of them, for a store that was
// restored from a backup may have forgotten them.
//
// held is not safe for concurrent use.
type held struct {
	records  map[string]*federationv1.Record
	sums     federationv1.Sums   // of records
	revision federation.Revision // everything up to it is held

	// The full set that is being received; nil between sessions and after it.
	filling *filling
	// synced: the present session's full set is complete.
	synced bool
}

// filling is a full set on its way.
type filling struct {
	buckets [federationv1.Buckets]bool // whose whole content is sent
	seen    map[string]bool            // keys that it holds in them
	deleted map[string]bool            // keys deleted since its begin
}

func newHeld() *held {
	return &held{records: make(map[string]*federationv1.Record)}
}

// begin starts a session: what the controller sends from here on up to its
// full marker is the whole content of the buckets in differing.
func (h *held) begin(differing []uint32) {
	h.synced = false
	h.filling = &filling{seen: make(map[string]bool), deleted: make(map[string]bool)}
	for _, b := range differing {
		if b < federationv1.Buckets {
			h.filling.buckets[b] = true
		}
	}
}

// end forgets a session that broke off. What it added stays.
func (h *held) end() { h.filling, h.synced = nil, false }

// apply takes one update of the present session and returns the records that it
// changed: by key, the new record, or nil where it was removed.
func (h *held) apply(u *federationv1.Update) map[string]*federationv1.Record {
	changed := make(map[string]*federationv1.Record)
	for _, r := range u.GetPuts() {
		key := r.GetKey()
		if f := h.filling; f != nil {
			f.seen[key] = true
			delete(f.deleted, key)
		}
		if old, ok := h.records[key]; ok && proto.Equal(old, r) {
			continue
		}
		if !h.put(r) {
			continue
		}
		changed[key] = r
	}
	for _, key := range u.GetDeletes() {
		if f := h.filling; f != nil {
			delete(f.seen, key)
			f.deleted[key] = true
		} else if h.synced {
			h.remove(key, changed)
		}
	}
	if f := h.filling; f != nil && u.GetFull() {
		for key := range h.records {
			gone := f.deleted[key] || !isDenial(key) && !f.seen[key] && f.buckets[federationv1.Bucket(key)]
			if gone {
				h.remove(key, changed)
			}
		}
		h.filling, h.synced = nil, true
	}
	if rev, err := u.GetRevision().Decode(); err == nil && h.synced && rev != (federation.Revision{}) {
		h.revision = rev
	}
	return changed
}

// put holds a record under its key, in place of an older one. A record that
// does not encode is refused: it could not be persisted.
func (h *held) put(r *federationv1.Record) bool {
	value, err := r.Value()
	if err != nil {
		return false
	}
	h.forget(r.GetKey())
	h.records[r.GetKey()] = r
	h.sums.Add(r.GetKey(), value)
	return true
}

// forget removes a record, without asking whether it may.
func (h *held) forget(key string) bool {
	old, ok := h.records[key]
	if !ok {
		return false
	}
	value, _ := old.Value() // put has encoded it before
	h.sums.Remove(key, value)
	delete(h.records, key)
	return true
}

func (h *held) remove(key string, changed map[string]*federationv1.Record) {
	if h.forget(key) {
		changed[key] = nil
	}
}

// sorted are the records in the order of their keys.
func (h *held) sorted() []*federationv1.Record {
	out := make([]*federationv1.Record, 0, len(h.records))
	for _, k := range slices.Sorted(maps.Keys(h.records)) {
		out = append(out, h.records[k])
	}
	return out
}

// isDenial reports whether key is that of a denial.
func isDenial(key string) bool { return strings.HasPrefix(key, "deny/") }
