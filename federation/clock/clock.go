// Package clock is the one source of time: everything in Weft that waits or
// compares times, TLS included, takes a Clock, so that tests can run whole
// certificate lifetimes in seconds and give one process a wrong time.
package clock

import (
	"context"
	"time"
)

// Clock tells the time and waits. Implementations are safe for concurrent use.
type Clock interface {
	// Now is the present, with a monotonic reading where the clock has one.
	Now() time.Time
	// NewTimer fires once, d of this clock's time from now; at once if d <= 0.
	NewTimer(d time.Duration) Timer
}

// Timer is one pending wake-up. Its channel has room for the one value it gets.
type Timer interface {
	C() <-chan time.Time
	// Stop reports whether it prevented the timer from firing.
	Stop() bool
	// Reset arms the timer anew, d of its clock's time from now. As with
	// time.Timer, a value of an earlier arming is never received afterwards.
	Reset(d time.Duration) bool
}

// Real is the machine's own clock.
func Real() Clock { return real{} }

// Scaled runs factor times as fast as the machine's clock, starting offset
// away from the machine's present time. It exists for tests: factor 3600 makes
// an hour pass in a second, and an offset makes a process that is wrong about
// the time. factor must be positive.
func Scaled(factor float64, offset time.Duration) Clock {
	if factor <= 0 {
		panic("clock: factor must be positive")
	}
	now := time.Now()
	return scaled{origin: now, start: now.Add(offset), factor: factor}
}

// Sleep waits for d of c's time, or until ctx ends, and returns ctx's error
// in that case.
func Sleep(ctx context.Context, c Clock, d time.Duration) error {
	t := c.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Since is the time on c that has passed since t.
func Since(c Clock, t time.Time) time.Duration { return c.Now().Sub(t) }

type real struct{}

func (real) Now() time.Time                 { return time.Now() }
func (real) NewTimer(d time.Duration) Timer { return realTimer{time.NewTimer(d)} }

type realTimer struct{ *time.Timer }

func (t realTimer) C() <-chan time.Time { return t.Timer.C }

type scaled struct {
	origin, start time.Time
	factor        float64
}

func (s scaled) Now() time.Time {
	passed := time.Since(s.origin)
	return s.start.Add(time.Duration(float64(passed) * s.factor))
}

func (s scaled) NewTimer(d time.Duration) Timer {
	return scaledTimer{Timer: time.NewTimer(s.wall(d)), clock: s}
}

// wall is how long the machine's clock runs while d passes here.
func (s scaled) wall(d time.Duration) time.Duration {
	return time.Duration(float64(d) / s.factor)
}

type scaledTimer struct {
	*time.Timer
	clock scaled
}

func (t scaledTimer) C() <-chan time.Time        { return t.Timer.C }
func (t scaledTimer) Reset(d time.Duration) bool { return t.Timer.Reset(t.clock.wall(d)) }
