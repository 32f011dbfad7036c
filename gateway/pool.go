package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

const (
	// deadPeer is how long a tunnel's peer may acknowledge nothing.
	deadPeer = 5 * time.Second
	// hedgeLeast is the least time before a second attempt to connect runs
	// beside the first: a lost SYN is sent again only after a second.
	hedgeLeast = 250 * time.Millisecond
	// crowded is how many streams a tunnel has when another is opened beside it.
	crowded = 4
	// retryAfter is the pause after an attempt that failed, before one for which
	// nobody waits.
	retryAfter = 2 * time.Second
	// reopens bounds how often a stream that met a closing, full or workless
	// tunnel moves to another one to the same address.
	reopens = 4
)

// poolKey tells tunnels apart that must not be shared: another address, name,
// or set of servers that would be believed.
type poolKey struct {
	addr             netip.AddrPort
	sni, trust, sans string
}

func keyOf(addr netip.AddrPort, t *xds.ClientTLS) poolKey {
	sans := slices.Sorted(slices.Values(t.SANs))
	return poolKey{addr: addr, sni: t.SNI, trust: t.Trust, sans: strings.Join(sans, "\n")}
}

// pool is the tunnels to one gateway, or to one service's proxies behind one.
type pool struct {
	e      *Engine
	key    poolKey
	config *tls.Config

	mu      sync.Mutex
	cluster federation.ClusterID
	limits  xds.Tunnels
	timeout time.Duration // for a connection, with its handshake
	wanted  bool          // the configuration names it
	warm    bool          // a tunnel is kept open, and probed
	many    bool          // behind the address stand many servers, one at the end of each tunnel
	closed  bool
	tunnels []*outTunnel
	dialing *dialCall
	retryAt time.Time // of the next attempt that nobody waits for
	probe   Probe
}

// dialCall is an attempt to connect that many may wait for.
type dialCall struct {
	done chan struct{}
	err  error
}

// outTunnel is a tunnel that this engine opened.
type outTunnel struct {
	*tunnel.Tunnel
	verifier *identity.Verifier
	state    tls.ConnectionState
	peer     string
	pinging  atomic.Bool
}

func (t *outTunnel) trusted() error { return t.verifier.Recheck(t.state) }
func (t *outTunnel) peerID() string { return t.peer }
func (t *outTunnel) cut()           { go t.Close() }

// pool finds or makes the pool of an endpoint's tunnels. Callers hold no lock.
func (e *Engine) pool(c *candidate, config *xds.Cluster, t *xds.ClientTLS) *pool {
	key := keyOf(c.Addr, t)
	e.mu.Lock()
	p := e.pools[key]
	if p == nil {
		sans := slices.Clone(t.SANs)
		trust := t.Trust
		tlsConfig := e.cfg.Verifier.Client(identity.ClientConfig{
			SVID: e.cfg.SVID, NextProtos: []string{tunnel.ALPN},
			Authorize: func(p identity.Peer) error { return e.authorizeServer(p, trust, sans) },
		})
		tlsConfig.ServerName = t.SNI
		p = &pool{e: e, key: key, config: tlsConfig, wanted: true, warm: strings.HasSuffix(t.SNI, ".t.weft")}
		p.many = strings.HasSuffix(t.SNI, ".p.weft")
		p.probe = Probe{Address: c.Addr, Since: e.clock.Now()}
		e.pools[key] = p
	}
	e.mu.Unlock()
	p.mu.Lock()
	p.limits, p.timeout, p.cluster = *config.Tunnels, config.ConnectTimeout, c.locality.Cluster
	p.probe.Cluster = p.cluster
	p.mu.Unlock()
	return p
}

// authorizeServer admits the servers that the endpoint's TLS names.
func (e *Engine) authorizeServer(p identity.Peer, trust string, sans []string) error {
	id := p.ID.String()
	t := e.config.Load().Trust[trust]
	switch {
	case t == nil:
		return fmt.Errorf("trust %q is not known yet", trust)
	case !slices.Contains(sans, id) || !t.Admits(id):
		return fmt.Errorf("the server is %s, want %s", id, strings.Join(sans, " or "))
	}
	return nil
}

// stream opens a stream on a warm tunnel, or on a new one.
func (p *pool) stream(ctx context.Context, r tunnel.Request) (*tunnel.Stream, tunnel.Response, *outTunnel, error) {
	for try := 1; ; try++ {
		t, err := p.tunnel(ctx)
		if err != nil {
			return nil, tunnel.Response{}, nil, err
		}
		s, resp, err := t.Open(ctx, r)
		if err == nil {
			return s, resp, t, nil
		}
		// A tunnel that ended, or was filled by others, says nothing of the far
		// side: another one may do.
		var oe *tunnel.OpenError
		moved := errors.As(err, &oe) && oe.Safe && (errors.Is(err, tunnel.ErrFull) || t.Draining())
		// A proxy whose own workload is dead says nothing of the other proxies of
		// the service: its tunnel gets no more streams, and another tunnel ends,
		// in its turn, at another proxy.
		var refusal *tunnel.Refusal
		if p.many && errors.As(err, &refusal) && refusal.Status == http.StatusServiceUnavailable {
			t.Drain()
			moved = true
		}
		if !moved || try == reopens || ctx.Err() != nil {
			return nil, tunnel.Response{}, t, err
		}
	}
}

// tunnel is the one with the fewest streams, or a new one.
func (p *pool) tunnel(ctx context.Context) (*outTunnel, error) {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, net.ErrClosed
		}
		p.prune()
		best, fewest := (*outTunnel)(nil), 0
		for _, t := range p.tunnels {
			if n := t.Stats().Active; t.Room() > 0 && (best == nil || n < fewest) {
				best, fewest = t, n
			}
		}
		if best != nil {
			if fewest >= crowded && len(p.tunnels) < p.e.cfg.Tunnels && !p.e.clock.Now().Before(p.retryAt) {
				p.dial()
			}
			p.mu.Unlock()
			return best, nil
		}
		d := p.dial()
		p.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// prune forgets tunnels that take no more streams; they live on by themselves.
// Callers hold mu.
func (p *pool) prune() {
	p.tunnels = slices.DeleteFunc(p.tunnels, func(t *outTunnel) bool { return t.Draining() })
}

// dial begins an attempt to connect, unless one is under way. Callers hold mu.
func (p *pool) dial() *dialCall {
	if p.dialing != nil {
		return p.dialing
	}
	d := &dialCall{done: make(chan struct{})}
	p.dialing = d
	timeout, limits := cmp.Or(p.timeout, time.Second), p.limits.HTTP2
	hedge := max(3*p.probe.RTT, hedgeLeast)
	p.e.work.Go(func() {
		t, rtt, err := p.connect(timeout, hedge, limits)
		p.mu.Lock()
		p.dialing = nil
		d.err = err
		switch {
		case err != nil:
			p.retryAt = p.e.clock.Now().Add(retryAfter)
			if p.prune(); len(p.tunnels) == 0 {
				p.answered(false, 0)
			}
		case p.closed:
			d.err = net.ErrClosed
		default:
			p.tunnels = append(p.tunnels, t)
			p.answered(true, rtt)
		}
		closed := p.closed
		p.mu.Unlock()
		if t != nil && closed {
			t.Close()
		}
		close(d.done)
	})
	return d
}

// connect makes a tunnel: TCP, TLS, and the peer's SETTINGS, which prove that
// it has accepted our certificate. If the first attempt is slow a second runs
// beside it.
func (p *pool) connect(timeout, hedge time.Duration, limits xds.HTTP2) (*outTunnel, time.Duration, error) {
	ctx, cancel := withTimeout(p.e.life, p.e.clock, timeout)
	defer cancel()
	type result struct {
		t   *outTunnel
		rtt time.Duration
		err error
	}
	results := make(chan result, 2)
	try := func() {
		p.e.work.Go(func() {
			t, rtt, err := p.connectOnce(ctx, limits)
			results <- result{t, rtt, err}
		})
	}
	try()
	running := 1
	timer := p.e.clock.NewTimer(hedge)
	defer timer.Stop()
	for {
		select {
		case <-timer.C():
			if hedge < timeout {
				running++
				try()
			}
		case r := <-results:
			running--
			if r.err != nil && running > 0 {
				continue // the other may still make it
			}
			if running > 0 {
				p.e.work.Go(func() { // the loser may have won later
					if r := <-results; r.t != nil {
						r.t.Close()
					}
				})
			}
			outcome := "accepted"
			if r.err != nil {
				outcome = "failed"
			}
			p.e.metrics.handshakes.WithLabelValues("client", outcome).Inc()
			return r.t, r.rtt, r.err
		}
	}
}

func (p *pool) connectOnce(ctx context.Context, limits xds.HTTP2) (*outTunnel, time.Duration, error) {
	began := p.e.clock.Now()
	dialer := net.Dialer{KeepAlive: -1}
	c, err := dialer.DialContext(ctx, "tcp", p.key.addr.String())
	if err != nil {
		return nil, 0, because(ctx, err)
	}
	rtt := p.e.clock.Now().Sub(began)
	if err := tunnel.DetectDeadPeer(c.(*net.TCPConn), deadPeer); err != nil {
		c.Close()
		return nil, 0, err
	}
	tc := tls.Client(tunnel.NewWire(c), p.config)
	if err := tc.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, 0, because(ctx, fmt.Errorf("handshake with %s at %s: %w", p.key.sni, p.key.addr, err))
	}
	state := tc.ConnectionState()
	peer, ok := p.e.cfg.Verifier.PeerOf(state)
	if !ok {
		c.Close()
		return nil, 0, errors.New("handshake without a verified peer")
	}
	t := &outTunnel{
		verifier: p.e.cfg.Verifier, state: state, peer: peer.ID.String(),
		Tunnel: tunnel.Client(tc, tunnel.Config{
			Clock: p.e.clock, Buffers: p.e.buffers, LateStreams: int(limits.MaxStreams),
			StreamWindow: int(limits.StreamWindow), ConnWindow: int(limits.ConnWindow),
		}),
	}
	select {
	case <-t.Settled():
		p.e.keepAccount(t)
		return t, rtt, nil
	case <-t.Done():
		return nil, 0, fmt.Errorf("%s at %s does not accept us: %w", p.key.sni, p.key.addr, t.Err())
	case <-ctx.Done():
		go t.Close()
		return nil, 0, context.Cause(ctx)
	}
}

// keepAccount has the engine know t for as long as it lives, also when no pool
// holds it any more: a change of trust, and Close, must find it.
func (e *Engine) keepAccount(t *outTunnel) {
	gauge := e.metrics.tunnels.WithLabelValues("client")
	gauge.Inc()
	e.mu.Lock()
	e.outbound[t] = struct{}{}
	late := e.life.Err() != nil // Close has looked already, or will not
	e.mu.Unlock()
	e.work.Go(func() {
		if late {
			t.Close()
		}
		<-t.Done()
		e.mu.Lock()
		delete(e.outbound, t)
		e.mu.Unlock()
		gauge.Dec()
	})
}

// because prefers the reason for which ctx ended to what it did to a dial.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// errSlow is the cause of a connection that took too long.
var errSlow = errors.New("not connected in time")

// withTimeout is a context that ends after d of the clock's time.
func withTimeout(parent context.Context, c clock.Clock, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	timer := c.NewTimer(d)
	go func() {
		defer timer.Stop()
		select {
		case <-timer.C():
			cancel(errSlow)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(context.Canceled) }
}

// close ends the pool and returns its tunnels, which are the caller's to close.
func (p *pool) close() []*outTunnel {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	t := p.tunnels
	p.tunnels = nil
	return t
}

// answered notes whether the gateway was there. Callers hold mu.
func (p *pool) answered(ok bool, rtt time.Duration) {
	if p.probe.Answers != ok {
		p.probe.Since = p.e.clock.Now()
	}
	p.probe.Answers, p.probe.known = ok, true
	if ok {
		p.probe.RTT = rtt
	}
}

// forgetPools lets go of the pools that the configuration names no more. Their
// streams live on; their tunnels close with the last one.
func (e *Engine) forgetPools(config *xds.Config) {
	named := map[poolKey]bool{}
	for _, c := range config.Clusters {
		for _, l := range c.Localities {
			for _, ep := range l.Endpoints {
				if t := c.TLS[ep.TLS]; t != nil && c.Tunnels != nil {
					named[keyOf(ep.Addr, t)] = true
				}
			}
		}
	}
	e.mu.Lock()
	var gone []*pool
	for key, p := range e.pools {
		if !named[key] {
			gone = append(gone, p)
			delete(e.pools, key)
		}
	}
	e.mu.Unlock()
	for _, p := range gone {
		for _, t := range p.close() {
			t.Drain()
		}
	}
}
