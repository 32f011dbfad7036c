package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// handOver is the least payload that is worth a segment of its own; less is
// copied into the frames before it.
const handOver = 4 << 10

// gatherMost bounds the bytes that one vectored write takes from a stream.
const gatherMost = 256 << 10

// Read reads what has arrived, io.EOF after the peer's CloseWrite.
func (s *Stream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.awaitInput(); err != nil {
		return 0, err
	}
	s.rmu.Lock()
	n := 0
	for n < len(p) && len(s.in) > 0 {
		c := s.in[0]
		m := copy(p[n:], c.bytes())
		n += m
		if c.r += m; c.r == c.w {
			s.t.cfg.Buffers.put(c)
			s.in[0] = nil
			s.in = s.in[1:]
		}
	}
	s.rmu.Unlock()
	s.consumed(n)
	return n, nil
}

// awaitInput returns nil when there is something to read. Callers hold reading.
func (s *Stream) awaitInput() error {
	for {
		s.rmu.Lock()
		ready, err := len(s.in) > 0, s.recvErr
		s.rmu.Unlock()
		if ready {
			return nil
		}
		if err != nil {
			s.rmu.Lock()
			s.read = true
			s.rmu.Unlock()
			signal(s.writable)
			return err
		}
		if err := s.wait(s.readable, &s.readBy); err != nil {
			return err
		}
	}
}

// consumed returns credit for n bytes that the reader has taken.
func (s *Stream) consumed(n int) {
	s.bytesIn.Add(uint64(n))
	s.rmu.Lock()
	s.credit += n
	credit := s.credit
	if s.recvErr != nil || credit < s.t.cfg.StreamWindow/4 {
		s.rmu.Unlock()
		return
	}
	s.credit = 0
	s.recvWin += credit
	s.rmu.Unlock()
	t := s.t
	t.mu.Lock()
	if t.streams[s.id] == s && t.err == nil {
		t.control.WriteWindowUpdate(s.id, uint32(credit))
	}
	t.mu.Unlock()
	t.wakeWriter()
}

// WriteTo copies to w until the peer's CloseWrite: to a *net.TCPConn with one
// vectored write for all that has arrived.
func (s *Stream) WriteTo(w io.Writer) (int64, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	var total int64
	var taken []*chunk
	var vec net.Buffers
	_, vectored := w.(*net.TCPConn)
	for {
		if err := s.awaitInput(); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return total, err
		}
		s.rmu.Lock()
		n, size := 0, 0
		for n < len(s.in) && size < gatherMost {
			size += len(s.in[n].bytes())
			n++
		}
		taken = append(taken[:0], s.in[:n]...)
		if n == len(s.in) {
			clear(s.in)
			s.in = s.in[:0]
		} else {
			clear(s.in[:n])
			s.in = s.in[n:]
		}
		s.rmu.Unlock()

		var sent int64
		var err error
		if vectored && n > 1 {
			list := vec[:0]
			for _, c := range taken {
				list = append(list, c.bytes())
			}
			vec = list // WriteTo consumes its receiver; this keeps the array
			sent, err = list.WriteTo(w)
		} else {
			for _, c := range taken {
				var m int
				m, err = w.Write(c.bytes())
				sent += int64(m)
				if err != nil {
					break
				}
			}
		}
		for i, c := range taken {
			s.t.cfg.Buffers.put(c)
			taken[i] = nil
		}
		total += sent
		s.consumed(size)
		if err != nil {
			return total, err
		}
	}
}

// Write sends p, waiting for the peer's windows as need be. It returns when p is
// in the tunnel's queue, which holds little.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	total := 0
	for len(p) > 0 {
		n, _, err := s.send(p, nil)
		total += n
		p = p[n:]
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// writeErr is why s takes no more bytes. Callers hold t.mu.
func (s *Stream) writeErr() error {
	switch {
	case s.sendErr != nil:
		return s.sendErr
	case s.sendDone:
		return net.ErrClosed
	case s.t.err != nil:
		return s.t.err
	case s.answer == nil && !s.answered:
		return ErrClosed // nothing may be sent ahead of an answer
	}
	return nil
}

// send puts one frame with the first n bytes of p into the queue. If all of p
// fits and is large, and lies in c behind room for a frame's header, then c
// itself is given away to the queue instead of a copy.
func (s *Stream) send(p []byte, c *chunk) (n int, given bool, err error) {
	t := s.t
	for {
		t.mu.Lock()
		if err := s.writeErr(); err != nil {
			t.unqueue(s)
			t.mu.Unlock()
			return 0, false, err
		}
		deaf := s.deaf
		if deaf {
			t.unqueue(s)
		} else if n = t.allow(s, len(p)); n > 0 {
			break
		}
		t.mu.Unlock()
		if deaf {
			if err := s.unheard(); err != nil {
				return 0, false, err
			}
		}
		if err := s.wait(s.writable, &s.writeBy); err != nil {
			t.mu.Lock()
			t.unqueue(s)
			t.mu.Unlock()
			return 0, false, err
		}
	}
	if c != nil && n == len(p) && n >= handOver {
		putDataHeader(c.b, s.id, n, 0)
		c.r, c.w = 0, frameHeader+n
		t.queue = append(t.queue, segment{c: c, data: n, full: true})
		t.queuedData += n
		given = true
	} else {
		t.gatherData(s.id, p[:n], 0)
	}
	t.mu.Unlock()
	t.wakeWriter()
	s.bytesOut.Add(uint64(n))
	return n, given, nil
}

// awaitWindow waits until the stream's own window is open and returns how much
// one frame may hold, so that no buffer is held meanwhile.
func (s *Stream) awaitWindow() (int, error) {
	t := s.t
	for {
		t.mu.Lock()
		err := s.writeErr()
		n := int64(min(t.peerFrame, maxFrame))
		if !s.deaf { // else only what there is to write fails, not the end
			n = min(n, s.sendWin)
		}
		t.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if n > 0 {
			return int(n), nil
		}
		if err := s.wait(s.writable, &s.writeBy); err != nil {
			return 0, err
		}
	}
}

// ReadFrom copies from r until its end, which it does not pass on: CloseWrite
// does. From a *net.TCPConn it borrows a buffer only while there are bytes to
// read, and reads them to where they are sent from. A reset of the stream does
// not interrupt a read from r: watch Context for that.
func (s *Stream) ReadFrom(r io.Reader) (int64, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	read := s.t.cfg.Buffers.readWhole(r)
	if tcp, ok := r.(*net.TCPConn); ok {
		raw, err := tcp.SyscallConn()
		if err != nil {
			return 0, err
		}
		read = s.t.cfg.Buffers.readReady(raw)
	}
	var total int64
	for {
		limit, err := s.awaitWindow()
		if err != nil {
			return total, err
		}
		c, n, readErr := read(limit)
		for p := 0; p < n; {
			m, given, err := s.send(c.b[frameHeader+p:frameHeader+n], chunkAt(c, p))
			total += int64(m)
			p += m
			if given {
				c = nil
			}
			if err != nil {
				s.t.cfg.Buffers.put(c)
				return total, err
			}
		}
		if c != nil {
			s.t.cfg.Buffers.put(c)
		}
		if errors.Is(readErr, io.EOF) {
			return total, nil
		}
		if readErr != nil {
			return total, readErr
		}
	}
}

// chunkAt is c if it may be given away, which is while nothing was sent from it.
func chunkAt(c *chunk, sent int) *chunk {
	if sent > 0 {
		return nil
	}
	return c
}

// A reader of at most limit bytes into a borrowed chunk, behind room for a
// frame's header. The chunk is nil when nothing was read.
type chunkReader func(limit int) (*chunk, int, error)

func (p *Buffers) readWhole(r io.Reader) chunkReader {
	return func(limit int) (*chunk, int, error) {
		c := p.get(chunkLarge)
		n, err := r.Read(c.b[frameHeader : frameHeader+limit])
		if n == 0 {
			p.put(c)
			c = nil
		}
		return c, n, err
	}
}

func (p *Buffers) readReady(raw syscall.RawConn) chunkReader {
	return func(limit int) (*chunk, int, error) {
		var c *chunk
		var n int
		var err error
		waited := raw.Read(func(fd uintptr) bool {
			if c == nil {
				c = p.get(chunkLarge)
			}
			for {
				n, err = unix.Read(int(fd), c.b[frameHeader:frameHeader+limit])
				if !errors.Is(err, unix.EINTR) {
					break
				}
			}
			if errors.Is(err, unix.EAGAIN) {
				p.put(c)
				c = nil
				return false
			}
			return true
		})
		switch {
		case waited != nil: // closed, or a deadline
			err, n = waited, 0
		case err != nil:
			err, n = os.NewSyscallError("read", err), 0
		case n == 0:
			err = io.EOF
		}
		if n == 0 && c != nil {
			p.put(c)
			c = nil
		}
		return c, n, err
	}
}

var (
	_ net.Conn      = (*Stream)(nil)
	_ io.WriterTo   = (*Stream)(nil)
	_ io.ReaderFrom = (*Stream)(nil)
)
