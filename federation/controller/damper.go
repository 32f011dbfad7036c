package controller

import (
	"slices"
	"time"

	"github.com/weftmesh/weft/federation"
)

// dampFor is how long a change of readiness that nobody needs at once may wait,
// from the write before it.
const dampFor = time.Second

// damper holds readiness back that would be written too often. A change that
// takes an export to or from zero ready endpoints, or across a threshold of a
// policy, is let through at once; the rest at most once in dampFor for each
// export. It has no clock of its own.
type damper struct {
	written map[federation.ExportID]wrote
	held    map[federation.ExportID]heldReadiness
}

type wrote struct {
	value federation.Readiness
	at    time.Time
}

type heldReadiness struct {
	value federation.Readiness
	due   time.Time
}

func newDamper() *damper {
	return &damper{written: map[federation.ExportID]wrote{}, held: map[federation.ExportID]heldReadiness{}}
}

// offer takes a reported readiness: true means write it now. thresholds are the
// ready fractions (per mille) at which a policy in force changes its mind.
func (d *damper) offer(e federation.ExportID, r federation.Readiness, now time.Time, thresholds []federation.PerMille) bool {
	last, known := d.written[e]
	if !known || crosses(last.value, r, thresholds) || !now.Before(last.at.Add(dampFor)) {
		d.wrote(e, r, now)
		return true
	}
	if r == last.value {
		delete(d.held, e) // it came back before it was written
		return false
	}
	d.held[e] = heldReadiness{value: r, due: last.at.Add(dampFor)}
	return false
}

// wrote notes that a readiness goes out now.
func (d *damper) wrote(e federation.ExportID, r federation.Readiness, now time.Time) {
	d.written[e] = wrote{value: r, at: now}
	delete(d.held, e)
}

// forget drops an export.
func (d *damper) forget(e federation.ExportID) {
	delete(d.written, e)
	delete(d.held, e)
}

// due takes out what is to be written by now.
func (d *damper) due(now time.Time) map[federation.ExportID]federation.Readiness {
	out := map[federation.ExportID]federation.Readiness{}
	for e, h := range d.held {
		if !now.Before(h.due) {
			out[e] = h.value
			d.wrote(e, h.value, now)
		}
	}
	return out
}

// next is when something will be due; false where nothing is held.
func (d *damper) next() (at time.Time, ok bool) {
	for _, h := range d.held {
		if !ok || h.due.Before(at) {
			at, ok = h.due, true
		}
	}
	return at, ok
}

// crosses reports whether a change of readiness matters at once.
func crosses(old, now federation.Readiness, thresholds []federation.PerMille) bool {
	if old == now {
		return false
	}
	if (old.Ready == 0) != (now.Ready == 0) || (old.Total == 0) != (now.Total == 0) {
		return true
	}
	return slices.ContainsFunc(thresholds, func(t federation.PerMille) bool {
		return below(old, t) != below(now, t)
	})
}

func below(r federation.Readiness, t federation.PerMille) bool { return r.Ready*1000 < int(t)*r.Total }
