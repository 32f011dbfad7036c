package identity

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/weftmesh/weft/federation"
)

// Denial refuses every identity under a cluster. The generation is that of the
// cluster's registration: it tells a denial that may be lifted from a newer
// one. A leaf does not carry its generation, so while any generation of a
// cluster is denied, all its identities are; that is why a name may be used
// again only after the longest old leaf has expired.
type Denial struct {
	Cluster    federation.ClusterID `json:"cluster"`
	Generation int64                `json:"generation"`
}

// DeniedError is why a verified peer was refused.
type DeniedError struct {
	Peer       Subject
	Generation int64 // the newest denied one
}

func (e *DeniedError) Error() string {
	return fmt.Sprintf("identity: %s is refused: cluster %s is denied (generation %d, deregistered or quarantined)", e.Peer.ID, e.Peer.Cluster, e.Generation)
}

// Denials is the live set of denials. The zero value is empty. Checks cost one
// map look-up and never wait; it is safe for concurrent use.
type Denials struct {
	mu  sync.Mutex // orders writers
	set atomic.Pointer[denialSet]
}

// denialSet is immutable. denied is never empty for a cluster in it.
type denialSet struct {
	revision uint64
	clusters map[federation.ClusterID][]int64 // sorted generations
	changed  chan struct{}                    // closed when this set is replaced
}

// Check is nil for an identity whose cluster is not denied (and for one under
// no cluster), else a *DeniedError.
func (d *Denials) Check(s Subject) error {
	set := d.set.Load()
	if set == nil || s.Cluster == "" {
		return nil
	}
	if generations := set.clusters[s.Cluster]; len(generations) > 0 {
		return &DeniedError{Peer: s, Generation: generations[len(generations)-1]}
	}
	return nil
}

// Deny adds denials; it reports whether any was new.
func (d *Denials) Deny(denials ...Denial) bool {
	return d.update(func(m map[federation.ClusterID][]int64) {
		for _, denial := range denials {
			at, found := slices.BinarySearch(m[denial.Cluster], denial.Generation)
			if !found {
				m[denial.Cluster] = slices.Insert(slices.Clone(m[denial.Cluster]), at, denial.Generation)
			}
		}
	})
}

// Lift removes the cluster's denials up to and including the generation; a
// newer denial stays. It reports whether anything was removed.
func (d *Denials) Lift(cluster federation.ClusterID, generation int64) bool {
	return d.update(func(m map[federation.ClusterID][]int64) {
		kept := slices.DeleteFunc(slices.Clone(m[cluster]), func(g int64) bool { return g <= generation })
		if len(kept) == 0 {
			delete(m, cluster)
		} else {
			m[cluster] = kept
		}
	})
}

// Replace makes the set hold exactly the given denials. Only a full set may
// replace one: an agent's denials are sticky until its controller says so.
func (d *Denials) Replace(denials []Denial) bool {
	return d.update(func(m map[federation.ClusterID][]int64) {
		clear(m)
		for _, denial := range denials {
			m[denial.Cluster] = append(m[denial.Cluster], denial.Generation)
		}
		for cluster, generations := range m {
			slices.Sort(generations)
			m[cluster] = slices.Compact(generations)
		}
	})
}

// All is the present set, sorted by cluster and generation.
func (d *Denials) All() []Denial {
	var all []Denial
	if set := d.set.Load(); set != nil {
		for cluster, generations := range set.clusters {
			for _, g := range generations {
				all = append(all, Denial{Cluster: cluster, Generation: g})
			}
		}
	}
	slices.SortFunc(all, func(a, b Denial) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Generation, b.Generation))
	})
	return all
}

// Revision grows by one with every change of the set.
func (d *Denials) Revision() uint64 {
	if set := d.set.Load(); set != nil {
		return set.revision
	}
	return 0
}

// Changed is closed at the next change: what keeps connections open takes it,
// checks its peers, and waits for it.
func (d *Denials) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.load().changed
}

// update applies a change to a copy and publishes it if it differs.
func (d *Denials) update(change func(map[federation.ClusterID][]int64)) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.load()
	clusters := maps.Clone(old.clusters)
	change(clusters)
	if maps.EqualFunc(old.clusters, clusters, slices.Equal) {
		return false
	}
	d.set.Store(&denialSet{revision: old.revision + 1, clusters: clusters, changed: make(chan struct{})})
	close(old.changed)
	return true
}

// load is the present set, made if there is none; mu is held.
func (d *Denials) load() *denialSet {
	set := d.set.Load()
	if set == nil {
		set = &denialSet{clusters: map[federation.ClusterID][]int64{}, changed: make(chan struct{})}
		d.set.Store(set)
	}
	return set
}
