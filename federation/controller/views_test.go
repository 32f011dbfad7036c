package controller

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func testEntry(t testing.TB, r *federationv1.Record, a audience) *entry {
	e, err := newEntry(r, a)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func readinessRecord(c federation.ClusterID, service string, ready int) *federationv1.Record {
	return federationv1.ReadinessRecord(
		federation.ExportID{Cluster: c, Service: federation.ServiceID{Namespace: "shop", Name: service}},
		federation.Readiness{Ready: ready, Total: 9})
}

// read decodes what a stream would get.
func read(t testing.TB, frames []frame) []*federationv1.Update {
	var out []*federationv1.Update
	for _, f := range frames {
		var resp federationv1.SyncResponse
		if err := proto.Unmarshal(slices.Concat(f...), &resp); err != nil {
			t.Fatal(err)
		}
		out = append(out, resp.GetUpdate())
	}
	return out
}

func TestFrames(t *testing.T) {
	everyone := audience{everyone: true}
	a, b := readinessRecord("eu-1", "a", 1), readinessRecord("eu-1", "b", 2)
	u := update{
		revision: federation.Revision{Incarnation: "i", Number: 7},
		puts:     []*entry{testEntry(t, a, everyone), testEntry(t, b, everyone)},
		deletes:  []string{"drain/eu-1"},
		full:     true,
	}
	want := []*federationv1.Update{{
		Revision: &federationv1.Revision{Incarnation: "i", Number: 7},
		Puts:     []*federationv1.Record{a, b}, Deletes: []string{"drain/eu-1"}, Full: true,
	}}
	if diff := cmp.Diff(want, read(t, u.frames()), protocmp.Transform()); diff != "" {
		t.Errorf("one message (-want +got):\n%s", diff)
	}
	buffers, err := newCodec().Marshal(u.frames()[0])
	if err != nil {
		t.Fatal(err)
	}
	var resp federationv1.SyncResponse
	if err := newCodec().Unmarshal(buffers, &resp); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want[0], resp.GetUpdate(), protocmp.Transform()); diff != "" {
		t.Errorf("through the codec (-want +got):\n%s", diff)
	}
}

func TestAnUpdateOfManyRecordsIsCut(t *testing.T) {
	u := update{revision: federation.Revision{Incarnation: "i", Number: 7}, full: true}
	for i := range 40 {
		r := federationv1.FindingRecord("eu-1", federation.Finding{
			Code: "WEFT1000", Subject: federation.Ref{Kind: "export", Name: fmt.Sprint(i)}, Message: strings.Repeat("x", 100_000),
		})
		u.puts = append(u.puts, testEntry(t, r, audience{everyone: true}))
	}
	got := read(t, u.frames())
	if len(got) < 4 {
		t.Fatalf("%d messages for 4 MB", len(got))
	}
	puts := 0
	for i, m := range got {
		puts += len(m.Puts)
		if size := proto.Size(m); size > maxFrame+200_000 {
			t.Errorf("message %d has %d bytes", i, size)
		}
		if last := i == len(got)-1; (m.Revision != nil) != last || m.Full != last {
			t.Errorf("message %d of %d: revision %v, full %v; only the last may have them", i, len(got), m.Revision, m.Full)
		}
	}
	if puts != 40 {
		t.Errorf("%d records, want 40", puts)
	}
}

// model is what one agent would hold that did what it is told.
type model struct {
	stream *stream
	have   map[string]*federationv1.Record
}

func (m *model) take(t testing.TB, u update, whole []uint32) {
	for _, msg := range read(t, u.frames()) {
		if msg.Full {
			for key := range m.have {
				kept := slices.ContainsFunc(u.puts, func(e *entry) bool { return e.key == key })
				if slices.Contains(whole, federationv1.Bucket(key)) && !kept {
					delete(m.have, key)
				}
			}
		}
		for _, r := range msg.Puts {
			m.have[r.Key] = r
		}
		for _, key := range msg.Deletes {
			delete(m.have, key)
		}
	}
}

func (m *model) digest(t testing.TB) federationv1.Sums {
	var s federationv1.Sums
	for key, r := range m.have {
		v, err := r.Value()
		if err != nil {
			t.Fatal(err)
		}
		s.Add(key, v)
	}
	return s
}

// Whatever changes, in whatever order streams come, go and read, a stream that
// has read everything holds exactly what its cluster may see.
func TestStreamsHoldTheirClustersView(t *testing.T) {
	clusters := []federation.ClusterID{"eu-1", "eu-2", "us-1"}
	regions := map[federation.ClusterID]string{"eu-1": "eu", "eu-2": "eu", "us-1": "us"}
	audiences := []audience{
		{everyone: true},
		{owner: "eu-1"},
		{owner: "us-1"},
		{},
		{owner: "us-1", shared: true, visible: federation.Selector{Clusters: []federation.ClusterID{"eu-1"}}},
		{owner: "us-1", shared: true, visible: federation.Selector{Regions: []string{"eu"}}},
	}
	rapid.Check(t, func(rt *rapid.T) {
		v := newViews()
		truth := map[string]*federationv1.Record{}
		who := map[string]audience{}
		agents := map[federation.ClusterID]*model{}
		left := map[federation.ClusterID]*model{}
		rev := int64(1)
		v.apply(federation.Revision{Incarnation: "i", Number: rev}, nil)
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			c := rapid.SampledFrom(clusters).Draw(rt, "cluster")
			switch rapid.IntRange(0, 5).Draw(rt, "step") {
			case 0, 1: // put
				r := readinessRecord("us-1", rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "service"), rapid.IntRange(0, 9).Draw(rt, "ready"))
				a := rapid.SampledFrom(audiences).Draw(rt, "audience")
				rev++
				v.apply(federation.Revision{Incarnation: "i", Number: rev}, []change{{key: r.Key, entry: testEntry(t, r, a)}})
				truth[r.Key], who[r.Key] = r, a
			case 2: // delete
				key := readinessRecord("us-1", rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "service"), 0).Key
				rev++
				v.apply(federation.Revision{Incarnation: "i", Number: rev}, []change{{key: key}})
				delete(truth, key)
			case 3: // connect, with what it had
				if agents[c] != nil {
					continue
				}
				m := left[c]
				if m == nil {
					m = &model{have: map[string]*federationv1.Record{}}
				}
				s, differing, first := v.subscribe(c, regions[c], m.digest(t))
				m.stream = s
				m.take(t, first, differing)
				agents[c] = m
			case 4: // go
				if m := agents[c]; m != nil {
					v.unsubscribe(m.stream)
					delete(agents, c)
					left[c] = m
				}
			case 5: // read
				if m := agents[c]; m != nil {
					u, _ := v.next(m.stream)
					m.take(t, u, nil)
				}
			}
		}
		for c, m := range agents {
			u, _ := v.next(m.stream)
			m.take(t, u, nil)
			want := map[string]*federationv1.Record{}
			for key, r := range truth {
				if who[key].includes(c, regions[c]) {
					want[key] = r
				}
			}
			if diff := cmp.Diff(want, m.have, protocmp.Transform()); diff != "" {
				rt.Errorf("%s holds (-want +got):\n%s", c, diff)
			}
			if u, ok := v.next(m.stream); ok {
				rt.Errorf("%s: nothing happened, and it is sent %v", c, u)
			}
			if got := u.revision.Number; got != rev {
				rt.Errorf("%s is at revision %d, want %d", c, got, rev)
			}
		}
	})
}

func TestAChangeWakesOnlyWhomItConcerns(t *testing.T) {
	v := newViews()
	us, _, _ := v.subscribe("us-1", "us", federationv1.Sums{})
	eu, _, _ := v.subscribe("eu-1", "eu", federationv1.Sums{})
	r := readinessRecord("us-1", "a", 1)
	only := audience{owner: "us-1"}
	rev := federation.Revision{Incarnation: "i", Number: 5}
	v.apply(rev, []change{{key: r.Key, entry: testEntry(t, r, only)}})
	if len(us.wake) != 1 || len(eu.wake) != 0 {
		t.Errorf("woken: us %d, eu %d; want only us", len(us.wake), len(eu.wake))
	}
	u, ok := v.next(eu)
	if !ok || !u.empty() || u.revision != rev {
		t.Errorf("eu gets %v, %v; want progress to %v", u, ok, rev)
	}
	if _, ok := v.next(eu); ok {
		t.Error("progress is told twice")
	}
}

// The name of what a cluster was never allowed to see is not told by its going.
func TestADeleteTellsNothingOfWhatWasHidden(t *testing.T) {
	v := newViews()
	r := readinessRecord("us-1", "secret", 1)
	v.apply(federation.Revision{Incarnation: "i", Number: 1}, []change{{key: r.Key, entry: testEntry(t, r, audience{owner: "us-1"})}})
	eu, _, first := v.subscribe("eu-1", "eu", federationv1.Sums{})
	if len(first.puts) != 0 {
		t.Fatalf("eu-1 is sent %v", first.puts)
	}
	v.apply(federation.Revision{Incarnation: "i", Number: 2}, []change{{key: r.Key}})
	if u, _ := v.next(eu); len(u.deletes) != 0 {
		t.Errorf("eu-1 is told of %v", u.deletes)
	}
}

func TestNoFullMarkerWhileRecovering(t *testing.T) {
	v := newViews()
	v.setRecovering(true)
	s, _, first := v.subscribe("eu-1", "eu", federationv1.Sums{})
	if first.full {
		t.Fatal("the first update of a recovering store is marked full")
	}
	v.setRecovering(false)
	if len(s.wake) != 1 {
		t.Error("the end of the recovery wakes nobody")
	}
	if u, ok := v.next(s); !ok || !u.full {
		t.Errorf("after the recovery: %v, %v; want the full marker", u, ok)
	}
	if u, _ := v.next(s); u.full {
		t.Error("the marker comes twice")
	}
}

// A stream that does not read costs a map entry for each record, not for each
// revision.
func TestASlowStreamSkipsRevisions(t *testing.T) {
	v := newViews()
	s, _, _ := v.subscribe("eu-1", "eu", federationv1.Sums{})
	for i := range 1000 {
		r := readinessRecord("eu-2", "a", i%9)
		v.apply(federation.Revision{Incarnation: "i", Number: int64(i)}, []change{{key: r.Key, entry: testEntry(t, r, audience{everyone: true})}})
	}
	if got := slices.Collect(maps.Keys(s.pending)); len(got) != 1 {
		t.Errorf("%d changes are kept for it, want 1", len(got))
	}
	if u, _ := v.next(s); len(u.puts) != 1 || u.revision.Number != 999 {
		t.Errorf("it is sent %d records at revision %v", len(u.puts), u.revision)
	}
}

// What a change costs follows from whom it concerns, not from how many records
// and streams there are.
func BenchmarkChange(b *testing.B) {
	const clusters, records = 500, 20_000
	for _, bb := range []struct {
		name string
		to   audience
	}{
		{"OneCluster", audience{owner: "c0"}},
		{"TwoClusters", audience{owner: "c0", shared: true, visible: federation.Selector{Clusters: []federation.ClusterID{"c1"}}}},
		{"Everyone", audience{everyone: true}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			v := newViews()
			for i := range records {
				r := readinessRecord("c0", fmt.Sprintf("s%d", i), 1)
				v.put(testEntry(b, r, bb.to))
			}
			streams := make([]*stream, clusters)
			for i := range streams {
				streams[i], _, _ = v.subscribe(federation.ClusterID(fmt.Sprintf("c%d", i)), "eu", federationv1.Sums{})
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r := readinessRecord("c0", fmt.Sprintf("s%d", i%records), i)
				v.apply(federation.Revision{Incarnation: "i", Number: int64(i)}, []change{{key: r.Key, entry: testEntry(b, r, bb.to)}})
				for _, s := range streams {
					if len(s.wake) > 0 {
						<-s.wake
						v.next(s)
					}
				}
			}
		})
	}
}
