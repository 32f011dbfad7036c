package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

func (h *hub) reported() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, r := range h.reports {
		n += len(r.GetPuts()) + len(r.GetDeletes())
	}
	return n
}

// A session that is cut, and an agent that is restarted, tell a controller that
// has it all nothing again.
func TestReconnectingReportsNothingAnew(t *testing.T) {
	h := newHub(t, "eu-1")
	c := h.config(t)
	write(t, c, "a.yaml", serviceYAML("payments", "127.0.0.1:8081"))
	write(t, c, "b.yaml", serviceYAML("carts", "127.0.0.1:8082"))
	a := start(t, c)
	eventually(t, "the own services are reported", func() bool {
		return h.record("ready/eu-1/shop/payments") != nil && h.record("ready/eu-1/shop/carts") != nil
	})
	// The agent has what it reported back from the controller, too.
	key := "export/eu-1/shop/carts"
	eventually(t, "they come back", func() bool {
		a.mesh.mu.Lock()
		defer a.mesh.mu.Unlock()
		return a.mesh.held.records[key].GetExport().GetAccepted() > 0 && len(a.mesh.held.records) == 6
	})
	before := h.reported()
	statuses := func() int {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.statuses)
	}
	n := statuses()
	h.cut()
	// The status comes behind whatever there was to report.
	eventually(t, "a status in the next session", func() bool { return h.connected() && statuses() > n })
	if got := h.reported(); got != before {
		t.Errorf("%d records were reported again", got-before)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	n = statuses()
	a = start(t, c)
	eventually(t, "a status of the next process", func() bool { return h.connected() && statuses() > n })
	eventually(t, "its source is read", func() bool { _, full := a.offering.known(); return full })
	if got := h.reported(); got != before {
		t.Errorf("%d records were reported again after a restart", got-before)
	}

	// What changed while nobody was there is told in full, and what went is gone.
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(c.Source, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	start(t, c)
	eventually(t, "the service that is gone is withdrawn", func() bool {
		return h.record(key) == nil && h.record("ready/eu-1/shop/carts") == nil && h.record("export/eu-1/shop/payments") != nil
	})
}

// A controller whose state is another or older takes nothing away until its set
// is complete.
func TestAnOlderControllerTakesNothingAway(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	h.put(federationv1.DenialRecord(federation.Denial{Cluster: "bad", Generation: 3}))
	a := start(t, h.config(t))
	eventually(t, "eu-2 serves", func() bool { return a.first(payments) == "eu-2" })

	h.stop()
	h.mu.Lock()
	h.incarnation, h.number, h.holdFull = "second", 2, true
	kept := map[string]*federationv1.Record{}
	for k, r := range h.records {
		if k == "bundle" || strings.HasPrefix(k, "cluster/") {
			kept[k] = r
		}
	}
	h.records = kept
	h.mu.Unlock()
	h.restart()
	eventually(t, "the agent is back", h.connected)
	// An addition of the recovering store shows that its session is in force.
	h.put(federationv1.DrainRecord("eu-9", federation.Drain{Remaining: 500}))
	eventually(t, "additions count", func() bool { _, w := a.mesh.present(); return w.Drain("eu-9") == 500 })
	if a.first(payments) != "eu-2" {
		t.Fatalf("a recovering controller took eu-2 away: %+v", a.plan(payments, 80))
	}

	h.mu.Lock()
	h.holdFull = false
	h.mu.Unlock()
	h.cut()
	eventually(t, "the complete set counts", func() bool { return len(a.plan(payments, 80).Tiers) == 0 })
	// But nobody has lifted the denial, and it is told upwards.
	if d := a.mesh.hello().GetDenials(); len(d) != 1 || d[0].GetCluster() != "bad" {
		t.Errorf("denials: %v", d)
	}
	if err := a.denials.Check(identity.Subject{Cluster: "bad"}); err == nil {
		t.Error("the denied cluster is believed again")
	}
	// A later registration under the name is believed again.
	m := member("bad", "10.0.0.3:15443")
	m.Generation = 4
	h.put(federationv1.MemberRecord(m))
	eventually(t, "the new generation is believed", func() bool { return a.denials.Check(identity.Subject{Cluster: "bad"}) == nil })
}

// The agent may be started before its controller, and goes on with another one
// when its own dies.
func TestStartOrderAndFailover(t *testing.T) {
	first, second := newHub(t, "eu-1"), newHub(t, "eu-1")
	// Two controllers of one mesh: the same authority and store.
	second.root, second.region, second.bundle, second.token = first.root, first.region, first.bundle, first.token
	second.stop()
	second.verifier, second.records = first.verifier, first.records
	id, err := identity.ControllerID(td, "two")
	if err != nil {
		t.Fatal(err)
	}
	second.leaf = leafSource{first.svid(id)}
	first.stop()

	c := first.config(t)
	c.Controllers = []string{first.address, second.address}
	c.Sockets = nil
	started := make(chan *running)
	go func() {
		a, err := tryStart(t, c)
		if err != nil {
			t.Error(err)
		}
		started <- a
	}()
	second.restart()
	a := <-started
	if a == nil {
		return
	}
	eventually(t, "a session with the second", second.connected)
	first.restart()
	second.stop()
	eventually(t, "a session with the first", first.connected)
}

// What the controller refuses is a finding, until it takes it.
func TestRefusedRecordsAreFindings(t *testing.T) {
	h := newHub(t, "eu-1")
	h.refuse = func(r *federationv1.Record) *federationv1.Finding {
		if e := r.GetExport(); e.GetName() == "payments" {
			f := federation.NewFinding(federation.CodeOutsideGrant, federation.Ref{Kind: "export", Name: "eu-1/shop/payments"}, "no grant")
			return federationv1.EncodeFinding(f)
		}
		return nil
	}
	c := h.config(t)
	write(t, c, "a.yaml", serviceYAML("payments", "127.0.0.1:8081"))
	write(t, c, "b.yaml", serviceYAML("carts", "127.0.0.1:8082"))
	a := start(t, c)
	has := func(code federation.Code) bool {
		for _, f := range a.Findings() {
			if f.Code == code {
				return true
			}
		}
		return false
	}
	eventually(t, "a finding about the refused service", func() bool { return has(federation.CodeOutsideGrant) })
	eventually(t, "it is told upwards", func() bool {
		return h.record("finding/eu-1/"+string(federation.CodeOutsideGrant)+"/export/eu-1%2Fshop%2Fpayments") != nil
	})
	if h.record("export/eu-1/shop/carts") == nil {
		t.Error("the other service is refused with it")
	}
	// A grant changes the registration, and the agent tries again.
	h.mu.Lock()
	h.refuse = nil
	h.mu.Unlock()
	m := member("eu-1", "10.0.0.1:15443")
	m.MaxExports = 9
	h.put(federationv1.MemberRecord(m))
	eventually(t, "the service is taken", func() bool { return h.record("export/eu-1/shop/payments") != nil })
	eventually(t, "the finding is over", func() bool { return !has(federation.CodeOutsideGrant) })
}

// The agent's own SVID is renewed, also when it has expired meanwhile.
func TestTheOwnIdentityIsRenewed(t *testing.T) {
	h := newHub(t, "eu-1")
	c := h.config(t)
	a := start(t, c)
	eventually(t, "a session", h.connected)
	serial := func() string {
		svid, err := a.who.source.GetX509SVID()
		if err != nil {
			return err.Error()
		}
		return identity.SerialOf(svid.Certificates[0])
	}
	before := serial()
	a.who.source.RenewNow()
	eventually(t, "a new SVID", func() bool { return serial() != before })
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	// Two days later the leaf has expired; its key still proves who it was.
	later := clock.Scaled(1, 48*time.Hour)
	h.stop()
	h.clock(later)
	h.restart()
	c.Clock = later
	a = start(t, c)
	eventually(t, "a session after the expiry", h.connected)
	if _, err := netip.ParseAddrPort(h.address); err != nil {
		t.Fatal(err)
	}
}
