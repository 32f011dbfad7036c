package federation

import (
	"fmt"
	"iter"
	"strconv"
	"time"
)

// World is what a plan depends on beside the catalog, and changes often:
// readiness, silence, probes, drains. It is immutable: a change makes a new
// World that shares what did not change. The zero World and nil are empty:
// nothing is known to be ready.
type World struct {
	readiness pmap[ServiceID, readinessByCluster]
	silence   pmap[ClusterID, time.Duration]
	probes    pmap[ClusterID, Probe]
	drains    pmap[ClusterID, PerMille]
	sum       uint64 // of the hashes of all entries, mod 2^64
}

type readinessByCluster = pmap[ClusterID, Readiness]

func (w *World) clone() *World {
	if w == nil {
		return new(World)
	}
	c := *w
	return &c
}

// entryHash is what one entry adds to a world's sum.
func entryHash(kind string, name fmt.Stringer, values ...int64) uint64 {
	h := fnvOffset.add(kind).add(name.String())
	for _, v := range values {
		h = h.add(strconv.FormatInt(v, 10))
	}
	return h.sum()
}

// String is the cluster's name.
func (c ClusterID) String() string { return string(c) }

// MaxEndpoints is the highest number of endpoints of one export.
const MaxEndpoints = 1 << 24

// WithReadiness is w with the readiness of an export. Counts are brought into
// 0..MaxEndpoints, and no more than Total are ready.
func (w *World) WithReadiness(e ExportID, r Readiness) *World {
	r.Total = min(max(r.Total, 0), MaxEndpoints)
	r.Ready = min(max(r.Ready, 0), r.Total)
	if old, ok := w.Readiness(e); ok && old == r {
		return w
	}
	c := w.WithoutReadiness(e).clone()
	c.readiness = c.readiness.set(e.Service, c.readinessOf(e.Service).set(e.Cluster, r))
	c.sum += entryHash("ready", e, int64(r.Ready), int64(r.Total))
	return c
}

// WithoutReadiness is w without anything known of an export.
func (w *World) WithoutReadiness(e ExportID) *World {
	old, ok := w.Readiness(e)
	if !ok {
		return w
	}
	c := w.clone()
	if rest := c.readinessOf(e.Service).without(e.Cluster); rest.len() > 0 {
		c.readiness = c.readiness.set(e.Service, rest)
	} else {
		c.readiness = c.readiness.without(e.Service)
	}
	c.sum -= entryHash("ready", e, int64(old.Ready), int64(old.Total))
	return c
}

// WithSilence is w with a cluster's control link silent for d; 0 is heard.
func (w *World) WithSilence(id ClusterID, d time.Duration) *World {
	d = max(d, 0)
	old := w.Silence(id)
	if old == d {
		return w
	}
	c := w.clone()
	if old != 0 {
		c.silence = c.silence.without(id)
		c.sum -= entryHash("silence", id, int64(old))
	}
	if d != 0 {
		c.silence = c.silence.set(id, d)
		c.sum += entryHash("silence", id, int64(d))
	}
	return c
}

// WithProbe is w with what the caller's own gateways see of a cluster's.
func (w *World) WithProbe(id ClusterID, p Probe) *World {
	old := w.Probe(id)
	if old == p {
		return w
	}
	c := w.clone()
	if old != ProbeUnknown {
		c.probes = c.probes.without(id)
		c.sum -= entryHash("probe", id, int64(old))
	}
	if p != ProbeUnknown {
		c.probes = c.probes.set(id, p)
		c.sum += entryHash("probe", id, int64(p))
	}
	return c
}

// WithDrain is w with what a drain leaves of a cluster's share; All is no
// drain.
func (w *World) WithDrain(id ClusterID, remaining PerMille) *World {
	remaining = min(max(remaining, 0), All)
	old := w.Drain(id)
	if old == remaining {
		return w
	}
	c := w.clone()
	if old != All {
		c.drains = c.drains.without(id)
		c.sum -= entryHash("drain", id, int64(old))
	}
	if remaining != All {
		c.drains = c.drains.set(id, remaining)
		c.sum += entryHash("drain", id, int64(remaining))
	}
	return c
}

// Readiness of an export, and whether anything is known of it.
func (w *World) Readiness(e ExportID) (Readiness, bool) {
	return w.readinessOf(e.Service).get(e.Cluster)
}

// readinessOf is what is known of a service's exports.
func (w *World) readinessOf(s ServiceID) readinessByCluster {
	if w == nil {
		return readinessByCluster{}
	}
	r, _ := w.readiness.get(s)
	return r
}

// AllReadiness goes through everything known of exports, by service, then
// cluster.
func (w *World) AllReadiness() iter.Seq2[ExportID, Readiness] {
	return func(yield func(ExportID, Readiness) bool) {
		for s, clusters := range w.clone().readiness.all() {
			for c, r := range clusters.all() {
				if !yield(ExportID{c, s}, r) {
					return
				}
			}
		}
	}
}

// Silence of a cluster's control link; 0 is heard.
func (w *World) Silence(id ClusterID) time.Duration {
	if w == nil {
		return 0
	}
	d, _ := w.silence.get(id)
	return d
}

// Probe is what the caller's own gateways see of a cluster's.
func (w *World) Probe(id ClusterID) Probe {
	if w == nil {
		return ProbeUnknown
	}
	p, _ := w.probes.get(id)
	return p
}

// Drain is what a drain leaves of a cluster's share; All is no drain.
func (w *World) Drain(id ClusterID) PerMille {
	if w == nil {
		return All
	}
	if remaining, ok := w.drains.get(id); ok {
		return remaining
	}
	return All
}

// Digest is 16 hexadecimal digits that two worlds share if they hold the same;
// it does not depend on the way there.
func (w *World) Digest() string { return fmt.Sprintf("%016x", w.clone().sum) }
