package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// A name that stops to resolve, or that resolves to nonsense, keeps its last
// good answer; a new answer replaces it.
func TestHostNamesKeepTheirLastGoodAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var answer []string
		var fault error
		asked, changed := 0, 0
		h := newHosts(clock.Real(), func(context.Context, string) ([]netip.Addr, error) {
			mu.Lock()
			defer mu.Unlock()
			asked++
			var out []netip.Addr
			for _, a := range answer {
				out = append(out, netip.MustParseAddr(a))
			}
			return out, fault
		}, func() { changed++ })
		bad := 0
		h.failing = func(b map[string]string) { bad = len(b) }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = h.run(ctx) }()

		say := func(err error, list ...string) {
			mu.Lock()
			answer, fault = list, err
			mu.Unlock()
			time.Sleep(2 * resolveEvery)
			synctest.Wait()
		}
		expect := func(what string, want ...string) {
			t.Helper()
			var got []string
			for _, a := range h.addresses("gw.example") {
				got = append(got, a.String())
			}
			if !slices.Equal(got, want) {
				t.Fatalf("%s: %v, want %v", what, got, want)
			}
			if fails := fault != nil || len(answer) == 0 || answer[0] == "0.0.0.0"; len(want) > 0 && fails != (bad == 1) {
				t.Fatalf("%s: %d names are told to fail", what, bad)
			}
		}
		fault = errors.New("no such host")
		h.set(map[string]bool{"gw.example": true})
		time.Sleep(time.Second)
		synctest.Wait()
		expect("it never resolved")
		say(nil, "10.0.0.2", "10.0.0.1", "10.0.0.1", "::ffff:10.0.0.3")
		expect("its first answer", "10.0.0.1", "10.0.0.2", "10.0.0.3")
		say(errors.New("SERVFAIL"))
		expect("a failure", "10.0.0.1", "10.0.0.2", "10.0.0.3")
		say(nil)
		expect("an empty answer", "10.0.0.1", "10.0.0.2", "10.0.0.3")
		say(nil, "0.0.0.0", "224.0.0.1")
		expect("nonsense", "10.0.0.1", "10.0.0.2", "10.0.0.3")
		say(nil, "10.0.0.9")
		expect("a new answer", "10.0.0.9")
		if changed != 2 {
			t.Errorf("%d changes were told, want 2", changed)
		}
		saved := h.snapshot()
		before := asked
		h.set(nil)
		time.Sleep(time.Hour)
		synctest.Wait()
		if asked != before {
			t.Error("a name that nobody wants is asked for")
		}
		expect("nobody wants it")
		h.restore(saved)
		expect("after a restart", "10.0.0.9")
		cancel()
		<-done
	})
}

// Names that hang keep nobody else waiting for longer than their timeout.
func TestHostNamesThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHosts(clock.Real(), func(ctx context.Context, name string) ([]netip.Addr, error) {
			if name != "good.example" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return []netip.Addr{netip.MustParseAddr("10.0.0.1")}, nil
		}, func() {})
		want := map[string]bool{"good.example": true}
		for i := range 3 * resolveAtOnce {
			want[fmt.Sprintf("bad-%d.example", i)] = true
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = h.run(ctx) }()
		h.set(want)
		time.Sleep(4*resolveTimeout + time.Second)
		synctest.Wait()
		if len(h.addresses("good.example")) != 1 {
			t.Error("the good name waits for the bad ones")
		}
		cancel()
		<-done
	})
}

// A backend whose gateways have no known address leaves its share to the
// others, and the shares still add up.
func TestUnresolvedGatewaysAreLeftOut(t *testing.T) {
	h := newHosts(clock.Real(), nil, func() {})
	h.restore(map[string][]string{"good.example": {"10.0.0.2", "10.0.0.1"}})
	d := &driver{hosts: h}
	backend := func(c federation.ClusterID, share federation.PerMille, host string) federation.Backend {
		return federation.Backend{Cluster: c, Share: share, Gateways: []federation.Address{{Host: host, Port: 15443}}}
	}
	local := federation.Backend{Cluster: "eu-1", Share: 100, Local: true}
	p := d.resolved(federation.Plan{Tiers: []federation.Tier{
		{Backends: []federation.Backend{backend("a", 333, "good.example"), backend("b", 300, "bad.example"), local, backend("c", 267, "10.0.0.9")}},
		{Backends: []federation.Backend{backend("d", 1000, "bad.example")}},
		{Backends: []federation.Backend{backend("e", 1000, "10.0.0.8")}},
	}})
	if len(p.Tiers) != 2 || len(p.Tiers[0].Backends) != 3 || p.Tiers[1].Backends[0].Cluster != "e" {
		t.Fatalf("%+v", p.Tiers)
	}
	sum := federation.PerMille(0)
	for _, b := range p.Tiers[0].Backends {
		sum += b.Share
	}
	if sum != federation.All || p.Tiers[0].Backends[0].Share < 475 || p.Tiers[0].Backends[0].Share > 477 {
		t.Errorf("shares %+v", p.Tiers[0].Backends)
	}
	want := []federation.Address{{Host: "10.0.0.1", Port: 15443}, {Host: "10.0.0.2", Port: 15443}}
	if got := p.Tiers[0].Backends[0].Gateways; !slices.Equal(got, want) {
		t.Errorf("gateways %v, want %v", got, want)
	}
}
