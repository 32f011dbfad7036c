package agent

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// source of truth of the property below: a controller whose messages may stop
// at any point, and whose store may be put back to an older state.
type modelController struct {
	incarnation int
	number      int64
	records     map[string]*federationv1.Record
	recovering  bool // sessions get no full marker
	backup      map[string]*federationv1.Record
	queue       []*federationv1.Update // of the open session
	open        bool
}

func modelRecord(key string, v int) *federationv1.Record {
	k, err := federationv1.ParseKey(key)
	if err != nil {
		panic(err)
	}
	if k.Kind == federationv1.KindDenial {
		return federationv1.DenialRecord(federation.Denial{Cluster: k.Cluster, Generation: k.Generation, Reason: fmt.Sprint("r", v)})
	}
	return federationv1.ReadinessRecord(k.Export(), federation.Readiness{Ready: v, Total: v})
}

func modelKeys() []string {
	var keys []string
	for c := range 3 {
		keys = append(keys, fmt.Sprintf("deny/c%d/1", c))
		for s := range 12 {
			keys = append(keys, fmt.Sprintf("ready/c%d/shop/s%d", c, s))
		}
	}
	return keys
}

func (m *modelController) revision() *federationv1.Revision {
	return &federationv1.Revision{Incarnation: fmt.Sprint("i", m.incarnation), Number: m.number}
}

// connect begins a session with what the agent says it has, in parts.
func (m *modelController) connect(h *held, part int) {
	m.open, m.queue = true, nil
	var mine federationv1.Sums
	for key, r := range m.records {
		value, _ := r.Value()
		mine.Add(key, value)
	}
	differing := mine.Differing(h.sums)
	h.begin(differing)
	u := &federationv1.Update{}
	for _, key := range slices.Sorted(maps.Keys(m.records)) {
		if slices.Contains(differing, federationv1.Bucket(key)) {
			u.Puts = append(u.Puts, m.records[key])
			if len(u.Puts) == part {
				m.queue = append(m.queue, u)
				u = &federationv1.Update{}
			}
		}
	}
	u.Revision, u.Full = m.revision(), !m.recovering
	m.queue = append(m.queue, u)
}

func (m *modelController) change(puts []*federationv1.Record, deletes []string) {
	m.number++
	for _, r := range puts {
		m.records[r.GetKey()] = r
	}
	for _, k := range deletes {
		delete(m.records, k)
	}
	if m.open {
		m.queue = append(m.queue, &federationv1.Update{Revision: m.revision(), Puts: puts, Deletes: deletes})
	}
}

// Whatever breaks in between, the agent loses no record that the controller
// still has, and no denial; when a session got through, both hold the same.
func TestNothingIsLostBeforeTheFullMarker(t *testing.T) {
	keys := modelKeys()
	rapid.Check(t, func(t *rapid.T) {
		m := &modelController{records: map[string]*federationv1.Record{}}
		h := newHeld()
		key := rapid.SampledFrom(keys)
		denials := map[string]bool{} // that the agent has heard of, and nobody has lifted
		drain := func(n int) {
			for ; n > 0 && len(m.queue) > 0; n-- {
				u := m.queue[0]
				m.queue = m.queue[1:]
				before := maps.Clone(h.records)
				changed := h.apply(u)
				for k, r := range changed {
					if r != nil {
						if isDenial(k) {
							denials[k] = true
						}
						continue
					}
					// Whether it still existed shows in what the controller has yet
					// to say: it went by a delete in between, or it is gone now.
					if _, still := m.records[k]; still && !pendingPut(m.queue, k) {
						t.Fatalf("%s was removed and still exists", k)
					}
					if isDenial(k) && !slices.Contains(u.GetDeletes(), k) && !u.GetFull() {
						t.Fatalf("denial %s was removed without anybody lifting it", k)
					}
					delete(denials, k)
					if _, had := before[k]; !had {
						t.Fatalf("%s was removed and never held", k)
					}
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				m.change([]*federationv1.Record{modelRecord(key.Draw(t, "key"), rapid.IntRange(1, 9).Draw(t, "value"))}, nil)
			},
			"delete": func(t *rapid.T) { m.change(nil, []string{key.Draw(t, "key")}) },
			"both": func(t *rapid.T) {
				a, b := key.Draw(t, "put"), key.Draw(t, "delete")
				if a != b {
					m.change([]*federationv1.Record{modelRecord(a, rapid.IntRange(1, 9).Draw(t, "value"))}, []string{b})
				}
			},
			"connect":    func(t *rapid.T) { m.connect(h, rapid.IntRange(1, 20).Draw(t, "part")) },
			"disconnect": func(t *rapid.T) { m.open, m.queue = false, nil; h.end() },
			"deliver":    func(t *rapid.T) { drain(rapid.IntRange(1, 6).Draw(t, "messages")) },
			"back up":    func(*rapid.T) { m.backup = maps.Clone(m.records) },
			"restore": func(*rapid.T) {
				if m.backup == nil {
					return
				}
				held := maps.Clone(h.records)
				m.records, m.recovering, m.open, m.queue = maps.Clone(m.backup), true, false, nil
				m.incarnation, m.number = m.incarnation+1, m.number/2
				h.end()
				// While the store recovers, a whole session changes or adds only.
				m.connect(h, 5)
				for len(m.queue) > 0 {
					drain(1)
				}
				for k := range held {
					if _, ok := h.records[k]; !ok {
						t.Fatalf("%s was lost to a store that was restored", k)
					}
				}
			},
			"recovered": func(*rapid.T) {
				// What the agents reported is in the store again by now, or gone.
				m.recovering = false
			},
			"": func(t *rapid.T) {
				var sums federationv1.Sums
				for k, r := range h.records {
					value, _ := r.Value()
					sums.Add(k, value)
				}
				if sums != h.sums {
					t.Fatal("the digest does not follow the records")
				}
				for k := range denials {
					if _, ok := h.records[k]; !ok {
						t.Fatalf("denial %s is forgotten", k)
					}
				}
				if !m.open || len(m.queue) > 0 || !h.synced {
					return
				}
				for k, r := range m.records {
					if !proto.Equal(h.records[k], r) {
						t.Fatalf("after a whole session the agent has %v under %s, the controller %v", h.records[k], k, r)
					}
				}
				for k := range h.records {
					if _, ok := m.records[k]; !ok && !isDenial(k) {
						t.Fatalf("after a whole session the agent still has %s", k)
					}
				}
			},
		})
	})
}

func pendingPut(queue []*federationv1.Update, key string) bool {
	for _, u := range queue {
		for _, r := range u.GetPuts() {
			if r.GetKey() == key {
				return true
			}
		}
	}
	return false
}

// The revision follows complete sets and what comes after, never a part.
func TestRevisionOfHeldRecords(t *testing.T) {
	h := newHeld()
	rev := func(n int64) *federationv1.Revision { return &federationv1.Revision{Incarnation: "i", Number: n} }
	h.begin([]uint32{federationv1.Bucket("ready/c0/shop/s0")})
	h.apply(&federationv1.Update{Revision: rev(7), Puts: []*federationv1.Record{modelRecord("ready/c0/shop/s0", 1)}})
	if h.revision.Number != 0 {
		t.Fatalf("a part of a set counts as revision %s", h.revision)
	}
	h.apply(&federationv1.Update{Revision: rev(8), Full: true})
	if h.revision.Number != 8 {
		t.Fatalf("the complete set is revision %s", h.revision)
	}
	h.end()
	h.begin(nil)
	h.apply(&federationv1.Update{Revision: rev(2)})
	if h.revision.Number != 8 {
		t.Fatalf("before its marker, an older controller's revision counts: %s", h.revision)
	}
}
