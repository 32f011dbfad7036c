package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/gateway/tunnel"
	"github.com/weftmesh/weft/xds"
)

// socket is one address that is listened on. The listener that it serves can
// change while connections come in.
type socket struct {
	l      net.Listener
	serves atomic.Pointer[xds.Listener]
}

func (s *socket) close() { _ = s.l.Close() }

// listen opens and closes sockets so that they are those of u.Config. A socket
// whose address stays is kept, whatever else changes.
func (e *Engine) listen(u *xds.Update) (refused []xds.Refusal) {
	if e.closing.Load() {
		return nil
	}
	wanted := map[string]bool{}
	for _, l := range u.Config.Listeners {
		if l.Kind != xds.LocalListener {
			_, addr := listenerAddr(l)
			wanted[addr] = true
		}
	}
	refuse := func(name, why string) {
		refused = append(refused, xds.Refusal{Name: xds.Name{Type: xds.TypeListener, Name: name}, Reason: why})
		// The engine goes on with what it had: keep its socket.
		if old := u.Previous.Listeners[name]; old != nil {
			_, addr := listenerAddr(old)
			wanted[addr] = true
		}
	}
	for _, name := range u.Listeners {
		l := u.Config.Listeners[name]
		if l == nil || l.Kind == xds.LocalListener {
			continue // the engine takes the short cut
		}
		if why := unfit(l); why != "" {
			refuse(name, why)
			continue
		}
		network, addr := listenerAddr(l)
		s := e.sockets[addr]
		if s == nil {
			var err error
			if s, err = e.bind(network, addr); err != nil {
				refuse(name, fmt.Sprintf("listen on %s: %v: is the address on this machine, and free?", addr, err))
				continue
			}
			e.sockets[addr] = s
			s.serves.Store(l)
			e.work.Go(func() { e.accept(s) })
		}
		s.serves.Store(l)
	}
	for addr, s := range e.sockets {
		if !wanted[addr] {
			s.close()
			delete(e.sockets, addr)
		}
	}
	return refused
}

// unfit says why the engine cannot serve a listener, or nothing.
func unfit(l *xds.Listener) string {
	if l.Kind == xds.ImportListener && l.Forward == nil {
		return "an import listener without a cluster to forward to"
	}
	for _, c := range l.Chains {
		if c.Terminate == nil {
			continue
		}
		switch t := c.Terminate.TLS; {
		case t == nil:
			return fmt.Sprintf("chain %s: no TLS", c.Name)
		case t.Certificate != xds.SecretLeaf:
			return fmt.Sprintf("chain %s: certificate %q: the engine holds only %q", c.Name, t.Certificate, xds.SecretLeaf)
		case len(t.ALPN) != 1 || t.ALPN[0] != tunnel.ALPN:
			return fmt.Sprintf("chain %s: alpn %q: the engine speaks only %q", c.Name, t.ALPN, tunnel.ALPN)
		}
	}
	return ""
}

// bind listens with keepalive probes that find a dead client in about 5 s.
func (e *Engine) bind(network, addr string) (*socket, error) {
	lc := net.ListenConfig{KeepAliveConfig: plainKeepAlive()}
	l, err := lc.Listen(e.life, network, addr)
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err
		}
		return nil, err
	}
	return &socket{l: l}, nil
}

// plainKeepAlive finds a dead peer of a plain connection in about 5 s, while
// nothing is under way. A user timeout would also find one that has stopped to
// acknowledge, but cuts those who merely do not read for a while.
func plainKeepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 3}
}

func (e *Engine) accept(s *socket) {
	for pause := time.Millisecond; ; {
		c, err := s.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, most likely: others will be freed
			e.log.Warn("cannot accept", "addr", s.l.Addr().String(), "err", err)
			if clock.Sleep(e.life, e.clock, pause) != nil {
				return
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		l := s.serves.Load()
		e.work.Go(func() { e.serve(c, l) })
	}
}

// interrupt makes reads of c fail when the engine ends, until stop is called.
func (e *Engine) interrupt(c *net.TCPConn) (stop func() bool) {
	return context.AfterFunc(e.life, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
}

// serve takes one accepted connection to its end.
func (e *Engine) serve(c net.Conn, l *xds.Listener) {
	defer c.Close()
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		e.log.Warn("a connection that is not TCP", "listener", l.Name)
		return
	}
	if l.Kind == xds.ImportListener {
		e.carryOut(tcp, l)
		return
	}
	e.admit(tcp, l)
}
