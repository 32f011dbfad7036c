package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// DefaultRegion is the region of a controller that is told none.
const DefaultRegion = "home"

// Config says who a controller is and where its state lies.
type Config struct {
	Name        string // unique among the mesh's controllers: a DNS label
	TrustDomain spiffeid.TrustDomain
	Region      string // whose authority signs here; empty is DefaultRegion

	// Listener is where agents, people and other controllers connect; Run closes
	// it. Advertise is the HOST:PORT that they are told; empty is the listener's.
	Listener  net.Listener
	Advertise string

	// Store says where etcd is. Trust domain, clock, logger and metrics are
	// filled in from here.
	Store store.Config

	// KEKFile holds the key that seals the authorities. It is made with a new
	// mesh, and must be there with an existing one.
	KEKFile string
	// AdminCredential is the file of contexts to which a new mesh's first
	// credential is added; empty writes none.
	AdminCredential string

	Lifetimes identity.Lifetimes // zero is identity.DefaultLifetimes
	Clock     clock.Clock        // nil is the machine's
	Log       *slog.Logger
	Metrics   prometheus.Registerer // nil keeps no metrics
	Version   string
}

func (c *Config) check() error {
	if err := federation.CheckLabel(c.Name); err != nil {
		return fmt.Errorf("controller name %q: %w", c.Name, err)
	}
	if c.TrustDomain.IsZero() {
		return errors.New("no trust domain: name the mesh's, for example mesh.example.org")
	}
	if err := identity.CheckTrustDomain(c.TrustDomain); err != nil {
		return err
	}
	if c.Region == "" {
		c.Region = DefaultRegion
	}
	if err := checkRegion(c.Region); err != nil {
		return err
	}
	if c.Listener == nil || c.KEKFile == "" || c.Log == nil {
		return errors.New("a controller needs a listener, a key file and a logger")
	}
	if c.Lifetimes == (identity.Lifetimes{}) {
		c.Lifetimes = identity.DefaultLifetimes()
	}
	if err := c.Lifetimes.Check(); err != nil {
		return err
	}
	if c.Clock == nil {
		c.Clock = clock.Real()
	}
	if c.Advertise == "" {
		c.Advertise = c.Listener.Addr().String()
	}
	if _, err := federation.ParseAddress(c.Advertise); err != nil {
		return fmt.Errorf("the address that others are told: %w", err)
	}
	c.Store.TrustDomain, c.Store.Clock, c.Store.Logger, c.Store.Metrics = c.TrustDomain, c.Clock, c.Log, c.Metrics
	if c.Store.Dir != "" && c.Store.ElectionTTL == 0 {
		// Nobody but this process's own predecessor can hold the office, and
		// nothing lies between it and etcd.
		c.Store.ElectionTTL = 5 * time.Second
	}
	if c.Store.ReuseAfter == 0 {
		// The longest-lived old leaf, and an hour for clocks that differ.
		c.Store.ReuseAfter = c.Lifetimes.Leaf + min(time.Hour, c.Lifetimes.Leaf)
	}
	return nil
}

// Controller is one controller process's work. Make it with New, and Run it
// once.
type Controller struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	limits  *limits
	denials *identity.Denials
	issued  journalCount

	trust    *trust
	state    *state
	source   *identity.Source
	verifier *identity.Verifier

	// These are there once Run has opened the store.
	store    *store.Store
	sessions *sessions
	relays   *relays

	serving  chan struct{} // closed when the controller begins to serve
	draining chan struct{} // closed when it begins to stop
	streams  sync.WaitGroup
	started  time.Time

	mu    sync.Mutex
	phase string // what Run waits for; empty while it serves
}

// New checks a configuration.
func New(cfg Config) (*Controller, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	c := &Controller{
		cfg: cfg, log: cfg.Log, limits: newLimits(), denials: new(identity.Denials),
		serving: make(chan struct{}), draining: make(chan struct{}), started: cfg.Clock.Now(), phase: "not started",
	}
	c.state = newState(c.log, c.denials, c.takeBundle)
	var err error
	if c.metrics, err = newMetrics(cfg.Metrics, c.revisionNumber); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	c.trust = &trust{
		td: cfg.TrustDomain, region: cfg.Region, lifetimes: cfg.Lifetimes, kekFile: cfg.KEKFile,
		clock: cfg.Clock, log: c.log, signed: c.metrics.signed,
	}
	if err := c.newIdentity(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Controller) revisionNumber() float64 {
	now := c.state.current()
	if now == nil {
		return 0
	}
	return float64(now.Catalog.Revision().Number)
}

// Ready says what the controller still waits for, or nil while it serves.
func (c *Controller) Ready(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase != "" {
		return errors.New(c.phase)
	}
	return nil
}

// StoreReady says why etcd cannot be used now, or nil. While it is away, agents
// keep what they have, and are still sent what is known; nothing is written.
func (c *Controller) StoreReady(ctx context.Context) error {
	if err := c.Ready(ctx); err != nil {
		return errors.New("the controller does not serve")
	}
	_, err := c.store.Leader(ctx, election)
	return err
}

func (c *Controller) setPhase(phase string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.phase = phase
}

// Address is what others are told to connect to.
func (c *Controller) Address() string { return c.cfg.Advertise }

// Run opens the store, makes the mesh if there is none yet, and serves until
// ctx ends. An error means that the controller cannot do its work; it says what
// to change.
func (c *Controller) Run(ctx context.Context) (err error) {
	defer c.metrics.unregister(c.cfg.Metrics)
	defer c.cfg.Listener.Close()
	defer func() {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			err = nil
		}
	}()
	if err := c.openStore(ctx); err != nil {
		return err
	}
	defer c.store.Close()
	g, inner := errgroup.WithContext(ctx)
	watch := c.store.Watch()
	defer watch.Close()
	g.Go(func() error { return c.state.run(inner, watch) })
	g.Go(func() error {
		select {
		case err := <-c.store.Err():
			return fmt.Errorf("the store has ended: %w", err)
		case <-inner.Done():
			return nil
		}
	})
	g.Go(func() error { return c.serve(inner) })
	return g.Wait()
}

// openStore opens the store. An external etcd may start later than this
// process: it is waited for.
func (c *Controller) openStore(ctx context.Context) error {
	c.setPhase("waiting for etcd")
	for pause := time.Second; ; pause = min(2*pause, 15*time.Second) {
		s, err := store.Open(ctx, c.cfg.Store)
		if err == nil {
			c.store = s
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if c.cfg.Store.Dir != "" || !unreachable(err) {
			return err
		}
		c.setPhase("waiting for etcd: " + err.Error())
		c.log.ErrorContext(ctx, "etcd cannot be used; trying again", "error", err, "again", pause)
		if err := clock.Sleep(ctx, c.cfg.Clock, pause); err != nil {
			return err
		}
	}
}

// unreachable reports whether err says that nobody listens at an address (yet),
// or answers there: not that something is wrong with what was asked.
func unreachable(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// serve makes the controller's identity and serves until ctx ends; then it ends
// sessions and calls in order.
func (c *Controller) serve(ctx context.Context) error {
	c.setPhase("opening the authorities")
	c.trust.store = c.store
	if err := c.trust.start(ctx); err != nil {
		return err
	}
	if err := c.identify(ctx); err != nil {
		return err
	}
	c.setPhase("reading the catalog")
	if err := c.state.reached(ctx, federation.Revision{}); err != nil {
		return err
	}
	if err := c.firstCredential(ctx); err != nil {
		return err
	}
	c.sessions = &sessions{store: c.store, by: map[federation.ClusterID]*session{}, heard: map[federation.ClusterID]time.Time{}, count: func(n int) { c.metrics.sessions.Set(float64(n)) }}
	c.relays = newRelays(c)
	defer c.relays.close()
	c.store.SetController(&federationv1.ControllerState{
		Name: c.cfg.Name, Address: c.cfg.Advertise, Version: c.cfg.Version, Started: timestamppb.New(c.started),
	})

	server := c.newServer()
	inner, stop := context.WithCancel(ctx)
	defer stop()
	g, inner := errgroup.WithContext(inner)
	g.Go(func() error { return ended(inner, c.source.Run(inner)) })
	g.Go(func() error { return ended(inner, c.store.Elect(inner, election, c.cfg.Name, c.lead)) })
	g.Go(func() error {
		if err := ended(inner, server.Serve(c.cfg.Listener)); err != nil {
			return fmt.Errorf("serve %s: %w", c.cfg.Listener.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-inner.Done()
		close(c.draining)
		c.setPhase("stopping")
		c.stop(server)
		return nil
	})
	c.setPhase("")
	close(c.serving)
	c.log.InfoContext(ctx, "serving", "address", c.cfg.Listener.Addr().String(), "advertised", c.cfg.Advertise, "revision", c.state.current().Catalog.Revision().String())
	return g.Wait()
}

// stop ends calls in order, and those that are still there after stopGrace at
// once.
func (c *Controller) stop(server *grpc.Server) {
	graceful := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(graceful)
	}()
	patience := c.cfg.Clock.NewTimer(stopGrace)
	defer patience.Stop()
	select {
	case <-graceful:
	case <-patience.C():
		server.Stop()
		<-graceful
	}
	c.streams.Wait()
}

// stopGrace is how long calls may go on after the controller was told to stop.
const stopGrace = 5 * time.Second

// ended is nil for what ended because its context did.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// newIdentity makes the source of the controller's own SVID, signed by the
// region's authority that it holds, and the verifier of everybody else's. Both
// are empty until the authorities and the bundle are read.
func (c *Controller) newIdentity() error {
	id, err := identity.ControllerID(c.cfg.TrustDomain, c.cfg.Name)
	if err != nil {
		return err
	}
	subject, err := identity.ParseID(id)
	if err != nil {
		return err
	}
	self := identity.PeerAsks(identity.Peer{Subject: subject})
	issuer := identity.IssuerFunc(func(ctx context.Context, csr []byte) (identity.Issued, error) {
		who, err := identity.Admit(c.cfg.TrustDomain, self, id, csr)
		if err != nil {
			return identity.Issued{}, err
		}
		chain, err := c.trust.sign(ctx, who, 0, id.String())
		return identity.Issued{Chain: chain, Bundle: c.source.Bundle()}, err
	})
	c.source, err = identity.NewSource(identity.SourceConfig{
		ID: id, Clock: c.cfg.Clock, Issuer: issuer, Log: c.log, Metrics: c.cfg.Metrics,
	})
	if err != nil {
		return err
	}
	c.verifier = identity.NewVerifier(identity.VerifierConfig{
		Clock: c.cfg.Clock, Mesh: c.source, Operators: c.trust, Denials: c.denials, Metrics: c.cfg.Metrics,
	})
	return nil
}

// identify waits for the bundle and gets the controller's first SVID.
func (c *Controller) identify(ctx context.Context) error {
	for {
		changed := c.state.next()
		if c.source.Bundle() != nil {
			return c.source.Renew(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (c *Controller) newServer() *grpc.Server {
	g := &gate{verifier: c.verifier, roleOf: c.roleOf}
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(c.verifier.Server(identity.ServerConfig{
			SVID: c.source, Authorize: identity.AllowAny(), NextProtos: []string{"h2"},
			Operators: true, Anonymous: true, SendRoot: true,
		}))),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ChainUnaryInterceptor(c.metrics.unary, g.unary),
		grpc.ChainStreamInterceptor(c.metrics.stream, g.stream),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(1000),
		grpc.MaxHeaderListSize(16<<10),
		// A dead agent's session ends within 8 s: its silence counts from then.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 4 * time.Second, Timeout: 4 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	federationv1.RegisterEnrollServer(server, &enrollServer{c: c})
	federationv1.RegisterIssueServer(server, &issueServer{c: c})
	federationv1.RegisterSyncServer(server, &syncServer{c: c})
	federationv1.RegisterAdminServer(server, &adminServer{c: c})
	return server
}

// maxMessage bounds what one message may hold.
const maxMessage = 4 << 20

// takeBundle brings a stored bundle into force here.
func (c *Controller) takeBundle(b federation.Bundle) {
	roots, err := identity.ParseRawChain(b.Roots)
	if err == nil {
		var bundle *identity.Bundle
		if bundle, err = identity.NewBundle(b.TrustDomain, b.Sequence, roots); err == nil {
			err = c.source.SetBundle(bundle)
		}
	}
	if err != nil {
		c.log.Error("the stored bundle is not taken", "sequence", b.Sequence, "error", err)
	}
}

// bundle is the trust bundle as it is handed out.
func (c *Controller) bundle() (*federationv1.Bundle, error) {
	f, ok := c.state.fact(federationv1.BundleKey())
	if !ok {
		return nil, status.Error(codes.Unavailable, "the trust bundle is not read yet: try again")
	}
	return federationv1.EncodeBundle(f.Body.(federation.Bundle)), nil
}

// roleOf is a person's role, read anew for each call: a role that was taken
// away is gone at once. What the store does not answer is refused.
func (c *Controller) roleOf(ctx context.Context, name string) (role, error) {
	text, err := c.store.OperatorRole(ctx, name)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return 0, status.Errorf(codes.PermissionDenied, "operator %q has no role in this mesh (any more): ask an admin for one", name)
	case err != nil:
		return 0, c.storeError(err)
	}
	r, ok := parseRole(text)
	if !ok {
		return 0, status.Errorf(codes.PermissionDenied, "operator %q has the role %q, which this version does not know", name, text)
	}
	return r, nil
}

// addresses are where the mesh's controllers are reached, this one first.
func (c *Controller) addresses(context.Context) []string {
	out := []string{c.cfg.Advertise}
	for _, other := range c.store.Controllers() {
		if a := other.GetAddress(); a != "" && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}
