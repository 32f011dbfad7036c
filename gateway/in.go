package gateway

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/gateway/relay"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// handshakeTime is how long a client may take for the rest of its handshake.
const handshakeTime = 5 * time.Second

// admit takes a connection of another cluster: it passes it on by name, or ends
// its TLS and serves its streams. Nothing is answered before the name is known.
func (e *Engine) admit(c *net.TCPConn, l *xds.Listener) {
	select {
	case e.unproven <- struct{}{}:
	default:
		e.unadmitted(c, l, "too many", errors.New("too many connections have not named a service yet"))
		return
	}
	proved := sync.OnceFunc(func() { <-e.unproven })
	defer proved()
	stop := e.interrupt(c)
	hello, err := relay.ReadClientHello(c, relay.HelloLimits{Time: l.HelloTimeout})
	stop()
	if err != nil {
		if he, ok := errors.AsType[*relay.HelloError](err); ok {
			e.unadmitted(c, l, he.Fault.String(), err)
		}
		return
	}
	chain := chainFor(l, strings.ToLower(hello.ServerName))
	switch {
	case chain == nil:
		e.unadmitted(c, l, "unknown name", fmt.Errorf("server name %q", hello.ServerName))
	case len(chain.ALPN) > 0 && !slices.ContainsFunc(hello.ALPN, func(p string) bool { return slices.Contains(chain.ALPN, p) }):
		e.unadmitted(c, l, "wrong protocol", fmt.Errorf("alpn %q for %s", hello.ALPN, chain.Name))
	case chain.Passthrough != nil:
		proved()
		e.passThrough(c, l, chain, hello)
	default:
		e.terminate(c, l, chain, hello, proved)
	}
}

// unadmitted counts and closes a connection that shows no right to be here.
func (e *Engine) unadmitted(c *net.TCPConn, l *xds.Listener, reason string, err error) {
	e.metrics.plaintext.WithLabelValues(reason).Inc()
	e.log.Debug("connection closed before its handshake", "listener", l.Name, "source", c.RemoteAddr().String(), "reason", reason, "err", err)
	hangUp(c)
}

func chainFor(l *xds.Listener, name string) *xds.Chain {
	for _, c := range l.Chains {
		if _, found := slices.BinarySearch(c.ServerNames, name); found {
			return c
		}
	}
	return nil
}

// passThrough forwards a TLS connection, hello and all, to the service's own
// proxies. Who the client is, is theirs to check.
func (e *Engine) passThrough(c *net.TCPConn, l *xds.Listener, chain *xds.Chain, hello *relay.Hello) {
	r := &Record{
		Direction: Through, Listener: l.Name, Source: addrOf(c.RemoteAddr()),
		Service: strings.ToLower(hello.ServerName), Cluster: e.cfg.Cluster, Tier: -1,
	}
	e.begin(r)
	defer e.finish(r)
	conn, own, attempts, err := e.connectOwn(&xds.Route{Cluster: chain.Passthrough.Cluster, Attempts: chain.Passthrough.Attempts})
	r.Attempts = attempts
	if err != nil {
		r.End = "unserved: " + err.Error()
		hangUp(c)
		return
	}
	r.Connected, r.Endpoint = true, own.c.key
	o := relay.Options{Prefix: hello.Raw, Idle: chain.Passthrough.IdleTimeout}
	e.join(r, c, conn, o, own)
}

// inbound is a tunnel that another cluster's gateway, or proxy, opened.
type inbound struct {
	e      *Engine
	tunnel *tunnel.Tunnel
	state  tls.ConnectionState
	peer   identity.Peer
	source *net.TCPConn
	limits *xds.Terminate
	name   string // of the listener
	born   time.Time
}

func (in *inbound) peerID() string { return in.peer.ID.String() }
func (in *inbound) cut()           { go in.tunnel.Close() }

// trusted checks the peer against today's roots, denials and list of peers. A
// list that is gone altogether is no change of trust.
func (in *inbound) trusted() error {
	if err := in.e.cfg.Verifier.Recheck(in.state); err != nil {
		return err
	}
	if t := in.e.config.Load().Trust[in.limits.TLS.Trust]; t != nil && !t.Admits(in.peerID()) {
		return fmt.Errorf("%s is not admitted any more", in.peerID())
	}
	return nil
}

// replayed is a connection whose beginning was read already.
type replayed struct {
	*net.TCPConn
	first []byte
}

func (r *replayed) Read(p []byte) (int, error) {
	if len(r.first) > 0 {
		n := copy(p, r.first)
		r.first = r.first[n:]
		return n, nil
	}
	return r.TCPConn.Read(p)
}

// terminate ends a tunnel here and serves it until it is over. proved is called
// when the handshake is done.
func (e *Engine) terminate(c *net.TCPConn, l *xds.Listener, chain *xds.Chain, hello *relay.Hello, proved func()) {
	t := chain.Terminate
	trust := t.TLS.Trust
	config := e.cfg.Verifier.Server(identity.ServerConfig{
		SVID: e.cfg.SVID, NextProtos: t.TLS.ALPN,
		Authorize: func(p identity.Peer) error {
			admitted := e.config.Load().Trust[trust]
			if admitted == nil || !admitted.Admits(p.ID.String()) {
				return fmt.Errorf("%s may open no tunnel here", p.ID)
			}
			return nil
		},
	})
	conn := tls.Server(tunnel.NewWire(&replayed{c, hello.Raw}), config)
	_ = c.SetDeadline(time.Now().Add(handshakeTime))
	err := conn.HandshakeContext(e.life)
	if err == nil {
		err = tunnel.DetectDeadPeer(c, deadPeer)
	}
	peer, verified := e.cfg.Verifier.PeerOf(conn.ConnectionState())
	if err != nil || !verified {
		e.metrics.handshakes.WithLabelValues("server", "failed").Inc()
		e.log.Info("tunnel refused", "source", c.RemoteAddr().String(), "name", hello.ServerName, "err", err)
		return
	}
	_ = c.SetDeadline(time.Time{})
	proved()
	e.metrics.handshakes.WithLabelValues("server", "accepted").Inc()

	in := &inbound{e: e, state: conn.ConnectionState(), peer: peer, source: c, limits: t, name: l.Name, born: e.clock.Now()}
	e.mu.Lock()
	in.tunnel = tunnel.Serve(conn, tunnel.Config{
		Clock: e.clock, Buffers: e.buffers, MaxStreams: int(t.HTTP2.MaxStreams),
		StreamWindow: int(t.HTTP2.StreamWindow), ConnWindow: int(t.HTTP2.ConnWindow),
	}, in.serve)
	e.inbound[in] = struct{}{}
	e.mu.Unlock()
	gauge := e.metrics.tunnels.WithLabelValues("server")
	gauge.Inc()
	defer gauge.Dec()
	defer func() {
		e.mu.Lock()
		delete(e.inbound, in)
		e.mu.Unlock()
	}()
	if err := in.trusted(); err != nil { // it may have changed since the handshake
		in.tunnel.Close()
	}
	switch { // Drain or Close may not have seen it
	case e.life.Err() != nil:
		in.tunnel.Close()
	case e.closing.Load():
		in.tunnel.Drain()
	}
	<-in.tunnel.Done()
}

// serve answers one stream: who asks, what for, and then a backend of our own.
func (in *inbound) serve(req *tunnel.Incoming) {
	e := in.e
	r := &Record{
		Direction: In, Listener: in.name, Source: addrOf(in.source.RemoteAddr()),
		From: in.peer.Cluster, Caller: req.Header.Get(xds.HeaderCaller),
		Service: req.Authority, Cluster: e.cfg.Cluster, Tier: -1, Peer: in.peerID(),
		Revision: req.Header.Get(xds.HeaderRevision), Decision: req.Header.Get(xds.HeaderDecision),
	}
	e.begin(r)
	defer e.finish(r)
	route, status, why := in.authorize(req)
	if status != 0 {
		in.refuse(req, r, status, why)
		return
	}
	conn, own, attempts, err := e.connectOwn(route)
	if err != nil {
		in.refuse(req, r, 503, err.Error())
		return
	}
	defer conn.Close()
	r.Attempts, r.Endpoint = attempts, own.c.key
	s, err := req.Accept(tunnel.Header{
		{Name: xds.HeaderEndpoint, Value: own.c.key},
		{Name: xds.HeaderAttempts, Value: strconv.Itoa(attempts)},
	})
	if err != nil {
		r.End = "taken back: " + err.Error()
		hangUp(conn)
		return
	}
	r.Connected = true
	e.join(r, s, conn, relay.Options{}, own)
}

// authorize decides about a stream by the state of this moment: the peer's
// chain, its cluster, whom it speaks for, and what it asks for.
func (in *inbound) authorize(req *tunnel.Incoming) (route *xds.Route, status int, why string) {
	callers := 0
	caller := ""
	for _, f := range req.Header {
		if f.Name == xds.HeaderCaller {
			callers++
			caller = f.Value
		}
	}
	if callers > 1 {
		return nil, 403, "two callers are named"
	}
	if err := in.trusted(); err != nil {
		return nil, 403, "the peer is not trusted"
	}
	if from := req.Header.Get(xds.HeaderSource); from != "" && federation.ClusterID(from) != in.peer.Cluster {
		return nil, 403, "the source is another cluster than the peer's"
	}
	table := in.e.config.Load().Routes[in.limits.Routes]
	if table == nil || !table.Admits(in.peerID(), caller) {
		return nil, 403, "the peer may not open streams for this caller"
	}
	if route = table.Routes[req.Authority]; route == nil {
		return nil, 404, "nothing of this name is exported here"
	}
	if !route.Admits(in.peerID()) {
		return nil, 403, "the peer's cluster may not import this service"
	}
	return route, 0, ""
}

func (in *inbound) refuse(req *tunnel.Incoming, r *Record, status int, why string) {
	r.End = fmt.Sprintf("refused %d: %s", status, why)
	in.e.metrics.refusals.WithLabelValues(strconv.Itoa(status)).Inc()
	reason := why
	if status == 503 {
		reason = errNobody.Error() // addresses inside the cluster are nobody else's business
	}
	_ = req.Refuse(status, tunnel.Header{{Name: xds.HeaderReason, Value: reason}})
}
