package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// However many changes come, the state is written at most every 200 ms, and
// once more at the end.
func TestStateIsWrittenBehindChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dirty := make(chan struct{}, 1)
		var saves []time.Time
		fault := errors.New("disk full")
		told := 0
		p := persister{clock: clock.Real(), dirty: dirty, save: func() error {
			saves = append(saves, time.Now())
			if len(saves) == 2 {
				return fault
			}
			return nil
		}, failing: func(err error) {
			if err != nil {
				told++
			}
		}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); p.run(ctx) }()
		for range 1000 {
			raise(dirty)
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		n := len(saves)
		if n < 5 || n > 6 {
			t.Errorf("%d writes in a second of changes", n)
		}
		for i := 1; i < n; i++ {
			if d := saves[i].Sub(saves[i-1]); d < saveEvery {
				t.Errorf("%v between two writes", d)
			}
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		quiet := len(saves)
		if quiet > n+1 {
			t.Errorf("%d writes without a change", quiet-n)
		}
		cancel()
		<-done
		if len(saves) != quiet+1 {
			t.Errorf("%d writes at the end, want 1", len(saves)-quiet)
		}
		if told != 1 {
			t.Errorf("%d failures were told, want 1", told)
		}
	})
}

// A state that cannot be written is a finding, and costs nothing but the next
// restart's memory.
func TestAgentThatCannotSave(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	c := h.config(t)
	if err := os.MkdirAll(filepath.Join(c.StateDir, "."+lastGoodName+".tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	a := start(t, c)
	eventually(t, "it serves", func() bool { return a.first(payments) == "eu-2" })
	key := "finding/eu-1/" + string(federation.CodeLastGoodNotSaved) + "/cluster/eu-1"
	eventually(t, "the finding is reported", func() bool { return h.record(key) != nil })
	if err := os.Remove(filepath.Join(c.StateDir, "."+lastGoodName+".tmp")); err != nil {
		t.Fatal(err)
	}
	h.put(federationv1.DrainRecord("eu-2", federation.Drain{Remaining: 900}))
	eventually(t, "the finding is over", func() bool { return h.record(key) == nil })
	if _, err := os.Stat(filepath.Join(c.StateDir, lastGoodName)); err != nil {
		t.Error(err)
	}
}

// All endpoints of a service are replaced at once: nobody takes it for dead in
// between.
func TestReplacedEndpointsAreCountedWhenChecked(t *testing.T) {
	h := newHub(t, "eu-1")
	m := newMesh("weft.test", "eu-1", testLog(t))
	r := newReporter()
	f := newFindings(clock.Real(), testLog(t), "eu-1", r, h.metrics())
	o := newOffering("eu-1", testLog(t), m, r, f, h.metrics())
	svc := func(names ...string) map[federation.ServiceID]*service {
		s := &service{id: payments, export: true, ports: []federation.Port{{Number: 80, Protocol: federation.TCP}}}
		for _, n := range names {
			s.endpoints = append(s.endpoints, endpoint{name: n, check: &check{address: n}})
		}
		return map[federation.ServiceID]*service{payments: s}
	}
	counted := func() (int, int) {
		r.mu.Lock()
		defer r.mu.Unlock()
		n := r.want[federationv1.ReadinessKey(ownPayments).String()].ready
		if n == nil {
			return -1, -1
		}
		return n.Ready, n.Total
	}
	expect := func(what string, ready, total int) {
		t.Helper()
		if a, b := counted(); a != ready || b != total {
			t.Errorf("%s: %d of %d, want %d of %d", what, a, b, ready, total)
		}
	}
	o.take(svc("a", "b"), nil, true)
	expect("before the first checks", -1, -1)
	o.checked(endpointKey{payments, "a"}, healthReady, "")
	expect("one outcome is missing", -1, -1)
	o.checked(endpointKey{payments, "b"}, healthReady, "")
	expect("all have one", 2, 2)
	o.take(svc("c", "d", "e"), nil, true)
	expect("all new, none checked", 2, 2)
	o.checked(endpointKey{payments, "c"}, healthReady, "")
	o.checked(endpointKey{payments, "d"}, healthFailing, "no")
	expect("one outcome is missing again", 2, 2)
	o.checked(endpointKey{payments, "e"}, healthReady, "")
	expect("all have one again", 2, 3)
	if n := len(f.of("checks")); n != 1 {
		t.Errorf("%d findings", n)
	}
	o.take(svc("c", "e"), nil, true)
	expect("the failing one is gone", 2, 2)
	if n := len(f.of("checks")); n != 0 {
		t.Errorf("%d findings", n)
	}
	o.take(nil, nil, true)
	expect("the service is gone", -1, -1)
}
