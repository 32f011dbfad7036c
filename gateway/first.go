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
	spoken, stop := make(chan struct{}), make(chan struct{})
	broken := make(chan error, 1)
	go func() {
		_ = awaitReadable(client) // a broken client is for the relay to find
		close(spoken)
	}()
	go func() {
		switch b := backend.(type) {
		case *tunnel.Stream:
			broken <- b.Await(stop)
		case *net.TCPConn:
			broken <- awaitReadable(b)
		default:
			broken <- nil
		}
	}()
	past := time.Unix(1, 0)
	var err error
	select {
	case <-spoken:
		close(stop)
		if tcp, ok := backend.(*net.TCPConn); ok {
			_ = tcp.SetReadDeadline(past)
			_ = <-broken // it only ended its wait
			_ = tcp.SetReadDeadline(time.Time{})
		} else {
			_ = <-broken // it only ended its wait
		}
	case err = <-broken:
		_ = client.SetReadDeadline(past)
		<-spoken
		_ = client.SetReadDeadline(time.Time{})
	}
	return err
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
