package controller

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/weftmesh/weft/federation"
)

func TestSilences(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	strict := thresholdsOf([]federation.Policy{{Liveness: federation.LivenessRule{SuspectAfter: 3 * time.Second, ExpireAfter: 5 * time.Second}}})
	for _, tt := range []struct {
		name       string
		since      map[federation.ClusterID]time.Time
		members    int
		thresholds thresholds
		want       map[federation.ClusterID]time.Duration
		held       []federation.ClusterID
	}{
		{name: "nobody is silent", members: 3},
		{
			name: "not yet", members: 3,
			since: map[federation.ClusterID]time.Time{"a": ago(9 * time.Second)},
		},
		{
			name: "suspect", members: 3,
			since: map[federation.ClusterID]time.Time{"a": ago(10 * time.Second)},
			want:  map[federation.ClusterID]time.Duration{"a": 10 * time.Second},
		},
		{
			name: "one of two expires", members: 2,
			since: map[federation.ClusterID]time.Time{"a": ago(2 * time.Minute)},
			want:  map[federation.ClusterID]time.Duration{"a": time.Minute},
		},
		{
			name: "two of six at once do not", members: 6,
			since: map[federation.ClusterID]time.Time{"a": ago(2 * time.Minute), "b": ago(110 * time.Second)},
			want:  map[federation.ClusterID]time.Duration{"a": 10 * time.Second, "b": 10 * time.Second},
			held:  []federation.ClusterID{"a", "b"},
		},
		{
			name: "two of seven at once are few", members: 7,
			since: map[federation.ClusterID]time.Time{"a": ago(2 * time.Minute), "b": ago(110 * time.Second)},
			want:  map[federation.ClusterID]time.Duration{"a": time.Minute, "b": time.Minute},
		},
		{
			name: "one after the other expire", members: 3,
			since: map[federation.ClusterID]time.Time{"a": ago(2 * time.Hour), "b": ago(2 * time.Minute)},
			want:  map[federation.ClusterID]time.Duration{"a": time.Minute, "b": time.Minute},
		},
		{
			name: "a policy's thresholds count", members: 3, thresholds: strict,
			since: map[federation.ClusterID]time.Time{"a": ago(4 * time.Second), "b": ago(40 * time.Second)},
			want:  map[federation.ClusterID]time.Duration{"a": 3 * time.Second, "b": 10 * time.Second},
		},
		{
			name: "and are held at the lowest that expires", members: 3, thresholds: strict,
			since: map[federation.ClusterID]time.Time{"a": ago(time.Minute), "b": ago(time.Minute)},
			want:  map[federation.ClusterID]time.Duration{"a": 3 * time.Second, "b": 3 * time.Second},
			held:  []federation.ClusterID{"a", "b"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.thresholds.all == nil {
				tt.thresholds = thresholdsOf(nil)
			}
			got, held := silences(now, tt.since, tt.members, tt.thresholds)
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("silences (-want +got):\n%s", diff)
			}
			slices.Sort(held)
			if diff := cmp.Diff(tt.held, held, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("held (-want +got):\n%s", diff)
			}
		})
	}
}

// However a mesh falls silent, no majority of it that fell silent within the
// window expires.
func TestAMeshThatFallsSilentAtOnceExpiresNobody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		members := rapid.IntRange(2, 20).Draw(t, "members")
		silent := rapid.IntRange(2, members).Draw(t, "silent")
		now := time.Now()
		since := map[federation.ClusterID]time.Time{}
		for i := range silent {
			since[federation.ClusterID(rune('a'+i))] = now.Add(-time.Hour + time.Duration(rapid.IntRange(0, 30_000).Draw(t, "ms"))*time.Millisecond)
		}
		out, _ := silences(now, since, members, thresholdsOf(nil))
		expired := 0
		for _, d := range out {
			if d >= federation.DefaultExpireAfter {
				expired++
			}
		}
		if silent*1000 >= massPerMille*members && expired > 0 {
			t.Errorf("%d of %d fell silent at once, %d expired", silent, members, expired)
		}
		if silent*1000 < massPerMille*members && expired != silent {
			t.Errorf("%d of %d fell silent, only %d expired", silent, members, expired)
		}
	})
}

func TestThresholdsNext(t *testing.T) {
	th := thresholdsOf(nil)
	for d, want := range map[time.Duration]time.Duration{
		0: 10 * time.Second, 10 * time.Second: time.Minute, 11 * time.Second: time.Minute, time.Minute: 0, time.Hour: 0,
	} {
		if got := th.next(d); got != want {
			t.Errorf("after %v: %v, want %v", d, got, want)
		}
	}
}

func TestRamp(t *testing.T) {
	began := time.Now()
	down := ramp{began: began, from: 1000, to: 0, over: 10 * time.Second}
	up := ramp{began: began, from: 250, to: 1000, over: 10 * time.Second}
	resumed := ramp{began: began, from: 400, to: 0, over: 10 * time.Second}
	for _, tt := range []struct {
		name  string
		r     ramp
		after time.Duration
		want  federation.PerMille
		done  bool
	}{
		{"starts with all", down, 0, 1000, false},
		{"is linear", down, 2500 * time.Millisecond, 750, false},
		{"ends at its end", down, 10 * time.Second, 0, true},
		{"stays there", down, time.Hour, 0, true},
		{"goes on where another leader stopped", resumed, time.Second, 300, false},
		{"and ends sooner", resumed, 4 * time.Second, 0, true},
		{"rises", up, 5 * time.Second, 750, false},
		{"to all", up, 8 * time.Second, 1000, true},
		{"no backwards", down, -time.Second, 1000, false},
		{"at once", ramp{began: began, from: 1000, to: 0}, 0, 0, true},
	} {
		if got, done := tt.r.at(began.Add(tt.after)); got != tt.want || done != tt.done {
			t.Errorf("%s: %v, %v; want %v, %v", tt.name, got, done, tt.want, tt.done)
		}
	}
	if got := drainStep(time.Second); got != 100*time.Millisecond {
		t.Errorf("a drain of 1 s steps every %v", got)
	}
	if got := drainStep(100 * time.Second); got != time.Second {
		t.Errorf("a drain of 100 s steps every %v", got)
	}
}

func TestChooseVIP(t *testing.T) {
	for _, tt := range []struct {
		prefix string
		size   int
	}{
		{"240.0.1.0/29", 6}, {"10.0.0.8/31", 2}, {"10.0.0.8/32", 1}, {"fd00::/125", 6},
	} {
		prefix := netip.MustParsePrefix(tt.prefix)
		taken := map[netip.Addr]bool{}
		for i := range tt.size {
			s := federation.ServiceID{Namespace: "shop", Name: string(rune('a' + i))}
			addr, err := chooseVIP(prefix, s, func(a netip.Addr) bool { return taken[a] })
			if err != nil {
				t.Fatalf("%s: address %d: %v", tt.prefix, i, err)
			}
			if !prefix.Contains(addr) || taken[addr] {
				t.Errorf("%s: gave %v", tt.prefix, addr)
			}
			if tt.size > 2 && (addr == prefix.Addr() || prefix.Addr().Is4() && !prefix.Contains(addr.Next())) {
				t.Errorf("%s: gave the network's or broadcast address %v", tt.prefix, addr)
			}
			taken[addr] = true
		}
		if addr, err := chooseVIP(prefix, federation.ServiceID{Namespace: "shop", Name: "late"}, func(a netip.Addr) bool { return taken[a] }); err == nil {
			t.Errorf("%s: gave %v though all are taken", tt.prefix, addr)
		}
	}
	prefix := netip.MustParsePrefix("240.0.0.0/16")
	s := federation.ServiceID{Namespace: "shop", Name: "payments"}
	none := func(netip.Addr) bool { return false }
	a, _ := chooseVIP(prefix, s, none)
	b, _ := chooseVIP(prefix, s, none)
	if a != b {
		t.Errorf("one service, two addresses: %v, %v", a, b)
	}
}

func TestDamper(t *testing.T) {
	e := federation.ExportID{Cluster: "eu-1", Service: federation.ServiceID{Namespace: "shop", Name: "payments"}}
	r := func(ready int) federation.Readiness { return federation.Readiness{Ready: ready, Total: 10} }
	thresholds := []federation.PerMille{500}
	now := time.Now()
	at := func(ms int) time.Time { return now.Add(time.Duration(ms) * time.Millisecond) }
	d := newDamper()
	for _, step := range []struct {
		name  string
		ms    int
		ready int
		want  bool
	}{
		{"the first is written", 0, 10, true},
		{"a small change waits", 100, 9, false},
		{"and so does the next", 200, 8, false},
		{"across a threshold is written", 300, 4, true},
		{"to zero is written", 310, 0, true},
		{"from zero is written", 320, 1, true},
		{"a small change waits again", 330, 2, false},
	} {
		if got := d.offer(e, r(step.ready), at(step.ms), thresholds); got != step.want {
			t.Errorf("%s: %v", step.name, got)
		}
	}
	if due, ok := d.next(); !ok || !due.Equal(at(1320)) {
		t.Errorf("due at %v, %v; want one second after the last write", due.Sub(now), ok)
	}
	if got := d.due(at(1319)); len(got) != 0 {
		t.Errorf("too early: %v", got)
	}
	if got := d.due(at(1320)); got[e] != r(2) {
		t.Errorf("due: %v, want the last one", got)
	}
	d.offer(e, r(3), at(1400), thresholds)
	d.offer(e, r(2), at(1500), thresholds)
	if _, ok := d.next(); ok {
		t.Error("a change that was taken back is still to be written")
	}
	if !d.offer(e, r(3), at(2321), thresholds) {
		t.Error("a change after a quiet second waits")
	}
}
