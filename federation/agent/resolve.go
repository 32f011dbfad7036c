package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftmesh/weft/federation/clock"
)

// Times of resolving the gateways' host names.
const (
	resolveEvery   = 30 * time.Second // an answer that is good
	resolveRetry   = 3 * time.Second  // after a failure
	resolveTimeout = 5 * time.Second
	resolveAtOnce  = 16
	// resolveMax bounds how many addresses of one name are used.
	resolveMax = 32
)

// lookupFunc resolves one host name; net.Resolver's LookupNetIP, bound to "ip".
type lookupFunc func(ctx context.Context, host string) ([]netip.Addr, error)

// hosts resolves the host names of other clusters' gateways and keeps the last
// good answer of each for as long as the name is wanted: a DNS server that
// fails, or that answers with nothing, moves no traffic.
type hosts struct {
	clock   clock.Clock
	lookup  lookupFunc
	changed func() // called without a lock held, after an answer has changed
	// failing is called, without a lock held, with the names that do not resolve
	// and why, after each attempt.
	failing func(map[string]string)

	wake chan struct{} // room for one: the wanted set has new names
	mu   sync.Mutex
	good map[string][]netip.Addr // sorted; also of restored answers
	bad  map[string]string       // why a name does not resolve
	want map[string]time.Time    // when each is due again
}

func newHosts(c clock.Clock, lookup lookupFunc, changed func()) *hosts {
	return &hosts{
		clock: c, lookup: lookup, changed: changed,
		wake:    make(chan struct{}, 1),
		failing: func(map[string]string) {},

		good: make(map[string][]netip.Addr),
		bad:  make(map[string]string),
		want: make(map[string]time.Time),
	}
}

// set makes names the whole set of wanted host names. New ones are resolved at
// once; answers for the others are forgotten.
func (h *hosts) set(names map[string]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	added := false
	for n := range names {
		if _, ok := h.want[n]; !ok {
			h.want[n], added = h.clock.Now(), true
		}
	}
	maps.DeleteFunc(h.want, func(n string, _ time.Time) bool { return !names[n] })
	maps.DeleteFunc(h.good, func(n string, _ []netip.Addr) bool { return !names[n] })
	maps.DeleteFunc(h.bad, func(n, _ string) bool { return !names[n] })
	if added {
		raise(h.wake)
	}
}

// addresses are the last good answer for a name, sorted; nil when there never
// was one. The caller must not change them.
func (h *hosts) addresses(name string) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.good[name]
}

// restore puts answers of an earlier process in place, and snapshot takes them.
func (h *hosts) restore(answers map[string][]string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n, texts := range answers {
		for _, t := range texts {
			if a, err := netip.ParseAddr(t); err == nil {
				h.good[n] = append(h.good[n], a)
			}
		}
	}
}

func (h *hosts) snapshot() map[string][]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make(map[string][]string, len(h.good))
	for n, as := range h.good {
		for _, a := range as {
			out[n] = append(out[n], a.String())
		}
	}
	return out
}

// run resolves what is due until ctx ends.
func (h *hosts) run(ctx context.Context) error {
	timer := h.clock.NewTimer(resolveEvery)
	defer timer.Stop()
	for ctx.Err() == nil {
		due, next := h.due()
		if len(due) == 0 {
			timer.Reset(next)
			select {
			case <-ctx.Done():
				return nil
			case <-h.wake:
			case <-timer.C():
			}
			continue
		}
		var g errgroup.Group
		g.SetLimit(resolveAtOnce)
		for _, n := range due {
			g.Go(func() error { h.resolve(ctx, n); return nil })
		}
		_ = g.Wait()
	}
	return nil
}

// due are the names to resolve now, and else how long there is to wait.
func (h *hosts) due() ([]string, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now, next := h.clock.Now(), resolveEvery
	var due []string
	for n, at := range h.want {
		if left := at.Sub(now); left > 0 {
			next = min(next, left)
		} else {
			due = append(due, n)
		}
	}
	return due, next
}

func (h *hosts) resolve(ctx context.Context, name string) {
	lookup, cancel := withTimeout(ctx, h.clock, resolveTimeout)
	defer cancel()
	got, err := h.lookup(lookup, name)
	if ctx.Err() != nil {
		return
	}
	for i, a := range got {
		got[i] = a.Unmap()
	}
	slices.SortFunc(got, netip.Addr.Compare)
	got = slices.Compact(got)
	// Nobody can connect to these; a name server that gives them is broken.
	got = slices.DeleteFunc(got, func(a netip.Addr) bool { return a.IsUnspecified() || a.IsMulticast() })
	if len(got) > resolveMax {
		got = got[:resolveMax]
	}
	h.mu.Lock()
	_, wanted := h.want[name]
	changed := false
	if wanted {
		wait := resolveRetry
		if err == nil && len(got) > 0 {
			wait = resolveEvery
			changed = !slices.Equal(got, h.good[name])
			h.good[name] = got
			delete(h.bad, name)
		} else if h.bad[name] = "no usable address"; err != nil {
			h.bad[name] = err.Error()
		}
		h.want[name] = h.clock.Now().Add(jitter(wait, 0.2))
	}
	bad := maps.Clone(h.bad)
	h.mu.Unlock()
	h.failing(bad)
	if changed {
		h.changed()
	}
}
