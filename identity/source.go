package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation/clock"
)

// Errors of a Source that has nothing to give, or is given something it
// must not take; test for them with errors.Is.
var (
	ErrNoSVID    = errors.New("this process has no SVID yet")
	ErrExpired   = errors.New("this process's SVID has expired and could not be renewed")
	ErrOldBundle = errors.New("the bundle is older than the one in use")
)

// Issued is the answer to a CSR: the chain, leaf first and without the root,
// and the bundle as the issuer knows it (nil if it has nothing to say).
type Issued struct {
	Chain  []*x509.Certificate
	Bundle *Bundle
}

// Issuer turns a CSR into a chain, over whatever connection it likes. It is
// called by one goroutine at a time.
type Issuer interface {
	Issue(ctx context.Context, csr []byte) (Issued, error)
}

// IssuerFunc is a function as an Issuer.
type IssuerFunc func(ctx context.Context, csr []byte) (Issued, error)

// Issue calls f.
func (f IssuerFunc) Issue(ctx context.Context, csr []byte) (Issued, error) { return f(ctx, csr) }

// SourceConfig is what a Source needs; State and Metrics may be nil.
type SourceConfig struct {
	ID     spiffeid.ID // the only identity that the source takes
	Clock  clock.Clock
	Issuer Issuer // for renewals
	// State keeps SVID, key and bundle over restarts, so that a process starts
	// while its issuer is away.
	State *StateFile
	// Timeout bounds one attempt, in the clock's time; 0 means a minute.
	Timeout time.Duration
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

const (
	issueTimeout  = time.Minute
	firstBackOff  = time.Second
	longestPause  = 5 * time.Minute  // between attempts while the issuer is away
	shortestPause = 10 * time.Second // between renewals that succeed, so that an issuer near its own end is not asked in a loop
)

// Source is a process's own identity, live: its key, its SVID and its trust
// bundle. It implements x509svid.Source, x509bundle.Source and TrustSource.
// Readers never wait and never see half a change; connections that are open
// are not touched by one. The key is made here, replaced at every renewal, and
// leaves only into the sealed State.
type Source struct {
	config SourceConfig
	now    atomic.Pointer[sourceState]
	kick   chan struct{} // asks Run to renew at once; room for one

	issuing sync.Mutex // one attempt at a time; taken before mu
	mu      sync.Mutex // orders changes of now, and the writes of State

	expiry, sequence prometheus.Gauge
	renewals         *prometheus.CounterVec
	unsaved          prometheus.Counter
}

var (
	_ x509svid.Source   = (*Source)(nil)
	_ x509bundle.Source = (*Source)(nil)
	_ TrustSource       = (*Source)(nil)
)

// sourceState is immutable. Everything but changed may be nil.
type sourceState struct {
	svid    *x509svid.SVID
	bundle  *Bundle
	pending *ecdsa.PrivateKey // of an enrolment whose answer has not come
	changed chan struct{}     // closed when this state is replaced
}

// NewSource makes a source that has nothing yet: Restore, Enrol, Renew or Run
// fill it.
func NewSource(c SourceConfig) (*Source, error) {
	if _, err := ParseID(c.ID); err != nil {
		return nil, err
	}
	if c.Clock == nil || c.Log == nil {
		return nil, fmt.Errorf("identity: the source of %s needs a clock and a logger", c.ID)
	}
	if c.Timeout <= 0 {
		c.Timeout = issueTimeout
	}
	s := &Source{
		config: c,
		kick:   make(chan struct{}, 1),
		expiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_svid_expiry_timestamp_seconds",
			Help: "When this process's SVID ends, in Unix seconds; 0 without one.",
		}),
		sequence: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_bundle_sequence",
			Help: "Sequence number of the trust bundle in use.",
		}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_svid_renewals_total",
			Help: "Attempts to get an SVID, by result: renewed or failed.",
		}, []string{"result"}),
		unsaved: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_svid_state_write_failures_total",
			Help: "Changes of SVID or bundle that could not be written to disk and would be lost by a restart.",
		}),
	}
	if err := errors.Join(
		register(c.Metrics, &s.expiry), register(c.Metrics, &s.sequence),
		register(c.Metrics, &s.renewals), register(c.Metrics, &s.unsaved),
	); err != nil {
		return nil, fmt.Errorf("identity: metrics of the %s: %w", s, err)
	}
	s.now.Store(&sourceState{changed: make(chan struct{})})
	return s, nil
}

// ID is the source's identity.
func (s *Source) ID() spiffeid.ID { return s.config.ID }

// String names the source; it never holds the key.
func (s *Source) String() string { return "source of " + s.config.ID.String() }

// GoString keeps %#v from printing the key.
func (s *Source) GoString() string { return s.String() }

// LogValue logs the identity.
func (s *Source) LogValue() slog.Value { return slog.StringValue(s.config.ID.String()) }

// GetX509SVID is the present SVID. The error is ErrNoSVID before the first,
// and ErrExpired after the end of the last: nobody would accept it any more.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	svid := s.now.Load().svid
	if svid == nil {
		return nil, fmt.Errorf("identity: %w (%s)", ErrNoSVID, s.config.ID)
	}
	if end := svid.Certificates[0].NotAfter; s.config.Clock.Now().After(end) {
		return nil, fmt.Errorf("identity: %w: %s ended at %s: is the controller reachable, and the clock right?", ErrExpired, s.config.ID, end.UTC().Format(time.RFC3339))
	}
	return svid, nil
}

// Bundle is the present trust bundle, or nil.
func (s *Source) Bundle() *Bundle { return s.now.Load().bundle }

// GetX509BundleForTrustDomain makes s an x509bundle.Source.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := s.Bundle()
	if b == nil {
		return nil, fmt.Errorf("identity: no trust bundle yet (%s)", s.config.ID)
	}
	return b.GetX509BundleForTrustDomain(td)
}

// Updated is closed at the next change of SVID or bundle. Take it first, then
// read, then wait for it: no change is missed so.
func (s *Source) Updated() <-chan struct{} { return s.now.Load().changed }

// SetBundle takes a newer bundle. The same one again is fine; one of a lower
// sequence, or of the same with other roots, is refused as ErrOldBundle, so
// that a replayed or stale bundle brings no retired root back. If the own
// chain leads to none of the new roots, Run renews at once.
func (s *Source) SetBundle(b *Bundle) error {
	if b == nil {
		return errors.New("identity: no bundle to set")
	}
	if td := s.config.ID.TrustDomain(); b.TrustDomain() != td {
		return fmt.Errorf("identity: the %s is not of the own trust domain %s", b, td)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.now.Load()
	switch {
	case old.bundle.Equal(b):
		return nil
	case old.bundle != nil && b.Sequence() <= old.bundle.Sequence():
		return fmt.Errorf("identity: %w: the %s is in use, and was to be replaced by the %s", ErrOldBundle, old.bundle, b)
	}
	s.saved(s.publish(sourceState{svid: old.svid, bundle: b, pending: old.pending}))
	if old.svid != nil && s.checkChain(old.svid.Certificates, b) != nil {
		s.RenewNow()
	}
	return nil
}

// RenewNow asks Run for a renewal without waiting for its time: after an
// authority was tainted, for example.
func (s *Source) RenewNow() {
	select {
	case s.kick <- struct{}{}:
	default: // one is asked for already
	}
}

// Restore takes what State holds. The error is fs.ErrNotExist where there is
// nothing, else ErrWrongKey, ErrSealBroken or ErrStateDamaged. An expired SVID
// is restored too: it can still prove who renews (Prove).
func (s *Source) Restore() error {
	if s.config.State == nil {
		return fmt.Errorf("identity: the %s keeps no state on disk", s)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	state, err := s.config.State.load(s.config.ID)
	if err != nil {
		return err
	}
	s.publish(state)
	return nil
}

// Enrol gets the first SVID from an issuer of its own, the holder of a join
// token. A token works for one key, so the key is kept (on disk, if there is
// State) before the first attempt and used again by later ones, until one
// succeeds: an answer that got lost does not burn the token.
func (s *Source) Enrol(ctx context.Context, by Issuer) error {
	s.issuing.Lock()
	defer s.issuing.Unlock()
	key, err := s.pendingKey()
	if err != nil {
		return err
	}
	return s.issue(ctx, by, key)
}

// pendingKey is the key to enrol with, which a crash must not lose.
func (s *Source) pendingKey() (*ecdsa.PrivateKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.now.Load()
	if old.pending != nil {
		return old.pending, nil
	}
	key, err := NewKey()
	if err != nil {
		return nil, err
	}
	next := sourceState{svid: old.svid, bundle: old.bundle, pending: key}
	if s.config.State != nil {
		if err := s.config.State.save(s.config.ID, next); err != nil {
			return nil, err
		}
	}
	s.publish(next)
	return key, nil
}

// Renew gets a new SVID for a new key from the configured issuer, once.
func (s *Source) Renew(ctx context.Context) error {
	if s.config.Issuer == nil {
		return fmt.Errorf("identity: the %s has no issuer", s)
	}
	s.issuing.Lock()
	defer s.issuing.Unlock()
	key, err := NewKey()
	if err != nil {
		return err
	}
	return s.issue(ctx, s.config.Issuer, key)
}

// Run keeps the SVID fresh until ctx ends, and returns ctx's error. It renews
// at a random point between 40 and 50 % of the SVID's life; while the issuer
// is away it tries again, ever more slowly, up to every 5 minutes, and the
// source serves what it has.
func (s *Source) Run(ctx context.Context) error {
	failures := 0
	next := s.renewalPoint()
	for {
		if err := s.waitUntil(ctx, next); err != nil {
			return err
		}
		err := s.Renew(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			wait := backOff(failures)
			next = s.config.Clock.Now().Add(wait)
			failures++
			s.logFailure(ctx, err, failures, wait)
			continue
		}
		failures = 0
		next = s.renewalPoint()
		if soonest := s.config.Clock.Now().Add(shortestPause); next.Before(soonest) {
			next = soonest
		}
	}
}

// waitUntil ends at a time, at a kick, or with ctx, whose error it returns. It
// looks at the clock again and again, for a timer of hours stands still while
// a machine sleeps, and certificates do not.
func (s *Source) waitUntil(ctx context.Context, t time.Time) error {
	t = t.Round(0) // without its monotonic reading, which sleeps, too
	for {
		left := t.Sub(s.config.Clock.Now())
		if left <= 0 {
			return ctx.Err()
		}
		timer := s.config.Clock.NewTimer(min(left, longestPause))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-s.kick:
			timer.Stop()
			return nil
		case <-timer.C():
		}
	}
}

// renewalPoint is when to renew the present SVID.
func (s *Source) renewalPoint() time.Time {
	svid := s.now.Load().svid
	if svid == nil {
		return s.config.Clock.Now()
	}
	leaf := svid.Certificates[0]
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	return leaf.NotBefore.Add(time.Duration((0.4 + 0.1*rand.Float64()) * float64(life)))
}

// backOff doubles from a second to five minutes, and takes a random half off,
// so that the clients of an issuer that returns do not all come at once.
func backOff(failures int) time.Duration {
	d := longestPause
	if failures < 9 {
		d = min(longestPause, firstBackOff<<failures)
	}
	return d/2 + rand.N(d/2+1)
}

func (s *Source) logFailure(ctx context.Context, err error, failures int, wait time.Duration) {
	level, left := slog.LevelWarn, time.Duration(0)
	if svid := s.now.Load().svid; svid != nil {
		left = svid.Certificates[0].NotAfter.Sub(s.config.Clock.Now())
	}
	if left <= 0 {
		level = slog.LevelError
	}
	s.config.Log.Log(ctx, level, "cannot renew the own SVID; what there is stays in use until its end",
		"id", s.config.ID.String(), "left", left.Round(time.Second), "failures", failures, "next", wait.Round(time.Second), "err", err)
}

// issue makes one attempt with key. issuing is held.
func (s *Source) issue(ctx context.Context, by Issuer, key *ecdsa.PrivateKey) (err error) {
	defer func() {
		result := "renewed"
		if err != nil {
			result = "failed"
		}
		s.renewals.WithLabelValues(result).Inc()
	}()
	csr, err := NewCSR(key)
	if err != nil {
		return err
	}
	ctx, cancel := s.withTimeout(ctx)
	defer cancel()
	issued, err := by.Issue(ctx, csr)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		return fmt.Errorf("identity: no SVID for %s: %w", s.config.ID, err)
	}
	return s.adopt(issued, key)
}

// withTimeout bounds one attempt in the clock's time.
func (s *Source) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := s.config.Clock.NewTimer(s.config.Timeout)
	done := make(chan struct{})
	go func() {
		select {
		case <-timer.C():
			cancel(fmt.Errorf("the issuer has not answered for %v", s.config.Timeout))
		case <-done:
		}
	}()
	return ctx, func() { close(done); timer.Stop(); cancel(nil) }
}

// adopt takes an answer after checking that it is ours: key, identity, and a
// chain that peers with the new bundle will accept now.
func (s *Source) adopt(issued Issued, key *ecdsa.PrivateKey) error {
	if len(issued.Chain) == 0 || len(issued.Chain) > maxChain {
		return fmt.Errorf("identity: the issuer answered for %s with a chain of %d certificates", s.config.ID, len(issued.Chain))
	}
	if !key.PublicKey.Equal(issued.Chain[0].PublicKey) {
		return fmt.Errorf("identity: the issuer answered for %s with another key's certificate", s.config.ID)
	}
	if b := issued.Bundle; b != nil && b.TrustDomain() != s.config.ID.TrustDomain() {
		return fmt.Errorf("identity: the issuer answered for %s with the %s", s.config.ID, b)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.now.Load()
	bundle := old.bundle
	if bundle == nil || issued.Bundle != nil && issued.Bundle.Sequence() > bundle.Sequence() {
		bundle = issued.Bundle
	}
	if bundle == nil {
		return fmt.Errorf("identity: the issuer answered for %s without a bundle, and there is none here", s.config.ID)
	}
	if err := s.checkChain(issued.Chain, bundle); err != nil {
		return fmt.Errorf("identity: the issuer answered for %s with a chain that peers would refuse: %w", s.config.ID, err)
	}
	pending := old.pending
	if pending != nil && pending.Equal(key) {
		pending = nil
	}
	svid := &x509svid.SVID{ID: s.config.ID, Certificates: issued.Chain, PrivateKey: key}
	s.saved(s.publish(sourceState{svid: svid, bundle: bundle, pending: pending}))
	s.config.Log.Info("got an SVID", "id", s.config.ID.String(), "serial", SerialOf(issued.Chain[0]),
		"notAfter", issued.Chain[0].NotAfter.UTC(), "bundleSequence", bundle.Sequence())
	return nil
}

func (s *Source) checkChain(chain []*x509.Certificate, bundle *Bundle) error {
	at := s.config.Clock.Now()
	id, _, err := x509svid.Verify(chain, readOnly{bundle}, x509svid.WithTime(at))
	if err != nil {
		return &VerifyError{why: explain(err, chain[0], bundle, at), err: err}
	}
	if id != s.config.ID {
		return fmt.Errorf("it is for %s", id)
	}
	return nil
}

// publish makes next the present state. mu is held.
func (s *Source) publish(next sourceState) sourceState {
	next.changed = make(chan struct{})
	old := s.now.Swap(&next)
	close(old.changed)
	if next.svid != nil {
		s.expiry.Set(float64(next.svid.Certificates[0].NotAfter.Unix()))
	}
	if next.bundle != nil {
		s.sequence.Set(float64(next.bundle.Sequence()))
	}
	return next
}

// saved writes a state that is in use already. A disk that fails costs the
// next restart, not this process: what is in memory is as good. mu is held.
func (s *Source) saved(state sourceState) {
	if s.config.State == nil {
		return
	}
	if err := s.config.State.save(s.config.ID, state); err != nil {
		s.unsaved.Inc()
		s.config.Log.Error("cannot save the own SVID; a restart would lose it", "id", s.config.ID.String(), "err", err)
	}
}

// register puts a metric into a registry (nil is none), or takes the one of
// the same name that is there: a process may make its source or its verifier
// again, and goes on counting.
func register[C prometheus.Collector](registry prometheus.Registerer, metric *C) error {
	if registry == nil {
		return nil
	}
	err := registry.Register(*metric)
	if known := (prometheus.AlreadyRegisteredError{}); errors.As(err, &known) {
		if same, ok := known.ExistingCollector.(C); ok {
			*metric, err = same, nil
		}
	}
	return err
}
