package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// outcome is one request as its caller saw it.
type outcome struct {
	started, ended time.Time
	cluster        string // who served it; empty if nobody did
	kept           bool   // on a connection that was open already
	err            error
}

// load sends requests at a steady rate, whatever happens to them: half on kept
// connections, half on new ones. It is an open loop, so a slow answer does not
// thin the load out.
type load struct {
	url  string
	rate int // requests a second

	kept, fresh *http.Client

	mu       sync.Mutex
	outcomes []outcome
	flying   int
}

// newLoad sends to url through address, which stands for the URL's host.
func newLoad(url, address string, rate int, timeout time.Duration) *load {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}
	client := func(kept bool) *http.Client {
		return &http.Client{
			Timeout: timeout,
			Transport: &http.Transport{
				DialContext: dial, DisableKeepAlives: !kept, DisableCompression: true,
				MaxIdleConns: 16, MaxIdleConnsPerHost: 16,
			},
		}
	}
	return &load{url: url, rate: rate, kept: client(true), fresh: client(false)}
}

// run sends until ctx ends, then waits for the answers.
func (l *load) run(ctx context.Context) {
	tick := time.NewTicker(time.Second / time.Duration(l.rate))
	defer tick.Stop()
	var wg sync.WaitGroup
	// A ticker drops ticks when the machine is busy; the schedule does not.
	began, sent := time.Now(), 0
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		for due := int(time.Since(began).Seconds() * float64(l.rate)); sent < due && ctx.Err() == nil; sent++ {
			kept := sent%2 == 0
			wg.Go(func() { l.request(kept) })
		}
	}
	wg.Wait()
	l.kept.CloseIdleConnections()
}

// answer is what the demo's backends say about themselves.
type answer struct {
	Cluster string `json:"cluster"`
	Backend string `json:"backend"`
}

func (l *load) request(kept bool) {
	l.mu.Lock()
	l.flying++
	l.mu.Unlock()
	o := outcome{started: time.Now(), kept: kept}
	o.cluster, o.err = l.get(kept)
	o.ended = time.Now()
	l.mu.Lock()
	l.outcomes = append(l.outcomes, o)
	l.flying--
	l.mu.Unlock()
}

func (l *load) get(kept bool) (string, error) {
	client := l.fresh
	if kept {
		client = l.kept
	}
	// Not the demo's context: a request that has begun is carried to its end.
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, l.url, http.NoBody)
	if err != nil {
		return "", err
	}
	req.Header.Set(markerHeader, marker)
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	switch {
	case err != nil:
		return "", err
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	var a answer
	if err := json.Unmarshal(body, &a); err != nil || a.Cluster == "" {
		return "", fmt.Errorf("not a backend's answer: %.80q", body)
	}
	return a.Cluster, nil
}

// mark is a place in the list of outcomes.
func (l *load) mark() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.outcomes)
}

// since copies the outcomes from a mark on.
func (l *load) since(mark int) []outcome {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]outcome(nil), l.outcomes[mark:]...)
}

// successesInARow is how many successes count as recovered.
const successesInARow = 100

// recovery is the time from the fault to the end of the first of 100 successes
// in a row among the requests that ended after it. It is 0 when none of those
// failed, and false when there is no such row.
func recovery(outcomes []outcome, fault time.Time) (time.Duration, bool) {
	row, first, failed := 0, time.Time{}, false
	for _, o := range outcomes { // in the order of their ends
		if o.ended.Before(fault) {
			continue
		}
		if o.err != nil {
			row, failed = 0, true
			continue
		}
		if row == 0 {
			first = o.ended
		}
		if row++; row == successesInARow {
			if !failed {
				return 0, true
			}
			return first.Sub(fault), true
		}
	}
	return 0, false
}

// excused reports whether a failed request was in flight while one of the
// killed processes died, which nobody could have saved.
func excused(o outcome, faults []lab.Death) bool {
	return slices.ContainsFunc(faults, func(f lab.Death) bool {
		return !o.started.After(f.Gone) && !o.ended.Before(f.Sent)
	})
}
