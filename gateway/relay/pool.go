package relay

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	copyBuffer = 32 << 10
	pipeSize   = 1 << 20
	// bulkAfter is how many reads in a row must fill the copy buffer before a
	// pipe is borrowed, and quietAfter how many small splices give it up again.
	bulkAfter  = 3
	quietAfter = 4
	smallMove  = 16 << 10
	// idlePipes is how many pipes wait for use: two descriptors each, and a
	// megabyte that the kernel counts against the user only while it is filled.
	idlePipes = 64
)

// pipe is borrowed empty and given back empty.
type pipe struct{ r, w int }

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// pool lends copy buffers and pipes.
type pool struct {
	buffers sync.Pool
	mu      sync.Mutex
	pipes   []*pipe
	closed  bool
}

func newPool() *pool {
	return &pool{buffers: sync.Pool{New: func() any { return new([copyBuffer]byte) }}}
}

func (p *pool) buffer() *[copyBuffer]byte     { return p.buffers.Get().(*[copyBuffer]byte) }
func (p *pool) putBuffer(b *[copyBuffer]byte) { p.buffers.Put(b) }

// pipe is nil when the process may open no more: bytes can still be copied.
func (p *pool) pipe() *pipe {
	p.mu.Lock()
	if n := len(p.pipes); n > 0 {
		last := p.pipes[n-1]
		p.pipes = p.pipes[:n-1]
		p.mu.Unlock()
		return last
	}
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	// Past the user's share of pipe pages the default of 64 KiB remains.
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{r: fds[0], w: fds[1]}
}

func (p *pool) putPipe(x *pipe) {
	p.mu.Lock()
	keep := !p.closed && len(p.pipes) < idlePipes
	if keep {
		p.pipes = append(p.pipes, x)
	}
	p.mu.Unlock()
	if !keep {
		x.close()
	}
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, x := range p.pipes {
		x.close()
	}
	p.pipes = nil
}

// readReady waits until there is something to read and borrows a buffer for it
// only then. The buffer is the caller's when n > 0.
func (p *pool) readReady(raw syscall.RawConn) (buf *[copyBuffer]byte, n int, err error) {
	waited := raw.Read(func(fd uintptr) bool {
		if buf == nil {
			buf = p.buffer()
		}
		for {
			if n, err = unix.Read(int(fd), buf[:]); !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if errors.Is(err, unix.EAGAIN) {
			p.putBuffer(buf)
			buf = nil
			return false
		}
		return true
	})
	switch {
	case waited != nil: // closed, or a deadline
		n, err = 0, waited
	case err != nil:
		n, err = 0, os.NewSyscallError("read", err)
	case n == 0:
		err = io.EOF
	}
	if n == 0 && buf != nil {
		p.putBuffer(buf)
		buf = nil
	}
	return buf, n, err
}
