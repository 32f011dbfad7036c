package gateway

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/gateway/relay"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/xds"
)

// Why a candidate is passed over, beside the errors of a dial or a tunnel.
var (
	errNoTLS    = errors.New("the endpoint names a TLS that its cluster does not have: it must not be connected to in plain text")
	errNoRoute  = errors.New("this cluster does not serve it itself")
	errNobody   = errors.New("no endpoint takes a connection")
	errNoHealth = errors.New("no endpoint is known")
)

// carryOut takes a local caller's connection to one of the service's clusters.
func (e *Engine) carryOut(c *net.TCPConn, l *xds.Listener) {
	fw := l.Forward
	r := &Record{
		Direction: Out, Listener: l.Name, Source: addrOf(c.RemoteAddr()),
		From: e.cfg.Cluster, Cluster: e.cfg.Cluster, Service: l.Name, Tier: -1,
	}
	if fw.Tunnel != nil {
		r.Service = fw.Tunnel.Authority
	}
	e.begin(r)
	defer e.finish(r)
	b := e.balancer(fw.Cluster)
	if b == nil {
		r.End = "unserved: " + errNoHealth.Error()
		hangUp(c)
		return
	}
	chosen, backend, err := e.search(c, b, fw, r)
	if err != nil {
		r.End = "unserved: " + err.Error()
		hangUp(c)
		return
	}
	r.Connected = true
	e.join(r, c, backend, relay.Options{Idle: fw.IdleTimeout}, chosen...)
}

// choice is a candidate that was chosen, to be judged by how it goes on.
type choice struct {
	b *balancer
	c *candidate
}

// broke and judge tell the balancers of a connection's choices what became of
// it: more than one where the choice of a cluster led to one of an endpoint.
func (e *Engine) broke(err error, choices ...choice) {
	for _, x := range choices {
		e.note(x.b.broke(x.c), x.c, err)
	}
}

func (e *Engine) judge(res relay.Result, choices ...choice) {
	if res.ToClient > 0 {
		for _, x := range choices {
			x.b.served(x.c)
		}
	} else if res.Reason == relay.BackendReset || res.Reason == relay.BackendLost {
		e.broke(res.Err, choices...)
	}
}

// hangUp closes a connection so that its other end sees a reset: the end of an
// answer that never began must not look like an empty one.
func hangUp(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// join relays and writes the account.
func (e *Engine) join(r *Record, client, backend relay.Conn, o relay.Options, choices ...choice) {
	res := e.relay.Join(e.life, client, backend, o)
	r.Sent, r.Received, r.End = res.ToBackend, res.ToClient, res.Reason.String()
	if errors.Is(res.Err, ErrDrained) {
		r.End = "drain deadline"
	}
	e.judge(res, choices...)
}

// search tries candidates until one takes the connection and does not break it
// at once.
func (e *Engine) search(c *net.TCPConn, b *balancer, fw *xds.Forward, r *Record) ([]choice, relay.Conn, error) {
	s := newSearch()
	last := errNoHealth
	for r.Attempts < fw.Attempts {
		chosen := b.pick(s)
		if chosen == nil {
			if r.Attempts == 0 {
				break
			}
			// All were tried. Once more, after a moment.
			if clock.Sleep(e.life, e.clock, backoff(fw)) != nil {
				break
			}
			s = newSearch()
			if chosen = b.pick(s); chosen == nil {
				break
			}
		}
		r.Attempts++
		backend, within, err := e.reach(b, chosen, fw, r)
		if err == nil {
			stop := e.interrupt(c)
			err = firstByte(c, backend)
			stop()
			if err == nil {
				b.connected(chosen)
				e.metrics.attempts.WithLabelValues("connected").Inc()
				return append(within, choice{b, chosen}), backend, nil
			}
			abandon(backend)
			e.broke(err, append(within, choice{b, chosen})...)
		} else {
			e.note(b.failed(chosen), chosen, err)
		}
		e.metrics.attempts.WithLabelValues(outcome(err)).Inc()
		last = err
		var refusal *tunnel.Refusal
		if s.stay = chosen.locality; errors.As(err, &refusal) {
			s.refused[chosen.locality], s.stay = true, nil
		}
		if e.life.Err() != nil {
			break
		}
	}
	if r.Attempts > 0 {
		last = fmt.Errorf("%w, the last: %w", errNobody, last)
	}
	return nil, nil, last
}

func abandon(c relay.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		hangUp(c)
	case interface{ Abort() }:
		c.Abort()
	}
}

func backoff(fw *xds.Forward) time.Duration {
	if fw.BackoffMax <= fw.BackoffMin {
		return fw.BackoffMin
	}
	return fw.BackoffMin + rand.N(fw.BackoffMax-fw.BackoffMin)
}

// note logs and counts an ejection.
func (e *Engine) note(ejected bool, c *candidate, err error) {
	if !ejected {
		return
	}
	e.metrics.ejections.Inc()
	e.log.Info("endpoint set aside", "endpoint", c.key, "cluster", string(c.locality.Cluster), "err", err)
}

// outcome is a failed attempt's label.
func outcome(err error) string {
	var refusal *tunnel.Refusal
	switch {
	case errors.As(err, &refusal):
		return "refused"
	case errors.Is(err, tunnel.ErrNoAnswer), errors.Is(err, errSlow), errors.Is(err, unix.ETIMEDOUT), isTimeout(err):
		return "late"
	case errors.Is(err, unix.ECONNREFUSED):
		return "unreachable"
	}
	return "broken"
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// reach connects to one candidate and writes into the record how. It returns
// the choices that it made in turn.
func (e *Engine) reach(b *balancer, c *candidate, fw *xds.Forward, r *Record) (relay.Conn, []choice, error) {
	config := b.current()
	r.Tier, r.Peer, r.Endpoint, r.Gateway = c.tier(), "", "", netip.AddrPort{}
	if r.Cluster = c.locality.Cluster; r.Cluster == "" {
		r.Cluster = e.cfg.Cluster
	}
	r.Decision, r.Revision = c.Labels[xds.LabelDecision], c.Labels[xds.LabelRevision]
	if c.IsLocal() && fw.Tunnel != nil {
		return e.reachOwn(fw.Tunnel.Authority, r)
	}
	if config.TLS == nil {
		if fw.Tunnel != nil {
			return nil, nil, errNoTLS
		}
		r.Endpoint = c.key
		conn, err := e.dial(c, config.ConnectTimeout)
		if err != nil {
			return nil, nil, err
		}
		return conn, nil, nil
	}
	t := config.TLS[c.TLS]
	if t == nil || config.Tunnels == nil || fw.Tunnel == nil {
		return nil, nil, errNoTLS
	}
	r.Gateway = c.Addr
	request := tunnel.Request{Authority: fw.Tunnel.Authority, Within: config.ConnectTimeout}
	for _, h := range fw.Tunnel.Headers {
		value := h.Value
		if h.EndpointKey != "" {
			value = c.Labels[h.EndpointKey]
		}
		if value != "" {
			request.Header = append(request.Header, tunnel.Field{Name: h.Name, Value: value})
		}
	}
	s, resp, via, err := e.pool(c, config, t).stream(e.life, request)
	if via != nil {
		r.Peer = via.peer
	}
	if err != nil {
		return nil, nil, err
	}
	r.Endpoint = resp.Header.Get(xds.HeaderEndpoint)
	return s, nil, nil
}

// current is the configuration that b follows now.
func (b *balancer) current() *xds.Cluster {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.config
}

// reachOwn is the short cut to this cluster's own endpoints: what an engine
// that can only tunnel asks its local listener for.
func (e *Engine) reachOwn(authority string, r *Record) (relay.Conn, []choice, error) {
	config := e.config.Load()
	for _, l := range config.Listeners {
		if l.Kind != xds.LocalListener || l.Local == nil {
			continue
		}
		table := config.Routes[l.Local.Routes]
		if table == nil {
			continue
		}
		if route := table.Routes[authority]; route != nil {
			conn, own, _, err := e.connectOwn(route)
			if err != nil {
				return nil, nil, err
			}
			r.Endpoint = own.c.key
			return conn, []choice{own}, nil
		}
	}
	return nil, nil, errNoRoute
}

// connectOwn connects to one of this cluster's own endpoints, trying others if
// one does not answer.
func (e *Engine) connectOwn(route *xds.Route) (conn *net.TCPConn, own choice, attempts int, err error) {
	b := e.balancer(route.Cluster)
	if b == nil {
		return nil, choice{}, 0, errNoHealth
	}
	s := newSearch()
	err = errNoHealth
	for attempts < max(1, route.Attempts) {
		c := b.pick(s)
		if c == nil {
			break
		}
		attempts++
		conn, err = e.dial(c, b.current().ConnectTimeout)
		if err == nil {
			b.connected(c)
			return conn, choice{b, c}, attempts, nil
		}
		e.note(b.failed(c), c, err)
	}
	return nil, choice{}, attempts, err
}

// dial connects to a plain endpoint. The timeout is a socket's, and so the
// machine's time.
func (e *Engine) dial(c *candidate, timeout time.Duration) (*net.TCPConn, error) {
	if !c.Addr.IsValid() {
		return nil, fmt.Errorf("%s is no address that the engine dials", c.key)
	}
	d := net.Dialer{Timeout: timeout, KeepAliveConfig: plainKeepAlive()}
	conn, err := d.DialContext(e.life, "tcp", c.Addr.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}
