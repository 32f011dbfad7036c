package tunnel

import (
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const wireBuffer = 128 << 10

// Wire belongs between TLS and the socket. crypto/tls writes one record of at
// most 16 KiB at a time; Wire gathers what a tunnel writes in one turn into one
// system call. Until a tunnel takes it over, as during the handshake, it passes
// everything through.
type Wire struct {
	net.Conn

	mu    sync.Mutex
	batch bool
	buf   []byte
}

// NewWire wraps a connection that is about to carry TLS and then a tunnel.
func NewWire(c net.Conn) *Wire { return &Wire{Conn: c} }

func (w *Wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.batch {
		return w.Conn.Write(p)
	}
	if len(w.buf)+len(p) > wireBuffer {
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	w.buf = append(w.buf, p...)
	return len(p), nil
}

// Flush sends what Write has gathered.
func (w *Wire) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.flush()
}

func (w *Wire) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, err := w.Conn.Write(w.buf)
	w.buf = w.buf[:0]
	return err
}

// gather starts or ends the batching; a tunnel ends it before it closes TLS,
// whose last alert nobody would flush.
func (w *Wire) gather(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.batch = on
	if on && w.buf == nil {
		w.buf = make([]byte, 0, wireBuffer)
	}
}

// wireOf finds the Wire below conn, if the caller put one there.
func wireOf(conn net.Conn) *Wire {
	for conn != nil {
		if w, ok := conn.(*Wire); ok {
			return w
		}
		inner, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		conn = inner.NetConn()
	}
	return nil
}

// DetectDeadPeer makes the kernel end a tunnel's connection when its peer has
// not acknowledged anything for about the given time, whether bytes are under
// way or not. It is for tunnels, whose ends always read: on other connections
// the kernel would take an application that pauses for a dead one.
func DetectDeadPeer(c *net.TCPConn, within time.Duration) error {
	// With a user timeout the kernel gives up at the first unanswered probe
	// past it, so the count only has to be large enough.
	err := c.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: max(within/2, time.Second), Interval: time.Second, Count: 10,
	})
	if err != nil {
		return fmt.Errorf("set keepalive: %w", err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("set user timeout: %w", err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(within.Milliseconds()))
	})
	if err == nil {
		err = set
	}
	if err != nil {
		return fmt.Errorf("set user timeout: %w", err)
	}
	return nil
}
