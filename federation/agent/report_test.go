package agent

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

var ownPayments = federation.ExportID{Cluster: "eu-1", Service: payments}

func readyRecord(ready, total int) map[string]*federationv1.Record {
	r := federationv1.ReadinessRecord(ownPayments, federation.Readiness{Ready: ready, Total: total})
	return map[string]*federationv1.Record{r.GetKey(): r}
}

// told is a reporter whose session has been told 10 of 10 ready.
func told(t *testing.T, now time.Time, thresholds ...federation.PerMille) *reporter {
	t.Helper()
	p := newReporter()
	p.setThresholds(func(federation.ServiceID) []federation.PerMille { return thresholds })
	p.set(readyRecord(10, 10))
	p.setFull(true)
	p.begin(nil)
	r, _ := p.take(now)
	if !r.GetFullBegin() || !r.GetFullEnd() || len(r.GetPuts()) != 1 {
		t.Fatalf("the session begins with %v", r)
	}
	if _, ok := p.result(r.GetSequence()); !ok {
		t.Fatal("its result is not known")
	}
	return p
}

// What moves traffic goes out at once; the rest at most once a second, and only
// if it is still different then.
func TestReadinessIsDamped(t *testing.T) {
	t0 := time.Unix(1000, 0)
	p := told(t, t0, 700)
	send := func(at time.Duration) *federationv1.Report {
		r, _ := p.take(t0.Add(at))
		if r != nil {
			p.result(r.GetSequence())
		}
		return r
	}
	steps := []struct {
		at    time.Duration
		ready int
		sent  bool
		why   string
	}{
		{0, 9, true, "the first small change in a while"},
		{100 * time.Millisecond, 8, false, "a second one within the second"},
		{200 * time.Millisecond, 6, true, "it crosses the policy's threshold downwards"},
		{300 * time.Millisecond, 5, false, "a small change below it"},
		{400 * time.Millisecond, 0, true, "the last one goes"},
		{500 * time.Millisecond, 1, true, "the first one is back"},
		{600 * time.Millisecond, 2, false, "a small change"},
		{700 * time.Millisecond, 7, true, "it crosses the threshold upwards"},
		{800 * time.Millisecond, 8, false, "a small change"},
		{900 * time.Millisecond, 7, false, "back to what was sent"},
		{5 * time.Second, 7, false, "nothing has changed since"},
		{5 * time.Second, 8, true, "a small change, long after the last"},
	}
	for _, s := range steps {
		p.set(readyRecord(s.ready, 10))
		if r := send(s.at); (r != nil) != s.sent {
			t.Fatalf("at %v, %d of 10 ready: sent %v; %s", s.at, s.ready, r, s.why)
		}
	}
	// What waited goes out when its second is over, once, as it is then.
	p.set(readyRecord(9, 10))
	if r, wait := p.take(t0.Add(5200 * time.Millisecond)); r != nil || wait != 800*time.Millisecond {
		t.Fatalf("sent %v, else ask again in %v, want 800ms", r, wait)
	}
	p.set(readyRecord(10, 10))
	r := send(6 * time.Second)
	if len(r.GetPuts()) != 1 || r.GetPuts()[0].GetReadiness().GetReady() != 10 {
		t.Fatalf("sent %v", r)
	}
	if r := send(time.Hour); r != nil {
		t.Fatalf("an unchanged report was sent: %v", r)
	}
}

// However it is cut up and whatever changes while it is on its way, what the
// controller ends with is what is offered; and no session is told more than it
// takes.
func TestReportsConverge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := newReporter()
		stored := map[string]string{} // as the controller has it
		want := map[string]string{}
		var set map[string]bool
		now := time.Unix(0, 0)
		full := false
		everFull := false
		deliver := func(r *federationv1.Report) {
			if r.GetFullBegin() {
				set = map[string]bool{}
			}
			if n := len(r.GetPuts()) + len(r.GetDeletes()); n > reportRecords {
				t.Fatalf("a report of %d records", n)
			}
			for _, put := range r.GetPuts() {
				stored[put.GetKey()] = put.String()
				if set != nil {
					set[put.GetKey()] = true
				}
			}
			for _, k := range r.GetDeletes() {
				delete(stored, k)
			}
			if r.GetFullEnd() {
				if !full && !everFull {
					t.Fatal("a set that is not full was said to be")
				}
				for k := range stored {
					if !set[k] {
						delete(stored, k)
					}
				}
				set = nil
			}
			p.result(r.GetSequence())
		}
		settle := func() {
			for range 10_000 {
				r, wait := p.take(now)
				switch {
				case r != nil:
					deliver(r)
				case wait > 0:
					now = now.Add(wait)
				default:
					return
				}
			}
			t.Fatal("it never settles")
		}
		t.Repeat(map[string]func(*rapid.T){
			"offer": func(t *rapid.T) {
				n := rapid.IntRange(1, 150).Draw(t, "records")
				for range n {
					id := federation.ExportID{Cluster: "eu-1", Service: federation.ServiceID{Namespace: "shop", Name: fmt.Sprint("s", rapid.IntRange(0, 200).Draw(t, "service"))}}
					r := federationv1.ReadinessRecord(id, federation.Readiness{Ready: rapid.IntRange(0, 4).Draw(t, "ready"), Total: 4})
					p.set(map[string]*federationv1.Record{r.GetKey(): r})
					want[r.GetKey()] = r.String()
				}
			},
			"withdraw": func(t *rapid.T) {
				for k := range want {
					p.set(map[string]*federationv1.Record{k: nil})
					delete(want, k)
					break
				}
			},
			"send": func(t *rapid.T) {
				for range rapid.IntRange(1, 4).Draw(t, "reports") {
					if r, _ := p.take(now); r != nil {
						deliver(r)
					}
				}
			},
			"full":    func(*rapid.T) { full, everFull = true, true; p.setFull(true) },
			"unsure":  func(*rapid.T) { full = false; p.setFull(false) },
			"connect": func(*rapid.T) { p.end(); set = nil; p.begin(nil) },
			"resend":  func(*rapid.T) { p.resend() },
			"": func(t *rapid.T) {
				if p.session == nil || !rapid.Bool().Draw(t, "settle") {
					return
				}
				settle()
				for k, v := range want {
					if stored[k] != v {
						t.Fatalf("stored %q under %s, offered %q", stored[k], k, v)
					}
				}
				if !full {
					return
				}
				for k := range stored {
					if _, ok := want[k]; !ok {
						t.Fatalf("%s is still stored, and not offered any more", k)
					}
				}
			},
		})
	})
}

// A session whose controller has it all already is told nothing.
func TestNothingToReportSendsNothing(t *testing.T) {
	p := newReporter()
	p.set(readyRecord(2, 2))
	e := federationv1.ExportRecord(federation.Export{Cluster: "eu-1", Service: payments, Ports: []federation.Port{{Number: 80, Protocol: federation.TCP}}})
	p.set(map[string]*federationv1.Record{e.GetKey(): e})
	p.setFull(true)

	stored := federationv1.ExportRecord(federation.Export{
		Cluster: "eu-1", Service: payments, Ports: []federation.Port{{Number: 80, Protocol: federation.TCP}},
		Accepted: 77, Network: "n", // what the controller adds
	})
	known := readyRecord(2, 2)
	known[stored.GetKey()] = stored
	p.begin(known)
	if r, _ := p.take(time.Unix(0, 0)); r != nil {
		t.Fatalf("sent %v", r)
	}
	p.end()
	known["ready/eu-1/shop/gone"] = federationv1.ReadinessRecord(federation.ExportID{Cluster: "eu-1", Service: federation.ServiceID{Namespace: "shop", Name: "gone"}}, federation.Readiness{Total: 1})
	p.begin(known)
	if r, _ := p.take(time.Unix(0, 0)); !r.GetFullBegin() || !r.GetFullEnd() {
		t.Fatalf("the controller has a record more, and is told %v", r)
	}
}
