package clock_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftmesh/weft/federation/clock"
)

func TestScaledClockRunsFasterAndFromItsOffset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		c := clock.Scaled(3600, -5*time.Minute)
		if got := c.Now().Sub(began); got != -5*time.Minute {
			t.Fatalf("offset: got %v", got)
		}
		timer := c.NewTimer(time.Hour)
		<-timer.C()
		if got := time.Since(began); got != time.Second {
			t.Errorf("an hour took %v of the machine's time, want 1s", got)
		}
		if got := c.Now().Sub(began); got != 55*time.Minute {
			t.Errorf("after an hour the clock shows %v, want 55m", got)
		}
		timer.Reset(2 * time.Hour)
		<-timer.C()
		if got := time.Since(began); got != 3*time.Second {
			t.Errorf("the reset timer fired after %v, want 3s", got)
		}
	})
}

func TestSleepEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := clock.Sleep(ctx, clock.Real(), time.Hour); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := clock.Sleep(t.Context(), clock.Real(), time.Minute); err != nil {
			t.Errorf("got %v", err)
		}
	})
}
