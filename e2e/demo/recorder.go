package demo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Every request of the demo carries this marker, and no other bytes of the
// demo contain it: whoever finds it on the wire has read a request.
const (
	markerHeader = "X-Weft-Demo"
	marker       = "plain-request-7f1c2e9a5b"
)

// recorder is a wire with an ear: it stands in front of a gateway, forwards
// everything, and looks for bytes that only an unencrypted request has.
type recorder struct {
	listener net.Listener
	target   string

	conns, bytes, leaks, notTLS atomic.Int64

	mu   sync.Mutex
	open map[net.Conn]struct{}
	wg   sync.WaitGroup
}

// record listens on address and forwards to target until close.
func record(ctx context.Context, address, target string) (*recorder, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	r := &recorder{listener: ln, target: target, open: map[net.Conn]struct{}{}}
	r.wg.Go(r.accept)
	return r, nil
}

func (r *recorder) accept() {
	for {
		in, err := r.listener.Accept()
		if err != nil {
			return
		}
		if !r.track(in) {
			in.Close()
			return
		}
		r.wg.Go(func() { r.forward(in) })
	}
}

// track remembers a connection, so that close can end it; false after close.
func (r *recorder) track(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == nil {
		return false
	}
	r.open[c] = struct{}{}
	return true
}

func (r *recorder) forget(c net.Conn) {
	r.mu.Lock()
	delete(r.open, c)
	r.mu.Unlock()
	c.Close()
}

func (r *recorder) forward(in net.Conn) {
	defer r.forget(in)
	var d net.Dialer
	out, err := d.DialContext(context.Background(), "tcp", r.target)
	if err != nil {
		return
	}
	if !r.track(out) {
		out.Close()
		return
	}
	defer r.forget(out)
	r.conns.Add(1)
	var wg sync.WaitGroup
	wg.Go(func() { r.copy(out, in, true) })
	wg.Go(func() { r.copy(in, out, false) })
	wg.Wait()
}

// copy forwards one direction and listens in. The first bytes that a client
// sends must open a TLS handshake record.
func (r *recorder) copy(dst, src net.Conn, fromClient bool) {
	buf := make([]byte, 64<<10)
	tail := 0 // bytes at the front of buf that the last read left for overlap
	first := fromClient
	for {
		n, err := src.Read(buf[tail:])
		if n > 0 {
			fresh := buf[tail : tail+n]
			if first && (fresh[0] != 0x16) {
				r.notTLS.Add(1)
			}
			first = false
			r.bytes.Add(int64(n))
			if bytes.Contains(buf[:tail+n], []byte(marker)) {
				r.leaks.Add(1)
			}
			if _, werr := dst.Write(fresh); werr != nil {
				// The reader must see that its bytes go nowhere.
				src.Close()
				return
			}
			tail = copy(buf, buf[max(0, tail+n-len(marker)+1):tail+n])
		}
		if err != nil {
			if c, ok := dst.(*net.TCPConn); ok && errors.Is(err, io.EOF) {
				_ = c.CloseWrite()
				return
			}
			dst.Close()
			return
		}
	}
}

// close stops listening and ends what is open.
func (r *recorder) close() {
	r.listener.Close()
	r.mu.Lock()
	for c := range r.open {
		c.Close()
	}
	r.open = nil
	r.mu.Unlock()
	r.wg.Wait()
}
