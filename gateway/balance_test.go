package gateway

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/xds"
)

// planned is a cluster with one endpoint per locality unless said.
type planned struct {
	name         string
	tier, weight int
	endpoints    int
}

func clusterOf(parts ...planned) *xds.Cluster {
	c := &xds.Cluster{Ejection: ejection}
	for i, p := range parts {
		l := &xds.Locality{Cluster: federation.ClusterID(p.name), Priority: p.tier, Weight: p.weight}
		for j := range max(1, p.endpoints) {
			l.Endpoints = append(l.Endpoints, &xds.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), byte(j)}), 1)})
		}
		c.Localities = append(c.Localities, l)
	}
	return c
}

func (b *balancer) first() string {
	c := b.pick(newSearch())
	if c == nil {
		return ""
	}
	return string(c.locality.Cluster)
}

// order is the clusters in the order in which one connection would try them.
func (b *balancer) order() (names []string) {
	s := newSearch()
	for c := b.pick(s); c != nil; c = b.pick(s) {
		names = append(names, string(c.locality.Cluster))
	}
	return names
}

// TestWeightsAreExactInEveryWindow: whatever the weights, any run of as many
// connections as they add up to holds each locality exactly its weight times.
func TestWeightsAreExactInEveryWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		weights := rapid.SliceOfN(rapid.IntRange(1, 60), 1, 6).Draw(t, "weights")
		var parts []planned
		total := 0
		for i, w := range weights {
			parts = append(parts, planned{name: string(rune('a' + i)), weight: w, endpoints: 1 + i%3})
			total += w
		}
		b := newBalancer(clock.Real(), clusterOf(parts...))
		for range rapid.IntRange(0, total).Draw(t, "start") / total * total {
			b.first()
		}
		for range 3 {
			got := map[string]int{}
			for range total {
				got[b.first()]++
			}
			for _, p := range parts {
				if got[p.name] != p.weight {
					t.Fatalf("%s got %d of %d, want %d", p.name, got[p.name], total, p.weight)
				}
			}
		}
	})
}

// TestEveryCandidateIsTriedOnce, in the order of tiers.
func TestEveryCandidateIsTriedOnce(t *testing.T) {
	b := newBalancer(clock.Real(), clusterOf(
		planned{"a", 0, 900, 2}, planned{"b", 0, 100, 1}, planned{"c", 1, 1000, 1}, planned{"d", 2, 1000, 2}))
	got := b.order()
	if len(got) != 6 || got[3] != "c" || got[4] != "d" || got[5] != "d" {
		t.Errorf("order %v", got)
	}
	seen := map[string]int{}
	for _, n := range got[:3] {
		seen[n]++
	}
	if seen["a"] != 2 || seen["b"] != 1 {
		t.Errorf("first tier %v", got[:3])
	}
}

// TestUpdatesKeepTheTurn: sending the same weights again, or other endpoints,
// does not begin the round anew.
func TestUpdatesKeepTheTurn(t *testing.T) {
	b := newBalancer(clock.Real(), clusterOf(planned{name: "a", weight: 900}, planned{name: "b", weight: 100}))
	got := map[string]int{}
	for i := range 1000 {
		if i%7 == 0 {
			b.update(clusterOf(planned{name: "a", weight: 900, endpoints: 1 + i%3}, planned{name: "b", weight: 100}))
		}
		got[b.first()]++
	}
	if got["a"] != 900 || got["b"] != 100 {
		t.Errorf("%v", got)
	}
}

func TestLocalityWithoutWeightGetsNothing(t *testing.T) {
	b := newBalancer(clock.Real(), clusterOf(planned{name: "a", weight: 10}, planned{name: "b"}))
	for range 20 {
		if got := b.first(); got != "a" {
			t.Fatalf("got %q", got)
		}
	}
	if got := newBalancer(clock.Real(), clusterOf(planned{name: "own"})).first(); got != "own" {
		t.Errorf("a cluster without any weights: %q", got)
	}
	if got := newBalancer(clock.Real(), clusterOf()).first(); got != "" {
		t.Errorf("a cluster without endpoints: %q", got)
	}
}

// TestEjection in its whole course: three failures, longer each time, one
// failure is enough for one that is just back, and never so that nobody is left.
func TestEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBalancer(clock.Real(), clusterOf(planned{name: "a", weight: 1000}, planned{name: "b", tier: 1, weight: 1000}))
		// failures of a, one after the other; only the last may set it aside.
		fail := func(times int, ejected bool) {
			t.Helper()
			for i := range times {
				c := b.pick(newSearch())
				if c.locality.Cluster != "a" {
					t.Fatalf("got %s, want a", c.locality.Cluster)
				}
				if got, want := b.failed(c), ejected && i == times-1; got != want {
					t.Fatalf("failure %d of %d: set aside is %v, want %v", i+1, times, got, want)
				}
			}
		}
		aside := func(d time.Duration) {
			t.Helper()
			time.Sleep(d - time.Millisecond)
			if got := b.first(); got != "b" {
				t.Fatalf("%v after the ejection: %s", d-time.Millisecond, got)
			}
			time.Sleep(time.Millisecond)
			if got := b.first(); got != "a" {
				t.Fatalf("%v after the ejection: %s", d, got)
			}
		}
		fail(2, false)
		b.connected(b.pick(newSearch())) // not in a row
		fail(3, true)
		if order := b.order(); len(order) != 2 || order[0] != "b" || order[1] != "a" {
			t.Errorf("order %v: who is set aside comes last, but comes", order)
		}
		aside(5 * time.Second)
		for _, d := range []time.Duration{10, 15, 20, 25, 30, 30} {
			fail(1, true) // it was just back
			aside(d * time.Second)
		}
		b.connected(b.pick(newSearch()))
		fail(3, true)           // it had proved itself
		aside(30 * time.Second) // its past is not forgotten so soon
		b.connected(b.pick(newSearch()))
		time.Sleep(31 * time.Second)
		b.connected(b.pick(newSearch()))
		fail(3, true) // a fresh start
		aside(5 * time.Second)
	})
}

// TestBreaksCountApart: a backend that takes each connection and breaks it is
// set aside, though every connection to it succeeds.
func TestBreaksCountApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBalancer(clock.Real(), clusterOf(planned{name: "a", weight: 1000}, planned{name: "b", tier: 1, weight: 1000}))
		for i := range 3 {
			c := b.pick(newSearch())
			b.connected(c)
			if ejected := b.broke(c); ejected != (i == 2) {
				t.Fatalf("break %d: set aside is %v", i+1, ejected)
			}
		}
		time.Sleep(5 * time.Second)
		c := b.pick(newSearch())
		b.connected(c)
		if !b.broke(c) {
			t.Error("it broke again, and was not set aside")
		}
		time.Sleep(10 * time.Second)
		c = b.pick(newSearch())
		b.connected(c)
		b.served(c)
		if b.broke(c) {
			t.Error("it has served since")
		}
	})
}

// TestSilentGatewayLeadsToItsSister, and one that refuses to another cluster.
func TestSilentGatewayLeadsToItsSister(t *testing.T) {
	b := newBalancer(clock.Real(), clusterOf(planned{"a", 0, 100, 2}, planned{"b", 0, 900, 2}))
	for range 10 {
		s := newSearch()
		c := b.pick(s)
		s.stay = c.locality
		if next := b.pick(s); next.locality != c.locality || next == c {
			t.Fatalf("after a silent gateway of %s: %s", c.locality.Cluster, next.locality.Cluster)
		}
		s = newSearch()
		c = b.pick(s)
		s.refused[c.locality] = true
		if next := b.pick(s); next.locality == c.locality {
			t.Fatalf("after a refusal of %s: the same", c.locality.Cluster)
		}
	}
}
