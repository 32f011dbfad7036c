package gateway

import (
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/gateway/relay"
	"github.com/weftmesh/weft/gateway/tunnel"
)

// firstByte waits until the caller has sent something, or the backend has, and
// returns the error of a backend that broke before either: nothing is lost by
// trying another one then.
func firstByte(client *net.TCPConn, backend relay.Conn) error {
	if readable(client) {
		return nil
	}
	spoken, awaited, stop := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var broke error
	go func() {
		_ = awaitReadable(client) // a broken client is for the relay to find
		close(spoken)
	}()
	tcp, _ := backend.(*net.TCPConn)
	go func() {
		if s, ok := backend.(*tunnel.Stream); ok {
			broke = s.Await(stop)
		} else if tcp != nil {
			broke = awaitReadable(tcp)
		}
		close(awaited)
	}()
	past := time.Unix(1, 0)
	select {
	case <-spoken:
		close(stop)
		if tcp != nil {
			_ = tcp.SetReadDeadline(past)
			defer func() { _ = tcp.SetReadDeadline(time.Time{}) }()
		}
		<-awaited
		return nil
	case <-awaited:
		_ = client.SetReadDeadline(past)
		<-spoken
		_ = client.SetReadDeadline(time.Time{})
		return broke
	}
}

// readable reports whether a read from c would not wait.
func readable(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	ready := true
	err = raw.Control(func(fd uintptr) { ready = !errors.Is(peek(fd), unix.EAGAIN) })
	return ready || err != nil
}

// awaitReadable blocks until c has bytes or has come to its end (nil), is
// broken, or its read deadline is past (also nil).
func awaitReadable(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var broken error
	_ = raw.Read(func(fd uintptr) bool {
		broken = peek(fd)
		return !errors.Is(broken, unix.EAGAIN)
	})
	if errors.Is(broken, unix.EAGAIN) {
		return nil
	}
	return broken
}

func peek(fd uintptr) error {
	var one [1]byte
	for {
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
