package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/gateway"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// Config is what a gateway or proxy is told by its operator; everything else
// comes from its agent.
type Config struct {
	// Agent is the socket of the agent that stands for this process's identity:
	// unix:PATH.
	Agent    string
	Name     string // in the agent's status; no identity
	StateDir string // for key and SVID; this process's own
	// Engine is BuiltIn, as it is if empty, or External.
	Engine string
	// SDSSocket and Bootstrap are for an external engine: the unix socket on
	// which it gets key and SVID, and the file that it is to be started with.
	SDSSocket, Bootstrap string
	// Drain is how long open connections may go on after Run's context ended.
	Drain time.Duration

	Access  func(gateway.Record) // gets every connection that ended; may be nil
	Version string
	Clock   clock.Clock
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Process is one gateway or proxy.
type Process struct {
	config Config
	conn   *grpc.ClientConn
	beside *beside // of an external engine; nil with the built-in one
	// who is nil until the identity is known and has an SVID.
	who atomic.Pointer[self]

	mu     sync.Mutex
	traces map[string]bool // source addresses whose record the agent wants
	send   chan *federationv1.AttachRequest
}

// self is what a process knows of itself.
type self struct {
	subject  identity.Subject
	source   *identity.Source
	denials  *identity.Denials
	verifier *identity.Verifier
	// The built-in engine and its configuration, or what serves the key to the
	// external one; the others are nil.
	engine *gateway.Engine
	client *xds.Client
	leaf   *xds.LeafServer
}

const (
	identityFile = "identity" // SPIFFE ID and region, in clear: the state beside it is sealed for the ID
	keyFile      = "seal.key"
	stateFile    = "svid"
	retryAfter   = time.Second
)

// New checks the settings. It neither listens nor connects.
func New(c Config) (*Process, error) {
	path, ok := strings.CutPrefix(c.Agent, "unix:")
	if !ok || path == "" {
		return nil, fmt.Errorf("agent %q: write it as unix:PATH, the socket of the agent that stands for this process's identity (its setting 'sockets')", c.Agent)
	}
	if c.StateDir == "" {
		return nil, errors.New("no state folder: the process keeps its key and SVID there")
	}
	if c.Name == "" {
		return nil, errors.New("no name for the agent's status")
	}
	var outside *beside
	switch c.Engine {
	case "", BuiltIn:
		if c.SDSSocket != "" || c.Bootstrap != "" {
			return nil, errors.New("--sds-socket and --bootstrap are for an external engine: leave them out, or add --engine external")
		}
		c.Engine = BuiltIn
	case External:
		var err error
		if outside, err = newBeside(path, &c); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("--engine %q: there are %s and %s", c.Engine, BuiltIn, External)
	}
	// A unix socket carries no credential of its own: who may open it is the
	// file system's to say.
	conn, err := grpc.NewClient("unix:"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)
	if err != nil {
		return nil, err
	}
	return &Process{config: c, conn: conn, beside: outside, traces: map[string]bool{}, send: make(chan *federationv1.AttachRequest, 256)}, nil
}

// Ready says what is missing until the process carries traffic.
func (p *Process) Ready(context.Context) error {
	w := p.who.Load()
	if w == nil {
		return fmt.Errorf("no identity yet: is the agent at %s up, and its controller, for the first SVID?", p.config.Agent)
	}
	if w.engine == nil {
		if err := w.engineReady(p.beside); err != nil {
			return err
		}
	} else {
		select {
		case <-w.client.Ready():
		default:
			return fmt.Errorf("no configuration from the agent at %s yet", p.config.Agent)
		}
	}
	_, err := w.source.GetX509SVID()
	return err
}

// Run works until ctx ends; then the built-in engine drains within
// Config.Drain. An external engine goes on: it has its key and what the agent
// serves.
func (p *Process) Run(ctx context.Context) error {
	defer p.conn.Close()
	if err := os.MkdirAll(p.config.StateDir, 0o700); err != nil {
		return err
	}
	w, err := p.identify(ctx)
	if err != nil {
		return err
	}
	p.config.Log.Info("identity", "id", w.subject.ID.String())
	p.who.Store(w)

	// The connection to the agent outlives ctx: while the engine drains, the
	// agent still hears from it.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	failed := make(chan error, 1)
	wg.Go(func() { _ = w.source.Run(work) })
	wg.Go(func() { p.attach(work, w) })
	wg.Go(func() {
		if err := p.drive(work, w); err != nil && work.Err() == nil {
			failed <- err
		}
	})
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	if w.engine != nil {
		p.drain(w.engine)
	}
	return err
}

// drive serves the engine with what it needs, until ctx ends.
func (p *Process) drive(ctx context.Context, w *self) error {
	if w.engine == nil {
		return p.serveLeaf(ctx, w)
	}
	return w.client.Run(ctx)
}

// drain lets open connections end, and names those that did not.
func (p *Process) drain(e *gateway.Engine) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	timer := p.config.Clock.NewTimer(p.config.Drain)
	defer timer.Stop()
	go func() {
		select {
		case <-timer.C():
			cancel()
		case <-ctx.Done():
		}
	}()
	p.config.Log.Info("draining", "connections", e.Connections(), "atMost", p.config.Drain)
	for _, r := range e.Drain(ctx) {
		p.config.Log.Warn("connection cut by the end of the drain", "access", r)
	}
	e.Close()
}

// identify learns the process's identity and gets its first SVID: from the
// disk, or from the agent, for which it waits.
func (p *Process) identify(ctx context.Context) (*self, error) {
	kek, err := identity.LoadOrCreateKEK(filepath.Join(p.config.StateDir, keyFile))
	if err != nil {
		return nil, err
	}
	answer := p.ask(ctx)
	saved, region, err := p.saved()
	if err != nil {
		return nil, err
	}
	if answer == nil && saved.IsZero() {
		answer, err = p.wait(ctx)
		if err != nil {
			return nil, err
		}
	}
	id := saved
	if answer != nil {
		region = answer.GetRegion()
		if id, err = spiffeid.FromString(answer.GetSpiffeId()); err != nil {
			return nil, fmt.Errorf("the agent's answer: %w", err)
		}
	}
	w, err := p.newSelf(id, region, identity.NewStateFile(filepath.Join(p.config.StateDir, stateFile), kek))
	if err != nil {
		return nil, err
	}
	if err := w.source.Restore(); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			p.config.Log.Warn("the saved SVID cannot be used; asking for another", "error", err)
		}
	}
	for {
		if _, err := w.source.GetX509SVID(); err == nil {
			break
		}
		if err := w.source.Renew(ctx); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			p.config.Log.Info("waiting for the first SVID", "error", err)
			if err := clock.Sleep(ctx, p.config.Clock, retryAfter); err != nil {
				return nil, err
			}
		}
	}
	return w, os.WriteFile(filepath.Join(p.config.StateDir, identityFile), []byte(id.String()+" "+region+"\n"), 0o600)
}

// ask is one attempt to hear from the agent.
func (p *Process) ask(ctx context.Context) *federationv1.IdentifyResponse {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := federationv1.NewLocalClient(p.conn).Identify(ctx, &federationv1.IdentifyRequest{})
	if err != nil {
		p.config.Log.Info("the agent does not answer yet", "agent", p.config.Agent, "error", err)
		return nil
	}
	return r
}

func (p *Process) wait(ctx context.Context) (*federationv1.IdentifyResponse, error) {
	for {
		if err := clock.Sleep(ctx, p.config.Clock, retryAfter/4); err != nil {
			return nil, err
		}
		if r := p.ask(ctx); r != nil {
			return r, nil
		}
	}
}

// saved is the identity and region of the last start, or zero.
func (p *Process) saved() (id spiffeid.ID, region string, err error) {
	path := filepath.Join(p.config.StateDir, identityFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return spiffeid.ID{}, "", nil
	}
	if err != nil {
		return spiffeid.ID{}, "", err
	}
	text, region, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	id, err = spiffeid.FromString(text)
	if err != nil {
		return spiffeid.ID{}, "", fmt.Errorf("%s: %w: remove the file to ask the agent anew", path, err)
	}
	return id, region, nil
}

// newSelf makes what the identity id needs. Logs and metrics say from here on
// where they come from.
func (p *Process) newSelf(id spiffeid.ID, region string, state *identity.StateFile) (*self, error) {
	subject, err := identity.ParseID(id)
	if err != nil {
		return nil, err
	}
	labels := prometheus.Labels{"cluster": string(subject.Cluster), "region": region}
	p.config.Metrics = prometheus.WrapRegistererWith(labels, p.config.Metrics)
	p.config.Log = p.config.Log.With("cluster", subject.Cluster, "region", region)
	w := &self{subject: subject, denials: &identity.Denials{}}
	w.source, err = identity.NewSource(identity.SourceConfig{
		ID: id, Clock: p.config.Clock, State: state, Log: p.config.Log, Metrics: p.config.Metrics,
		Issuer: identity.IssuerFunc(func(ctx context.Context, csr []byte) (identity.Issued, error) {
			r, err := federationv1.NewLocalClient(p.conn).Issue(ctx, &federationv1.LocalIssueRequest{Csr: csr})
			if err != nil {
				return identity.Issued{}, err
			}
			return issued(r)
		}),
	})
	if err != nil {
		return nil, err
	}
	w.verifier = identity.NewVerifier(identity.VerifierConfig{
		Clock: p.config.Clock, Mesh: w.source, Denials: w.denials, Metrics: p.config.Metrics,
	})
	if p.config.Engine == External {
		w.leaf = xds.NewLeafServer(w.source, p.config.Clock, p.config.Log)
		return w, nil
	}
	w.engine, err = gateway.New(gateway.Config{
		Cluster: subject.Cluster, SVID: w.source, Verifier: w.verifier,
		Clock: p.config.Clock, Log: p.config.Log, Access: p.record, Metrics: p.config.Metrics,
	})
	if err != nil {
		return nil, err
	}
	w.client = xds.NewClient(xds.ClientConfig{
		Conn: p.conn, NodeID: p.config.Name, NodeCluster: subject.Role.String(),
		Apply: w.engine.Apply, Clock: p.config.Clock, Logger: p.config.Log,
	})
	return w, nil
}

func issued(r *federationv1.LocalIssueResponse) (identity.Issued, error) {
	chain, err := identity.ParseRawChain(r.GetChain().GetCertificates())
	if err != nil {
		return identity.Issued{}, err
	}
	bundle, err := bundleOf(r.GetBundle())
	return identity.Issued{Chain: chain, Bundle: bundle}, err
}

// bundleOf reads a bundle from the wire; nil stays nil.
func bundleOf(m *federationv1.Bundle) (*identity.Bundle, error) {
	if m == nil {
		return nil, nil //nolint:nilnil // no bundle is no mistake: the issuer has nothing to say
	}
	b, err := m.Decode()
	if err != nil {
		return nil, err
	}
	roots, err := identity.ParseRawChain(b.Roots)
	if err != nil {
		return nil, err
	}
	return identity.NewBundle(b.TrustDomain, b.Sequence, roots)
}
