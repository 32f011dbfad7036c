package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// direction is one way of a join.
type direction struct {
	j                          *join
	src, dst                   Conn
	other                      *direction
	closed, srcReset, dstReset Reason
	sent                       atomic.Int64
	carried                    atomic.Bool // nothing more will be carried
}

func (d *direction) count(n int) {
	d.sent.Add(int64(n))
	d.j.moved.Add(uint64(n))
}

// send writes bytes that were read before the relay began.
func (d *direction) send(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	n, err := d.dst.Write(p)
	d.count(n)
	if err != nil {
		d.j.fail(d.dstReset, err)
		d.finish()
	}
	return err == nil
}

// run carries src to dst until src ends, and passes the end on.
func (d *direction) run() {
	if !d.carry() {
		d.finish()
		return
	}
	d.j.ended(d.closed)
	err := d.dst.CloseWrite()
	d.finish()
	if err != nil {
		d.j.fail(d.dstReset, err)
		return
	}
	d.watch()
}

// finish notes that this direction is done, and wakes the other one should it
// only watch. Of two that finish at once at least one sees the other.
func (d *direction) finish() {
	d.carried.Store(true)
	if d.other.carried.Load() {
		if tcp, ok := d.other.src.(*net.TCPConn); ok {
			_ = tcp.SetReadDeadline(time.Unix(1, 0))
		}
	}
}

// watch waits for the other direction after src has ended, so that a reset of
// src in the meantime is not missed: nobody reads from it any more. A stream
// tells of its reset by its context.
func (d *direction) watch() {
	tcp, ok := d.src.(*net.TCPConn)
	if !ok || d.other.carried.Load() {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	var broken error
	_ = raw.Read(func(fd uintptr) bool { // ends by a deadline, or with the socket
		// A socket whose peer has ended keeps reading 0; only this tells of a reset.
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			broken = os.NewSyscallError("read", syscall.Errno(code))
		}
		return err != nil || code != 0
	})
	if broken != nil {
		d.j.fail(d.srcReset, broken)
	}
}

// carry reports whether src came to its proper end.
func (d *direction) carry() bool {
	src, srcTCP := d.src.(*net.TCPConn)
	dst, dstTCP := d.dst.(*net.TCPConn)
	if srcTCP && dstTCP {
		return d.carryTCP(src, dst)
	}
	from, _ := d.dst.(io.ReaderFrom)
	to, _ := d.src.(io.WriterTo)
	var n int64
	var err error
	switch {
	case from != nil && !dstTCP:
		n, err = from.ReadFrom(d.src)
	case to != nil && !srcTCP:
		n, err = to.WriteTo(d.dst)
	default:
		return d.carryCopies()
	}
	d.count(int(n))
	if err == nil {
		return true
	}
	// Who broke? A side that has a context tells by it, and the other is a socket
	// or has one too.
	reason := d.srcReset
	if brokeOff(d.dst) || (!brokeOff(d.src) && has(d.src)) {
		reason = d.dstReset
	}
	d.j.fail(reason, err)
	return false
}

func has(c Conn) bool {
	_, ok := c.(contexted)
	return ok
}

func brokeOff(c Conn) bool {
	x, ok := c.(contexted)
	return ok && x.Context().Err() != nil
}

func (d *direction) carryCopies() bool {
	buf := d.j.relay.pool.buffer()
	defer d.j.relay.pool.putBuffer(buf)
	for {
		n, readErr := d.src.Read(buf[:])
		if n > 0 {
			m, err := d.dst.Write(buf[:n])
			d.count(m)
			if err != nil {
				d.j.fail(d.dstReset, err)
				return false
			}
		}
		if errors.Is(readErr, io.EOF) {
			return true
		}
		if readErr != nil {
			d.j.fail(d.srcReset, readErr)
			return false
		}
	}
}

// carryTCP copies small amounts and splices large ones.
func (d *direction) carryTCP(src, dst *net.TCPConn) bool {
	in, err := src.SyscallConn()
	if err != nil {
		d.j.fail(d.srcReset, err)
		return false
	}
	out, err := dst.SyscallConn()
	if err != nil {
		d.j.fail(d.dstReset, err)
		return false
	}
	pool := d.j.relay.pool
	splicing := true
	for full := 0; ; {
		if full == bulkAfter && splicing {
			full = 0
			switch d.splice(in, out) {
			case spliceEnded:
				return true
			case spliceBroken:
				return false
			case spliceUnable:
				splicing = false
			case spliceQuiet:
			}
		}
		buf, n, err := pool.readReady(in)
		if n > 0 {
			m, err := dst.Write(buf[:n])
			d.count(m)
			pool.putBuffer(buf)
			if err != nil {
				d.j.fail(d.dstReset, err)
				return false
			}
		}
		if errors.Is(err, io.EOF) {
			return true
		}
		if err != nil {
			d.j.fail(d.srcReset, err)
			return false
		}
		if full++; n < copyBuffer {
			full = 0
		}
	}
}

// How a spell of splicing ended.
type spliceEnd int

const (
	spliceEnded  spliceEnd = iota // src came to its end
	spliceBroken                  // a side broke, the join is aborted
	spliceQuiet                   // little moves: copies are cheaper
	spliceUnable                  // no pipe to be had, or a socket that cannot
)

// splice moves bytes by pipe while there is bulk. It holds a pipe only from the
// moment that src has bytes until dst has taken them.
func (d *direction) splice(in, out syscall.RawConn) spliceEnd {
	pool := d.j.relay.pool
	for quiet := 0; quiet < quietAfter; {
		var p *pipe
		var n int
		var err error
		waited := in.Read(func(fd uintptr) bool {
			if p == nil {
				if p = pool.pipe(); p == nil {
					return true
				}
			}
			n, err = move(int(fd), p.w, pipeSize)
			if errors.Is(err, unix.EAGAIN) { // the pipe is empty, so it is the socket
				pool.putPipe(p)
				p = nil
				return false
			}
			return true
		})
		switch {
		case waited != nil:
			err = waited
		case p == nil, errors.Is(err, unix.EINVAL):
			if p != nil {
				pool.putPipe(p)
			}
			return spliceUnable
		case err != nil:
			err = os.NewSyscallError("splice", err)
		}
		if n == 0 && p != nil {
			pool.putPipe(p)
		}
		if err != nil {
			d.j.fail(d.srcReset, err)
			return spliceBroken
		}
		if n == 0 {
			return spliceEnded
		}
		left := n
		waited = out.Write(func(fd uintptr) bool {
			for left > 0 {
				var m int
				if m, err = move(p.r, int(fd), left); err != nil {
					return !errors.Is(err, unix.EAGAIN)
				}
				left -= m
				d.count(m)
			}
			return true
		})
		if left > 0 {
			p.close() // it holds bytes of this connection
			if waited == nil {
				waited = os.NewSyscallError("splice", err)
			}
			d.j.fail(d.dstReset, waited)
			return spliceBroken
		}
		pool.putPipe(p)
		if quiet++; n >= smallMove {
			quiet = 0
		}
	}
	return spliceQuiet
}

func move(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if !errors.Is(err, unix.EINTR) {
			return int(max(n, 0)), err
		}
	}
}
