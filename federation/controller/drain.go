package controller

import (
	"time"

	"github.com/weftmesh/weft/federation"
)

// minDrainStep bounds how often a drain writes: a step is a change of the
// catalog.
const minDrainStep = 100 * time.Millisecond

// drainStep is how long one step of a drain over the given time takes: one per
// cent of it, but no less than minDrainStep.
func drainStep(over time.Duration) time.Duration { return max(over/100, minDrainStep) }

// ramp moves a cluster's share from one value to another at a constant pace.
// A leader makes one from what is stored and its own monotonic clock, so that a
// change of leaders neither jumps nor starts anew.
type ramp struct {
	began time.Time
	from  federation.PerMille
	to    federation.PerMille
	over  time.Duration // for all of 1000 per mille
}

// at is the share at a time, and whether the ramp has reached its end.
func (r ramp) at(now time.Time) (federation.PerMille, bool) {
	if r.over <= 0 || r.from == r.to {
		return r.to, true
	}
	moved := federation.PerMille(int64(federation.All) * int64(now.Sub(r.began)) / int64(r.over))
	if r.to < r.from {
		share := max(r.from-max(moved, 0), r.to)
		return share, share == r.to
	}
	share := min(r.from+max(moved, 0), r.to)
	return share, share == r.to
}
