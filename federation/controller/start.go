package controller

import (
	"context"
	"errors"
)

// Started is a controller that runs in this process.
type Started struct {
	*Controller
	cancel context.CancelFunc
	done   chan struct{}
	err    error // of Run; after done
}

// Start runs a controller and returns when it serves, or with the error that
// keeps it from doing so. It runs until Stop, whatever becomes of ctx.
func Start(ctx context.Context, cfg Config) (*Started, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Started{Controller: c, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		s.err = c.Run(inner)
	}()
	select {
	case <-c.serving:
		return s, nil
	case <-s.done:
		cancel()
		return nil, errors.Join(errors.New("the controller has stopped before it served"), s.err)
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), s.Ready(ctx), s.Stop())
	}
}

// Stop ends the controller in order and returns the error that it ended with.
func (s *Started) Stop() error {
	s.cancel()
	<-s.done
	return s.err
}

// Done is closed when the controller has ended, by Stop or by an error.
func (s *Started) Done() <-chan struct{} { return s.done }
