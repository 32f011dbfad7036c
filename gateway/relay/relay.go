package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/federation/clock"
)

// Conn is a connection with two ends that close apart: a *net.TCPConn, a
// *tls.Conn, a tunnel's stream.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// What a Conn may offer beside.
type (
	aborter   interface{ Abort() }                   // ends both directions; the peer sees a reset
	contexted interface{ Context() context.Context } // ends when the connection breaks
	counted   interface {                            // content so far
		BytesIn() uint64
		BytesOut() uint64
	}
)

// Reason is why a relay ended.
type Reason int

// The side that closed is the one whose end of data came first, when both came
// to a proper end. Reset means that the side broke the connection off, lost that
// it fell silent or the network gave it up.
const (
	ClientClosed Reason = iota + 1
	BackendClosed
	ClientReset
	BackendReset
	ClientLost
	BackendLost
	Idle
	Deadline
	Cancelled
)

func (r Reason) String() string {
	switch r {
	case ClientClosed:
		return "client closed"
	case BackendClosed:
		return "backend closed"
	case ClientReset:
		return "client reset"
	case BackendReset:
		return "backend reset"
	case ClientLost:
		return "client lost"
	case BackendLost:
		return "backend lost"
	case Idle:
		return "idle"
	case Deadline:
		return "deadline"
	case Cancelled:
		return "cancelled"
	}
	return fmt.Sprintf("Reason(%d)", int(r))
}

// Result is the account of a relay that has ended.
type Result struct {
	ToBackend, ToClient int64 // bytes written
	Reason              Reason
	Err                 error // what broke it; nil when both directions ended properly
}

// Relay joins connections. The zero value is not usable: use New.
type Relay struct {
	clock clock.Clock
	pool  *pool
}

// New makes a relay whose buffers and pipes are shared by all that it carries.
// Close it when nothing runs any more.
func New(c clock.Clock) *Relay { return &Relay{clock: c, pool: newPool()} }

// Close releases the pipes that wait for use.
func (r *Relay) Close() { r.pool.close() }

// Options of one relay.
type Options struct {
	// Prefix are bytes that were read from the client already; they go first.
	Prefix []byte
	// Idle ends the relay when no byte has moved for that long; 0 means never.
	Idle time.Duration
}

// Join carries bytes both ways until both directions have ended, either side
// breaks, or ctx ends. It takes over both connections and has closed them when
// it returns.
func (r *Relay) Join(ctx context.Context, client, backend Conn, o Options) Result {
	j := &join{relay: r, client: client, backend: backend}
	stop := context.AfterFunc(ctx, func() {
		reason := Cancelled
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			reason = Deadline
		}
		j.abort(reason, context.Cause(ctx))
	})
	defer stop()
	for _, side := range []struct {
		c      Conn
		reason Reason
	}{{client, ClientReset}, {backend, BackendReset}} {
		if c, ok := side.c.(contexted); ok {
			broken := c.Context()
			unwatch := context.AfterFunc(broken, func() { j.fail(side.reason, context.Cause(broken)) })
			defer unwatch()
		}
	}
	if o.Idle > 0 {
		ended := make(chan struct{})
		var watching sync.WaitGroup
		watching.Go(func() { j.watchIdle(o.Idle, ended) })
		defer watching.Wait()
		defer close(ended)
	}

	up := &direction{j: j, src: client, dst: backend, closed: ClientClosed, srcReset: ClientReset, dstReset: BackendReset}
	down := &direction{j: j, src: backend, dst: client, closed: BackendClosed, srcReset: BackendReset, dstReset: ClientReset}
	up.other, down.other = down, up
	var other sync.WaitGroup
	other.Go(down.run)
	if up.send(o.Prefix) {
		up.run()
	}
	other.Wait()
	reason, err := j.close()
	return Result{ToBackend: up.sent.Load(), ToClient: down.sent.Load(), Reason: reason, Err: err}
}

// join is one relay under way.
type join struct {
	relay           *Relay
	client, backend Conn

	moved  atomic.Uint64 // bytes, either way, that the loops here have seen
	once   sync.Once
	mu     sync.Mutex
	reason Reason
	err    error
	broken bool
}

// abort breaks both connections off for the first reason given. When one came
// to its proper end before, that is only the reason of the half.
func (j *join) abort(reason Reason, err error) {
	j.mu.Lock()
	if j.broken {
		j.mu.Unlock()
		return
	}
	j.broken, j.reason, j.err = true, reason, err
	j.mu.Unlock()
	j.once.Do(func() {
		abort(j.client)
		abort(j.backend)
	})
}

// fail is abort because a side broke.
func (j *join) fail(reason Reason, err error) {
	var told interface{ Lost() bool }
	silent := errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH)
	if silent || (errors.As(err, &told) && told.Lost()) {
		switch reason {
		case ClientReset:
			reason = ClientLost
		case BackendReset:
			reason = BackendLost
		}
	}
	j.abort(reason, err)
}

// ended notes the proper end of a direction; the first names the reason.
func (j *join) ended(reason Reason) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.reason == 0 {
		j.reason = reason
	}
}

// close ends the join; what happens later is no reason any more.
func (j *join) close() (Reason, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.broken = true
	j.once.Do(func() {
		j.client.Close()
		j.backend.Close()
	})
	return j.reason, j.err
}

func abort(c Conn) {
	if a, ok := c.(aborter); ok {
		a.Abort()
		return
	}
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // close sends RST
	}
	c.Close()
}

// watchIdle ends the relay when its counters stand still.
func (j *join) watchIdle(idle time.Duration, ended <-chan struct{}) {
	moved := func() uint64 {
		return j.moved.Load() + counts(j.client) + counts(j.backend)
	}
	last := moved()
	timer := j.relay.clock.NewTimer(idle)
	defer timer.Stop()
	for {
		select {
		case <-ended:
			return
		case <-timer.C():
		}
		now := moved()
		if now == last {
			j.abort(Idle, fmt.Errorf("no byte in %v", idle))
			return
		}
		last = now
		timer.Reset(idle)
	}
}

func counts(c Conn) uint64 {
	if n, ok := c.(counted); ok {
		return n.BytesIn() + n.BytesOut()
	}
	return 0
}
