package controller

import (
	"slices"
	"time"

	"github.com/weftmesh/weft/federation"
)

// The guard against expiring a mesh because of a fault at its centre: of
// clusters that fell silent within massWindow of each other, none expires
// where they are at least massClusters and massPerMille of all.
const (
	massWindow   = 30 * time.Second
	massClusters = 2
	massPerMille = 300
)

// thresholds are the durations of silence at which some policy in force
// changes its mind about a cluster.
type thresholds struct {
	all    []time.Duration // sorted, unique
	expire time.Duration   // the lowest at which some policy calls a cluster expired
}

func thresholdsOf(policies []federation.Policy) thresholds {
	t := thresholds{
		all:    []time.Duration{federation.DefaultSuspectAfter, federation.DefaultExpireAfter},
		expire: federation.DefaultExpireAfter,
	}
	for _, p := range policies {
		for _, d := range []time.Duration{p.Liveness.SuspectAfter, p.Liveness.ExpireAfter} {
			if d > 0 {
				t.all = append(t.all, d)
			}
		}
		if d := p.Liveness.ExpireAfter; d > 0 {
			t.expire = min(t.expire, d)
		}
	}
	slices.Sort(t.all)
	t.all = slices.Compact(t.all)
	return t
}

// passed is the largest threshold not above d; 0 where there is none.
func (t thresholds) passed(d time.Duration) time.Duration {
	i, found := slices.BinarySearch(t.all, d)
	if found {
		return t.all[i]
	}
	if i == 0 {
		return 0
	}
	return t.all[i-1]
}

// below is the largest threshold under which no policy calls a cluster expired.
func (t thresholds) below() time.Duration { return t.passed(t.expire - 1) }

// next is the first threshold above d, or 0.
func (t thresholds) next(d time.Duration) time.Duration {
	i, found := slices.BinarySearch(t.all, d)
	if found {
		i++
	}
	if i == len(t.all) {
		return 0
	}
	return t.all[i]
}

// silences decides what is to be stored of each silent cluster: the threshold
// that its silence has passed. since says when each silent cluster was heard
// last; members is the number of active clusters, silent or not. held are the
// clusters that the guard keeps from expiring, in no order. The times come from
// one monotonic clock.
func silences(now time.Time, since map[federation.ClusterID]time.Time, members int, t thresholds) (out map[federation.ClusterID]time.Duration, held []federation.ClusterID) {
	out = map[federation.ClusterID]time.Duration{}
	for c, at := range since {
		passed := t.passed(now.Sub(at))
		if passed >= t.expire {
			mates := 0
			for _, other := range since {
				if other.Sub(at).Abs() <= massWindow {
					mates++
				}
			}
			if mates >= massClusters && mates*1000 >= massPerMille*members {
				held = append(held, c)
				passed = t.below()
			}
		}
		if passed > 0 {
			out[c] = passed
		}
	}
	return out, held
}
