package identity_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
)

// office is an issuer that can be away, and remembers when it was asked.
type office struct {
	t     testing.TB
	clock clock.Clock
	asker identity.Asker

	mu     sync.Mutex
	mesh   *mesh
	by     *identity.Authority // the active one
	bundle *identity.Bundle
	away   error
	asked  []time.Time
	keys   map[string]int // how often a key was used
}

func newOffice(t testing.TB, m *mesh, c clock.Clock, id string) *office {
	return &office{t: t, clock: c, mesh: m, by: m.region, bundle: m.bundle, asker: identity.PeerAsks(peer(t, id)), keys: map[string]int{}}
}

func (o *office) Issue(_ context.Context, csr []byte) (identity.Issued, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = append(o.asked, o.clock.Now())
	if o.away != nil {
		return identity.Issued{}, o.away
	}
	who, err := identity.Admit(td, o.asker, spiffeid.ID{}, csr)
	if err != nil {
		return identity.Issued{}, err
	}
	hash, err := identity.KeyHash(who.Key)
	if err != nil {
		return identity.Issued{}, err
	}
	o.keys[hash]++
	chain, err := o.by.SignLeaf(who, o.mesh.lifetimes, o.clock.Now())
	return identity.Issued{Chain: chain, Bundle: o.bundle}, err
}

func (o *office) set(change func(*office)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change(o)
}

func (o *office) askedAt() []time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]time.Time(nil), o.asked...)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newSource(t testing.TB, o *office, id string, change ...func(*identity.SourceConfig)) *identity.Source {
	t.Helper()
	c := identity.SourceConfig{ID: spiffeid.RequireFromString(id), Clock: o.clock, Issuer: o, Log: quiet()}
	for _, f := range change {
		f(&c)
	}
	return must(identity.NewSource(c))(t)
}

func TestASourceRenewsBetween40And50PercentOfALife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, time.Now())
		o := newOffice(t, m, clock.Real(), agentEU)
		reg := prometheus.NewRegistry()
		s := newSource(t, o, agentEU, func(c *identity.SourceConfig) { c.Metrics = reg })
		if _, err := s.GetX509SVID(); !errors.Is(err, identity.ErrNoSVID) {
			t.Errorf("before the first: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(30 * 24 * time.Hour)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ends with %v", err)
		}

		asked := o.askedAt()
		life := 24*time.Hour + 2*time.Minute // from the back-dated start
		points := map[time.Duration]bool{}
		for i := 1; i < len(asked); i++ {
			gap := asked[i].Sub(asked[i-1]) + 2*time.Minute
			if gap < life*2/5-time.Second || gap > life/2+time.Second {
				t.Errorf("renewal %d came after %v", i, gap)
			}
			points[gap] = true
		}
		if len(points) < 30 {
			t.Errorf("%d renewals at only %d different points: no jitter", len(asked), len(points))
		}
		for key, n := range o.keys {
			if n > 1 {
				t.Errorf("key %s was used %d times", key, n)
			}
		}
		svid := must(s.GetX509SVID())(t)
		want := `
			# HELP weft_svid_renewals_total Attempts to get an SVID, by result: renewed or failed.
			# TYPE weft_svid_renewals_total counter
			weft_svid_renewals_total{result="renewed"} ` + itoa(len(asked)) + `
			# HELP weft_bundle_sequence Sequence number of the trust bundle in use.
			# TYPE weft_bundle_sequence gauge
			weft_bundle_sequence 1
		`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "weft_svid_renewals_total", "weft_bundle_sequence"); err != nil {
			t.Error(err)
		}
		if got := gauge(t, reg, "weft_svid_expiry_timestamp_seconds"); got != float64(svid.Certificates[0].NotAfter.Unix()) {
			t.Errorf("the expiry gauge shows %v", got)
		}
	})
}

func TestASourceServesWhatItHasWhileItsIssuerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, time.Now())
		o := newOffice(t, m, clock.Real(), agentEU)
		reg := prometheus.NewRegistry()
		var log bytes.Buffer
		s := newSource(t, o, agentEU, func(c *identity.SourceConfig) {
			c.Metrics = reg
			c.Log = slog.New(slog.NewTextHandler(&log, nil))
		})
		if err := s.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		first := must(s.GetX509SVID())(t)
		o.set(func(o *office) { o.away = errors.New("no route") })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()

		time.Sleep(23 * time.Hour)
		if got := must(s.GetX509SVID())(t); got != first {
			t.Error("another SVID, from nowhere")
		}
		asked := o.askedAt()[1:]
		// About 12 hours at 2.5 to 5 minutes.
		if len(asked) < 12*12 || len(asked) > 14*24+20 {
			t.Errorf("the issuer was asked %d times", len(asked))
		}
		for i := 1; i < len(asked); i++ {
			if gap := asked[i].Sub(asked[i-1]); gap < time.Second/2 || gap > 5*time.Minute+time.Second {
				t.Errorf("attempt %d after %v", i, gap)
			}
		}
		time.Sleep(2 * time.Hour)
		if _, err := s.GetX509SVID(); !errors.Is(err, identity.ErrExpired) {
			t.Errorf("after its end: %v", err)
		}
		o.set(func(o *office) { o.away = nil })
		time.Sleep(6 * time.Minute)
		if got := must(s.GetX509SVID())(t); got == first {
			t.Error("not renewed after the issuer's return")
		}
		cancel()
		<-done
		if got := log.String(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "level=ERROR") || !strings.Contains(got, "no route") {
			t.Errorf("the log does not tell: %.300s", got)
		}
	})
}

func TestASourceGivesUpOnAnIssuerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, time.Now())
		o := newOffice(t, m, clock.Real(), agentEU)
		s := newSource(t, o, agentEU, func(c *identity.SourceConfig) {
			c.Issuer = identity.IssuerFunc(func(ctx context.Context, _ []byte) (identity.Issued, error) {
				<-ctx.Done()
				return identity.Issued{}, ctx.Err()
			})
			c.Timeout = 20 * time.Second
		})
		began := time.Now()
		err := s.Renew(t.Context())
		if err == nil || !strings.Contains(err.Error(), "has not answered for 20s") || time.Since(began) != 20*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// What an issuer answers is checked before it is used: a source cannot be
// given another name, another's key, or a chain that its peers would refuse.
func TestASourceTakesOnlyItsOwnAnswer(t *testing.T) {
	m := newMesh(t, t0)
	stranger := newMesh(t, t0)
	otherTD := spiffeid.RequireTrustDomainFromString("other.example")
	c := at(t0.Add(time.Hour))
	agent := spiffeid.RequireFromString(agentEU)
	sign := func(by *identity.Authority, id spiffeid.ID, csr []byte, now time.Time) []*x509.Certificate {
		key := must(identity.AdmitOperator(td, "x", csr))(t).Key
		return must(by.SignLeaf(identity.Admitted{ID: id, Key: key}, m.lifetimes, now))(t)
	}
	for name, answer := range map[string]struct {
		issue func(csr []byte) identity.Issued
		says  string
	}{
		"another identity": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(m.region, spiffeid.RequireFromString(gatewayEU), csr, t0), Bundle: m.bundle}
		}, "it is for " + gatewayEU},
		"another key": {func([]byte) identity.Issued {
			chain, _ := m.leaf(t, agent, t0)
			return identity.Issued{Chain: chain, Bundle: m.bundle}
		}, "another key's certificate"},
		"another mesh": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(stranger.region, agent, csr, t0), Bundle: m.bundle}
		}, "leads to no root"},
		"an expired chain": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(m.region, agent, csr, t0.Add(-48*time.Hour)), Bundle: m.bundle}
		}, "expired"},
		"an issuer whose clock is ahead": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(m.region, agent, csr, t0.Add(3*time.Hour)), Bundle: m.bundle}
		}, "one of the clocks is wrong"},
		"no chain": {func([]byte) identity.Issued { return identity.Issued{Bundle: m.bundle} }, "a chain of 0"},
		"no bundle": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(m.region, agent, csr, t0)}
		}, "without a bundle"},
		"a foreign bundle": {func(csr []byte) identity.Issued {
			return identity.Issued{Chain: sign(m.region, agent, csr, t0), Bundle: must(identity.NewBundle(otherTD, 1, m.bundle.Roots()))(t)}
		}, "with the bundle of other.example"},
	} {
		t.Run(name, func(t *testing.T) {
			s := must(identity.NewSource(identity.SourceConfig{ID: agent, Clock: c, Log: quiet(), Issuer: identity.IssuerFunc(
				func(_ context.Context, csr []byte) (identity.Issued, error) { return answer.issue(csr), nil })}))(t)
			err := s.Renew(t.Context())
			if err == nil || !strings.Contains(err.Error(), answer.says) {
				t.Errorf("got %v, want %q", err, answer.says)
			}
			if _, err := s.GetX509SVID(); !errors.Is(err, identity.ErrNoSVID) {
				t.Errorf("it is served all the same: %v", err)
			}
		})
	}
}

func TestBundlesNeverGoBack(t *testing.T) {
	m := newMesh(t, t0)
	o := newOffice(t, m, at(t0), agentEU)
	s := newSource(t, o, agentEU)
	next := must(identity.NewRoot(td, m.lifetimes, t0))(t)
	two := must(m.bundle.With(next.Root()))(t)
	fork := must(identity.NewBundle(td, 2, []*x509.Certificate{next.Root()}))(t)

	changed := s.Updated()
	if err := s.SetBundle(m.bundle); err != nil {
		t.Fatal(err)
	}
	<-changed
	changed = s.Updated()
	if err := s.SetBundle(two); err != nil {
		t.Fatal(err)
	}
	<-changed
	changed = s.Updated()
	if err := s.SetBundle(two); err != nil {
		t.Errorf("the same again: %v", err)
	}
	select {
	case <-changed:
		t.Error("the same bundle counts as a change")
	default:
	}
	for name, b := range map[string]*identity.Bundle{"a lower sequence": m.bundle, "the same with other roots": fork} {
		if err := s.SetBundle(b); !errors.Is(err, identity.ErrOldBundle) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// An issuer that knows only the old bundle does not bring it back either.
	if err := s.Renew(t.Context()); err != nil || !s.Bundle().Equal(two) {
		t.Errorf("%v, %v", err, s.Bundle())
	}
	foreign := must(identity.NewBundle(spiffeid.RequireTrustDomainFromString("other.example"), 9, m.bundle.Roots()))(t)
	if err := s.SetBundle(foreign); err == nil {
		t.Error("a bundle of another trust domain")
	}
	if err := s.SetBundle(nil); err == nil {
		t.Error("no bundle")
	}
}

// A timer stands still while a machine sleeps: what counts is the clock, which
// has gone on when it wakes.
func TestASourceRenewsAfterTheMachineSlept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, t0)
		clk := &setClock{now: t0}
		o := newOffice(t, m, clk, agentEU)
		s := newSource(t, o, agentEU)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		clk.set(t0.Add(9 * time.Hour))
		time.Sleep(6 * time.Minute)
		if n := len(o.askedAt()); n != 1 {
			t.Errorf("asked %d times at 37%% of the life", n)
		}
		clk.set(t0.Add(14 * time.Hour))
		time.Sleep(6 * time.Minute)
		if n := len(o.askedAt()); n != 2 {
			t.Errorf("asked %d times at 58%% of the life", n)
		}
		cancel()
		<-done
	})
}

// An authority near its own end signs ever shorter leaves; it is not asked for
// them without a pause.
func TestASourceDoesNotPressAnAuthorityNearItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, time.Now())
		o := newOffice(t, m, clock.Real(), agentEU)
		time.Sleep(time.Until(m.region.NotAfter()) - time.Minute)
		s := newSource(t, o, agentEU)
		ctx, cancel := context.WithTimeout(t.Context(), 59*time.Second)
		defer cancel()
		_ = s.Run(ctx)
		if n := len(o.askedAt()); n < 2 || n > 7 {
			t.Errorf("asked %d times in the last minute", n)
		}
	})
}

// A server that shows its root shows the one that its present chain leads to.
func TestTheRootThatIsShownFollowsTheChain(t *testing.T) {
	m := newMesh(t, t0)
	o := newOffice(t, m, at(t0.Add(time.Minute)), ctl)
	s := newSource(t, o, ctl)
	v := identity.NewVerifier(identity.VerifierConfig{Clock: o.clock, Mesh: s})
	server := v.Server(identity.ServerConfig{SVID: s, Anonymous: true, SendRoot: true})
	shows := func(root *identity.Authority) {
		t.Helper()
		if err := s.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			var learned identity.Pinned
			got := meet(t, server, identity.PinnedClient(identity.PinOf(root.Root()), o.clock, func(p identity.Pinned) { learned = p }))
			if got.client != nil || !learned.Root.Equal(root.Root()) {
				t.Fatalf("%v, learned %v", got.client, learned)
			}
			if svid := must(s.GetX509SVID())(t); !got.clientView.PeerCertificates[0].Equal(svid.Certificates[0]) || len(got.clientView.PeerCertificates) != 3 {
				t.Error("an old chain is shown")
			}
		}
	}
	shows(m.root)
	shows(m.root)
	second := must(identity.NewRoot(td, m.lifetimes, t0))(t)
	o.set(func(o *office) {
		o.by = must(second.NewRegion("eu", m.lifetimes, t0))(t)
		o.bundle = must(m.bundle.With(second.Root()))(t)
	})
	shows(second)
}

func TestAProcessMayMakeItsSourceAgain(t *testing.T) {
	m := newMesh(t, t0)
	o := newOffice(t, m, at(t0), agentEU)
	reg := prometheus.NewRegistry()
	for range 2 {
		s := newSource(t, o, agentEU, func(c *identity.SourceConfig) { c.Metrics = reg })
		if err := s.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		identity.NewVerifier(identity.VerifierConfig{Clock: o.clock, Mesh: s, Metrics: reg})
	}
	if got := gauge(t, reg, "weft_svid_renewals_total"); got != 2 {
		t.Errorf("%v renewals are counted", got)
	}
	taken := prometheus.NewRegistry()
	taken.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "weft_bundle_sequence"}))
	_, err := identity.NewSource(identity.SourceConfig{ID: o.by.TrustDomain().ID(), Clock: o.clock, Log: quiet()})
	if err == nil {
		t.Error("a source of the trust domain itself")
	}
	_, err = identity.NewSource(identity.SourceConfig{ID: spiffeid.RequireFromString(agentEU), Clock: o.clock, Log: quiet(), Metrics: taken})
	if err == nil || !strings.Contains(err.Error(), "weft_bundle_sequence") {
		t.Errorf("a metric of another kind has the name: %v", err)
	}
}

// A root that is taken away under a running source makes it renew at once.
func TestASourceRenewsWhenItsRootIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMesh(t, time.Now())
		o := newOffice(t, m, clock.Real(), agentEU)
		s := newSource(t, o, agentEU)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		synctest.Wait()
		next := must(identity.NewRoot(td, m.lifetimes, time.Now()))(t)
		region := must(next.NewRegion("eu", m.lifetimes, time.Now()))(t)
		both := must(m.bundle.With(next.Root()))(t)
		only := must(both.Without(m.root.Root()))(t)
		o.set(func(o *office) { o.by, o.bundle = region, only })
		time.Sleep(time.Hour)
		began := time.Now()
		if err := s.SetBundle(both); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := len(o.askedAt()); n != 1 {
			t.Errorf("an added root led to %d requests", n)
		}
		if err := s.SetBundle(only); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, _, err := x509svid.Verify(must(s.GetX509SVID())(t).Certificates, only, x509svid.WithTime(time.Now())); err != nil || time.Since(began) != 0 {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		cancel()
		<-done
	})
}

func TestSourceUnder200Goroutines(t *testing.T) {
	m := newMesh(t, t0)
	o := newOffice(t, m, at(t0), agentEU)
	s := newSource(t, o, agentEU)
	if err := s.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	roots := []*x509.Certificate{m.root.Root()}
	var wg sync.WaitGroup
	for g := range 200 {
		wg.Go(func() {
			for i := range 10 {
				switch {
				case g == 0:
					if err := s.Renew(t.Context()); err != nil {
						t.Error(err)
					}
				case g == 1:
					if err := s.SetBundle(must(identity.NewBundle(td, uint64(i+2), roots))(t)); err != nil {
						t.Error(err)
					}
				default:
					changed := s.Updated()
					svid, err := s.GetX509SVID()
					if err != nil {
						t.Error(err)
						return
					}
					// A chain and a key that belong together, always.
					if !svid.PrivateKey.Public().(*ecdsa.PublicKey).Equal(svid.Certificates[0].PublicKey) {
						t.Error("half a swap")
					}
					b := must(s.GetX509BundleForTrustDomain(td))(t)
					if len(b.X509Authorities()) != 1 || changed == nil {
						t.Error("no bundle")
					}
				}
			}
		})
	}
	wg.Wait()
	if s.Bundle().Sequence() != 11 {
		t.Errorf("the last bundle is %v", s.Bundle())
	}
}
