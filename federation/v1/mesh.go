package federationv1

import (
	"time"

	"github.com/weftmesh/weft/federation"
)

// Mesh is what records say to the core: a catalog and a world. Records of
// other kinds (addresses, denials, the bundle) are for their readers to keep.
// The zero Mesh is empty; a Mesh is never changed, Apply makes the next.
type Mesh struct {
	Catalog *federation.Catalog
	World   *federation.World
}

// Apply is the mesh at revision rev after records were put and the records
// under some keys deleted. A record that is wrong is left out, with an error,
// and what was there under its key stays; the others count. Facts has every
// record that was good.
func (m Mesh) Apply(rev federation.Revision, puts []*Record, deletes []string) (next Mesh, facts []Fact, errs []error) {
	next = m
	var events []federation.Event
	for _, key := range deletes {
		k, err := ParseKey(key)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if e := k.deletion(); e != nil {
			events = append(events, e)
		}
		next.World = k.forget(next.World)
	}
	for _, r := range puts {
		f, err := r.Decode()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		facts = append(facts, f)
		switch b := f.Body.(type) {
		case federation.Member:
			events = append(events, federation.PutMember{Member: b})
		case federation.Export:
			events = append(events, federation.PutExport{Export: b})
		case federation.Policy:
			events = append(events, federation.PutPolicy{Policy: b})
		case federation.Readiness:
			next.World = next.World.WithReadiness(f.Key.Export(), b)
		case federation.Drain:
			next.World = next.World.WithDrain(f.Key.Cluster, b.Remaining)
		case time.Duration:
			next.World = next.World.WithSilence(f.Key.Cluster, b)
		}
	}
	next.Catalog = m.Catalog.Apply(rev, events...)
	return next, facts, errs
}

// deletion is what the end of a record is to the catalog, or nil.
func (k Key) deletion() federation.Event {
	switch k.Kind {
	case KindMember:
		return federation.DeleteMember{Cluster: k.Cluster}
	case KindExport:
		return federation.DeleteExport{Export: k.Export()}
	case KindPolicy:
		return federation.DeletePolicy{Policy: k.Policy}
	default:
		return nil
	}
}

// forget is a world without what a record said.
func (k Key) forget(w *federation.World) *federation.World {
	switch k.Kind {
	case KindReadiness:
		return w.WithoutReadiness(k.Export())
	case KindDrain:
		return w.WithDrain(k.Cluster, federation.All)
	case KindSilence:
		return w.WithSilence(k.Cluster, 0)
	default:
		return w
	}
}
