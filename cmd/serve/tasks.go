package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// runTasks starts all tasks, waits until ctx ends, all of them are done, or
// one fails, and stops them from the last to the first: each ends before the
// one above it is told to. All of it may take the time drain; what still runs
// then is named and left.
func runTasks(ctx context.Context, tasks []Task, drain time.Duration, ready *Ready, notify func(string), log *slog.Logger) error {
	type running struct {
		name   string
		cancel context.CancelFunc
		done   chan struct{}
	}
	ended := make(chan error, len(tasks)) // room for every task: none blocks on its way out
	list := make([]running, len(tasks))
	for i, t := range tasks {
		// Not a child of ctx: a task hears of the end when its turn comes.
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		list[i] = running{name: t.Name, cancel: cancel, done: make(chan struct{})}
		go func() {
			err := t.Run(own)
			if err != nil && own.Err() != nil && errors.Is(err, own.Err()) {
				err = nil
			}
			if err != nil {
				err = fmt.Errorf("%s: %w", t.Name, err)
			}
			ended <- err
			close(list[i].done)
		}()
	}
	notify("READY=1")

	var errs []error
	left := len(tasks)
	take := func(err error) {
		left--
		if err != nil {
			errs = append(errs, err)
			log.Error("a task failed", "error", err)
		}
	}
	for waiting := true; waiting && left > 0 && len(errs) == 0; {
		select {
		case err := <-ended:
			take(err)
		case <-ctx.Done():
			waiting = false
		}
	}

	ready.drain()
	notify("STOPPING=1")
	deadline := time.NewTimer(drain)
	defer deadline.Stop()
	var stuck []string
	for _, l := range slices.Backward(list) {
		l.cancel()
		if len(stuck) > 0 {
			select {
			case <-l.done:
			default:
				stuck = append(stuck, l.name)
			}
			continue
		}
		select {
		case <-l.done:
		case <-deadline.C:
			stuck = append(stuck, l.name)
		}
	}
	for left > 0 {
		select {
		case err := <-ended:
			take(err)
			continue
		default:
		}
		break
	}
	if len(stuck) > 0 {
		errs = append(errs, fmt.Errorf("not stopped after %v: %s; --drain-timeout gives more time", drain, strings.Join(stuck, ", ")))
	}
	return errors.Join(errs...)
}
