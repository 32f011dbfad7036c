package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/gateway/relay"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// Config is what an Engine needs besides what its agent tells it.
type Config struct {
	Cluster  federation.ClusterID // the own one, which decides what is cross-cluster
	SVID     x509svid.Source
	Verifier *identity.Verifier // of peers' chains; whom to admit is the agent's to say
	Clock    clock.Clock
	Log      *slog.Logger
	// Access gets the record of every connection that has ended; nil drops them.
	// It must not block.
	Access  func(Record)
	Metrics prometheus.Registerer // may be nil
	// Tunnels is how many connections to one gateway share the load (4).
	Tunnels int
	// Unproven bounds the connections of others that have not yet named a
	// service or shown a certificate (2048): each costs a descriptor and a few
	// KiB for at most the time that its ClientHello and handshake may take.
	Unproven int
}

// Engine is the built-in data path. Apply gives it its work, Drain and Close
// end it.
type Engine struct {
	cfg     Config
	clock   clock.Clock
	log     *slog.Logger
	metrics *metrics
	relay   *relay.Relay
	buffers *tunnel.Buffers

	config   atomic.Pointer[xds.Config]
	unproven chan struct{} // a place for each connection that has not proved anything yet

	applying sync.Mutex // one Apply, Drain or Close at a time
	sockets  map[string]*socket
	closing  atomic.Bool

	mu        sync.Mutex
	balancers map[string]*balancer // by cluster
	pools     map[poolKey]*pool
	inbound   map[*inbound]struct{}
	outbound  map[*outTunnel]struct{}
	open      map[*Record]struct{} // connections under way; what is in them is their own goroutine's
	cutting   bool                 // a drain's deadline has passed
	cut       []Record             // that ended by it

	// life ends everything that still runs, with the reason as its cause.
	life context.Context
	end  context.CancelCauseFunc
	work sync.WaitGroup
}

// ErrDrained is the reason of connections that a drain's deadline cut.
var ErrDrained = errors.New("the drain's deadline has passed")

// New makes an engine that does nothing yet. Its background work runs until
// Close.
func New(c Config) (*Engine, error) {
	if c.Verifier == nil || c.SVID == nil || c.Log == nil {
		return nil, errors.New("gateway: an engine needs an SVID source, a verifier and a logger")
	}
	if c.Clock == nil {
		c.Clock = clock.Real()
	}
	if c.Tunnels <= 0 {
		c.Tunnels = 4
	}
	if c.Unproven <= 0 {
		c.Unproven = 2048
	}
	if c.Access == nil {
		c.Access = func(Record) {}
	}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: c, clock: c.Clock, log: c.Log, metrics: m,
		relay: relay.New(c.Clock), buffers: tunnel.NewBuffers(),
		sockets:   map[string]*socket{},
		balancers: map[string]*balancer{},
		pools:     map[poolKey]*pool{},
		inbound:   map[*inbound]struct{}{},
		outbound:  map[*outTunnel]struct{}{},
		open:      map[*Record]struct{}{},
		unproven:  make(chan struct{}, c.Unproven),
	}
	e.config.Store(&xds.Config{})
	e.life, e.end = context.WithCancelCause(context.Background())
	e.work.Go(e.keep)
	return e, nil
}

// Apply takes over one step of configuration, and returns when it is in use.
// Connections that are open are not touched, unless a change of trust forbids
// their peer. It is an xds.ClientConfig's Apply.
func (e *Engine) Apply(u *xds.Update) []xds.Refusal {
	e.applying.Lock()
	defer e.applying.Unlock()
	var refused []xds.Refusal
	for _, name := range u.Clusters {
		if c := u.Config.Clusters[name]; c != nil {
			if why := unable(c); why != "" {
				refused = append(refused, xds.Refusal{Name: xds.Name{Type: xds.TypeCluster, Name: name}, Reason: why})
				continue
			}
		}
		e.setCluster(name, u.Config.Clusters[name])
	}
	// Listeners come after the clusters that they need, and after e.config, in
	// which their connections look up routes and trust.
	e.config.Store(u.Config)
	if len(u.Listeners) > 0 {
		refused = append(refused, e.listen(u)...)
	}
	if len(u.Clusters) > 0 {
		e.forgetPools(u.Config)
	}
	if len(u.Trust) > 0 {
		e.Recheck()
	}
	return refused
}

// unable says why the engine cannot serve a cluster, or nothing.
func unable(c *xds.Cluster) string {
	for key, t := range c.TLS {
		switch {
		case t == nil:
		case t.Certificate != xds.SecretLeaf:
			return fmt.Sprintf("tls %q: certificate %q: the engine holds only %q", key, t.Certificate, xds.SecretLeaf)
		case !slices.Contains(t.ALPN, tunnel.ALPN):
			return fmt.Sprintf("tls %q: alpn %q: the engine speaks only %q", key, t.ALPN, tunnel.ALPN)
		case c.Tunnels == nil:
			return fmt.Sprintf("tls %q: no HTTP/2: the engine uses TLS for tunnels only", key)
		}
	}
	return ""
}

// setCluster makes a cluster's endpoints the ones to use; nil removes them.
func (e *Engine) setCluster(name string, c *xds.Cluster) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch b := e.balancers[name]; {
	case c == nil:
		delete(e.balancers, name)
	case b == nil:
		e.balancers[name] = newBalancer(e.clock, c)
	default:
		b.update(c)
	}
}

func (e *Engine) balancer(name string) *balancer {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.balancers[name]
}

// Recheck cuts the tunnels whose peer is not trusted any more: call it when
// roots or denials have changed. A leaf that has merely expired cuts nothing.
func (e *Engine) Recheck() {
	e.mu.Lock()
	var tunnels []checked
	for in := range e.inbound {
		tunnels = append(tunnels, in)
	}
	for t := range e.outbound {
		tunnels = append(tunnels, t)
	}
	e.mu.Unlock()
	for _, t := range tunnels {
		if err := t.trusted(); err != nil {
			e.log.Warn("tunnel cut: its peer is not trusted any more", "peer", t.peerID(), "err", err)
			t.cut()
		}
	}
}

// checked is a tunnel with a peer that a change of trust may forbid.
type checked interface {
	trusted() error
	peerID() string
	cut()
}

// Drain ends the engine gently: no new connections, GOAWAY to the tunnels of
// others, then what is open may go on until ctx ends. It returns the records of
// those that were cut then.
func (e *Engine) Drain(ctx context.Context) []Record {
	e.applying.Lock()
	e.closing.Store(true)
	for name, s := range e.sockets {
		s.close()
		delete(e.sockets, name)
	}
	e.applying.Unlock()

	e.mu.Lock()
	for in := range e.inbound {
		in.tunnel.Drain()
	}
	e.mu.Unlock()
	for e.count() > 0 {
		if clock.Sleep(ctx, e.clock, 50*time.Millisecond) != nil {
			break
		}
	}
	e.mu.Lock()
	e.cutting = true
	e.mu.Unlock()
	e.end(ErrDrained)
	for e.count() > 0 { // each ends by itself now, and writes its record
		_ = clock.Sleep(context.Background(), e.clock, time.Millisecond)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cut
}

// count is how many connections are open.
func (e *Engine) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.open)
}

// Connections is how many connections of applications the engine carries.
func (e *Engine) Connections() int { return e.count() }

// Close ends everything at once and waits for it.
func (e *Engine) Close() {
	e.applying.Lock()
	e.closing.Store(true)
	for name, s := range e.sockets {
		s.close()
		delete(e.sockets, name)
	}
	e.applying.Unlock()
	e.end(net.ErrClosed)
	e.mu.Lock()
	var tunnels []*tunnel.Tunnel
	for in := range e.inbound {
		tunnels = append(tunnels, in.tunnel)
	}
	for t := range e.outbound {
		tunnels = append(tunnels, t.Tunnel)
	}
	for _, p := range e.pools {
		p.close()
	}
	e.mu.Unlock()
	for _, t := range tunnels {
		t.Close()
	}
	e.work.Wait()
	e.relay.Close()
}

// listenerAddr is a listener's address as a key, and as net.Listen wants it.
func listenerAddr(l *xds.Listener) (network, addr string) {
	if l.Pipe != "" {
		return "unix", l.Pipe
	}
	return "tcp", l.Addr.String()
}

// addrOf is the address of a socket's end; the zero value for a unix socket.
func addrOf(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
