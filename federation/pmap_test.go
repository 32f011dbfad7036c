package federation

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A pmap behaves as a map, versions do not disturb each other, and a map's
// shape does not depend on how it came about.
func TestPersistentMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type version struct {
			m     pmap[ClusterID, int]
			model map[ClusterID]int
		}
		versions := []version{{model: map[ClusterID]int{}}}
		keys := rapid.SampledFrom([]ClusterID{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"})
		for i := range rapid.IntRange(0, 40).Draw(t, "steps") {
			from := versions[rapid.IntRange(0, len(versions)-1).Draw(t, "from")]
			k := keys.Draw(t, "key")
			next := version{model: maps.Clone(from.model)}
			if rapid.Bool().Draw(t, "set") {
				next.m = from.m.set(k, i)
				next.model[k] = i
			} else {
				next.m = from.m.without(k)
				delete(next.model, k)
			}
			versions = append(versions, next)
		}
		for _, v := range versions {
			if got := maps.Collect(v.m.all()); !maps.Equal(got, v.model) || v.m.len() != len(v.model) {
				t.Fatalf("%v with length %d instead of %v", got, v.m.len(), v.model)
			}
			var order []ClusterID
			for k := range v.m.all() {
				order = append(order, k)
			}
			if !slices.IsSorted(order) {
				t.Fatalf("not in order: %v", order)
			}
			for k, want := range v.model {
				if got, ok := v.m.get(k); !ok || got != want {
					t.Fatalf("get %s: %v %v", k, got, ok)
				}
			}
			var rest, wantRest []ClusterID
			for k := range v.m.from(func(k ClusterID) bool { return k < "f" }) {
				rest = append(rest, k)
			}
			for _, k := range order {
				if k >= "f" {
					wantRest = append(wantRest, k)
				}
			}
			if !slices.Equal(rest, wantRest) {
				t.Fatalf("from f: %v instead of %v", rest, wantRest)
			}
			var again pmap[ClusterID, int]
			for k, n := range v.model {
				again = again.set(k, n)
			}
			if !reflect.DeepEqual(v.m, again) {
				t.Fatal("two maps of the same content have different shapes")
			}
		}
		a := versions[rapid.IntRange(0, len(versions)-1).Draw(t, "old")]
		b := versions[rapid.IntRange(0, len(versions)-1).Draw(t, "new")]
		var want []string
		for _, k := range slices.Sorted(maps.Keys(maps.Collect(union(a.model, b.model)))) {
			x, inOld := a.model[k]
			y, inNew := b.model[k]
			if inOld != inNew || x != y {
				want = append(want, fmt.Sprint(k, x, inOld, y, inNew))
			}
		}
		var got []string
		for d := range diff(a.m, b.m, equal) {
			got = append(got, fmt.Sprint(d.key, d.old, d.inOld, d.new, d.inNew))
		}
		if !slices.Equal(got, want) {
			t.Fatalf("difference is %v instead of %v", got, want)
		}
	})
}

func union[K comparable, V any](a, b map[K]V) func(func(K, V) bool) {
	return func(yield func(K, V) bool) {
		for _, m := range []map[K]V{a, b} {
			for k, v := range m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// A difference looks at what the two versions do not share, and no more.
func TestDifferenceSkipsWhatIsShared(t *testing.T) {
	var m pmap[ClusterID, int]
	const n = 10000
	for i := range n {
		m = m.set(ClusterID(fmt.Sprintf("c%d", i)), i)
	}
	changed := m.set("c77", -1).set("c4711", -1).without("c9999")
	compared := 0
	count := 0
	for range diff(m, changed, func(a, b int) bool { compared++; return a == b }) {
		count++
	}
	if count != 3 {
		t.Errorf("%d differences", count)
	}
	// Three paths of a tree of 10,000; twice the expected depth, thrice over.
	if compared > 200 {
		t.Errorf("%d of %d values compared", compared, n)
	}
}
