package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/weftmesh/weft/federation/clock"
)

// Bounds of health checking.
const (
	// checksAtOnce bounds how many checks wait for an answer at the same time.
	checksAtOnce = 128
	// checkHeadLimit bounds what an HTTP check reads of an answer, in bytes.
	checkHeadLimit = 64 << 10
)

// check says how one endpoint is asked whether it can serve.
type check struct {
	http           bool          // else a TCP connection that is accepted is enough
	address        string        // HOST:PORT to connect to
	path           string        // HTTP only
	interval       time.Duration // between two checks, spread by a tenth to either side
	timeout        time.Duration // of one check
	unhealthyAfter int           // failures in a row until a ready endpoint is not
	healthyAfter   int           // successes in a row until an endpoint that failed is ready again
}

// health is what the checks of one endpoint have shown.
type health uint8

const (
	// healthUnknown: its first check has not ended yet.
	healthUnknown health = iota
	healthReady
	healthFailing
)

func (h health) String() string {
	return [...]string{"unknown", "ready", "failing"}[h]
}

// checker runs one active check per endpoint, with a bound on how many run at
// once. It reports transitions only: the first outcome of an endpoint, and then
// each change. Endpoints are named by a comparable key of the caller's choice.
type checker[K comparable] struct {
	clock clock.Clock
	probe func(context.Context, check) error
	// changed is called from the checks' own goroutines, one call at a time,
	// and must not call back into the checker. why is empty for a ready endpoint.
	changed func(key K, now health, why string)

	slots chan struct{}
	tasks sync.WaitGroup
	mu    sync.Mutex
	runs  map[K]*checkRun
}

type checkRun struct {
	check check
	stop  context.CancelFunc
}

func newChecker[K comparable](c clock.Clock, changed func(K, health, string)) *checker[K] {
	return &checker[K]{
		clock:   c,
		probe:   probe,
		changed: changed,
		slots:   make(chan struct{}, checksAtOnce),
		runs:    make(map[K]*checkRun),
	}
}

// set makes want the whole set of checks: new ones start at once, those that
// are gone stop, one whose check changed starts anew, and the others go on
// undisturbed. Checks end when ctx does.
func (c *checker[K]) set(ctx context.Context, want map[K]check) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, r := range c.runs {
		if w, ok := want[k]; !ok || w != r.check {
			r.stop()
			delete(c.runs, k)
		}
	}
	for k, w := range want {
		if _, ok := c.runs[k]; ok {
			continue
		}
		taskCtx, stop := context.WithCancel(ctx)
		r := &checkRun{check: w, stop: stop}
		c.runs[k] = r
		c.tasks.Go(func() { c.run(taskCtx, k, r) })
	}
}

// wait returns when every check has ended, after the context of set has.
func (c *checker[K]) wait() { c.tasks.Wait() }

// run checks one endpoint until its context ends. The first outcome counts at
// once; later ones only after the number in a row that the check asks for.
func (c *checker[K]) run(ctx context.Context, key K, r *checkRun) {
	state, row := healthUnknown, 0
	timer := c.clock.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C():
		}
		err := c.once(ctx, r.check)
		if ctx.Err() != nil {
			return
		}
		next := healthReady
		if err != nil {
			next = healthFailing
		}
		if next == state {
			row = 0
		} else {
			row++
			need := r.check.healthyAfter
			if next == healthFailing {
				need = r.check.unhealthyAfter
			}
			if state == healthUnknown || row >= need {
				state, row = next, 0
				if !c.report(key, r, state, err) {
					return
				}
			}
		}
		timer.Reset(jitter(r.check.interval, 0.1))
	}
}

// report hands a transition on, unless the run was replaced meanwhile.
func (c *checker[K]) report(key K, r *checkRun, state health, err error) bool {
	why := ""
	if err != nil {
		why = err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.runs[key] != r {
		return false
	}
	c.changed(key, state, why)
	return true
}

// once runs one check within its timeout, when one of the slots is free.
func (c *checker[K]) once(ctx context.Context, k check) error {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := withTimeout(ctx, c.clock, k.timeout)
	defer cancel()
	return c.probe(ctx, k)
}

// probe asks one endpoint over the network. An HTTP endpoint is ready when it
// answers with a status from 200 to 399; redirects are not followed.
func probe(ctx context.Context, k check) error {
	if !k.http {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", k.address)
		if err != nil {
			return checkError(ctx, err)
		}
		return conn.Close()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+k.address+k.path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "weft-agent")
	// A connection of its own per check, so that a check also shows that the
	// endpoint still accepts, and no proxy of the environment stands between.
	transport := &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: checkHeadLimit}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return checkError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("GET %s answered %s", k.path, resp.Status)
	}
	return nil // the head decides: the body is not read
}

// checkError names a timeout as one, since the context's error says "canceled".
func checkError(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errTimeout) {
		return errTimeout
	}
	return err
}

var errTimeout = errors.New("no answer in time")

// withTimeout ends the context with errTimeout after d of the clock's time.
func withTimeout(ctx context.Context, c clock.Clock, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := c.NewTimer(d)
	go func() {
		select {
		case <-t.C():
			cancel(errTimeout)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { t.Stop(); cancel(context.Canceled) }
}

// jitter spreads d evenly by part to either side, so that what started
// together does not stay together.
func jitter(d time.Duration, part float64) time.Duration {
	return time.Duration(float64(d) * (1 - part + 2*part*rand.Float64()))
}
