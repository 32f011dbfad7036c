package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
)

// Stream is one byte stream in a tunnel. It is a net.Conn with half-close. One
// goroutine may read, another write, and any close it.
type Stream struct {
	t      *Tunnel
	id     uint32
	ctx    context.Context
	cancel context.CancelCauseFunc
	within time.Duration // Request.Within

	// Guarded by t.mu.
	sendWin  int64
	sendDone bool  // END_STREAM is queued
	recvDone bool  // END_STREAM has come
	deaf     bool  // client: the server has said all, and takes nothing more
	sendErr  error // why nothing can be written any more
	answered bool  // the response has come, or has been sent
	response Response
	refusal  error // why there will be no response
	queued   bool  // in t.waiters
	turn     bool  // taken from t.waiters, and woken
	wrote    bool  // bytes of the stream were queued

	answer   chan struct{} // client: closed with answered, or with refusal
	writable chan struct{}
	readable chan struct{}

	writing, reading sync.Mutex // one writer, one reader at a time
	writeBy, readBy  deadline

	rmu      sync.Mutex
	in       []*chunk
	recvWin  int // what the peer may still send
	credit   int // taken by the reader, not yet returned
	recvErr  error
	read     bool // the reader has been told recvErr
	bytesIn  atomic.Uint64
	bytesOut atomic.Uint64
}

func newStream(t *Tunnel, id uint32) *Stream {
	s := &Stream{
		t: t, id: id, sendWin: int64(t.peerWindow), recvWin: t.cfg.StreamWindow,
		writable: make(chan struct{}, 1), readable: make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// Open asks the far side for a stream and waits for its answer. The error is a
// *Refusal if it is another than 200, otherwise an *OpenError. ctx governs the
// opening only.
func (t *Tunnel) Open(ctx context.Context, r Request) (*Stream, Response, error) {
	s, err := t.Start(r)
	if err != nil {
		return nil, Response{}, err
	}
	resp, err := s.Response(ctx)
	if err != nil {
		return nil, Response{}, err
	}
	return s, resp, nil
}

// Start asks for a stream and does not wait: the caller may write at once, at
// the risk that the bytes reach a backend although the stream fails.
func (t *Tunnel) Start(r Request) (*Stream, error) {
	if r.Authority == "" || !httpguts.ValidHeaderFieldValue(r.Authority) {
		return nil, &OpenError{Safe: true, Err: fmt.Errorf("%q is no authority", r.Authority)}
	}
	if err := r.Header.check(); err != nil {
		return nil, &OpenError{Safe: true, Err: err}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.err != nil:
		return nil, &OpenError{Safe: true, Err: t.err}
	case t.handler != nil:
		return nil, &OpenError{Safe: true, Err: errors.New("a server opens no streams")}
	case t.draining || t.peerDraining || t.nextID > maxStreamID:
		return nil, &OpenError{Safe: true, Err: ErrDraining}
	case len(t.streams) >= t.most():
		return nil, &OpenError{Safe: true, Err: ErrFull}
	}
	s := newStream(t, t.nextID)
	s.answer, s.within = make(chan struct{}), r.Within
	t.nextID += 2
	t.add(s)
	t.writeHeader(s.id, false, Header{{":method", "CONNECT"}, {":authority", r.Authority}}, r.Header)
	t.wakeWriter()
	return s, nil
}

// Response waits for the answer to Start; errors are Open's. When it fails the
// stream is over.
func (s *Stream) Response(ctx context.Context) (Response, error) {
	if s.answer == nil {
		return Response{}, errors.New("an accepted stream has no response")
	}
	var late <-chan time.Time
	if s.within > 0 {
		timer := s.t.cfg.Clock.NewTimer(s.within)
		defer timer.Stop()
		late = timer.C()
	}
	select {
	case <-s.answer:
	case <-late:
		s.abandon(ErrNoAnswer, http2.ErrCodeCancel)
		<-s.answer
	case <-ctx.Done():
		s.abandon(context.Cause(ctx), http2.ErrCodeCancel)
		<-s.answer
	}
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	return s.response, s.refusal
}

// Await blocks until there is something to read or the peer has ended its
// direction (nil), the stream is broken (why), or stop is closed (nil). It takes
// nothing.
func (s *Stream) Await(stop <-chan struct{}) error {
	s.reading.Lock()
	defer s.reading.Unlock()
	for {
		s.rmu.Lock()
		ready, err := len(s.in) > 0, s.recvErr
		s.rmu.Unlock()
		if ready || errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-s.readable:
		case <-stop:
			return nil
		}
	}
}

// Incoming is a stream that the peer asks for.
type Incoming struct {
	Authority string
	Header    Header
	s         *Stream
}

// Context ends when the peer takes the request back or the tunnel is lost, not
// at the proper end of the stream.
func (in *Incoming) Context() context.Context { return in.s.ctx }

// Accept answers 200: a backend is connected.
func (in *Incoming) Accept(h Header) (*Stream, error) {
	if err := in.respond(200, h, false); err != nil {
		return nil, err
	}
	return in.s, nil
}

// Refuse answers with a status other than 200, and ends the stream.
func (in *Incoming) Refuse(status int, h Header) error {
	err := in.respond(status, h, true)
	if err == nil {
		in.s.abandon(&Refusal{Status: status, Header: h}, http2.ErrCodeNo)
	}
	return err
}

func (in *Incoming) respond(status int, h Header, end bool) error {
	if err := h.check(); err != nil {
		return err
	}
	s, t := in.s, in.s.t
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case s.sendErr != nil:
		return s.sendErr
	case s.answered:
		return errors.New("the stream is answered already")
	}
	s.answered, s.sendDone = true, end
	if end {
		t.refused++
	}
	t.writeHeader(s.id, end, Header{{":status", strconv.Itoa(status)}}, h)
	t.wakeWriter()
	return nil
}

func (in *Incoming) run() {
	t := in.s.t
	defer func() {
		t.mu.Lock()
		t.handlers--
		t.mu.Unlock()
	}()
	t.handler(in)
	_ = in.Refuse(500, nil) // no effect if it is answered
	in.s.Close()
}

// claim takes n arriving bytes from the stream's window, of which extra are not
// content, and says what the peer did wrong.
func (s *Stream) claim(n, extra int) http2.ErrCode {
	if s.answer != nil {
		s.t.mu.Lock()
		answered := s.answered
		s.t.mu.Unlock()
		if !answered {
			return http2.ErrCodeProtocol
		}
	}
	s.rmu.Lock()
	defer s.rmu.Unlock()
	if s.recvErr != nil {
		return http2.ErrCodeStreamClosed
	}
	if s.recvWin -= n; s.recvWin < 0 {
		return http2.ErrCodeFlowControl
	}
	s.credit += extra
	return http2.ErrCodeNo
}

// receive appends p to what is to be read; p may be the content of c, which is
// then given away. Small pieces are put together, so that the memory that a
// stream holds stays in proportion to the bytes it holds.
func (s *Stream) receive(p []byte, c *chunk) {
	s.rmu.Lock()
	if s.recvErr != nil { // closed since the claim
		s.rmu.Unlock()
		if c != nil {
			s.t.cfg.Buffers.put(c)
		}
		return
	}
	if n := len(s.in); n > 0 && s.in[n-1].spare() >= len(p) {
		tail := s.in[n-1]
		tail.w += copy(tail.b[tail.w:], p)
	} else {
		if c == nil {
			c = s.t.cfg.Buffers.get(len(p))
			c.w = copy(c.b, p)
		}
		s.in = append(s.in, c)
		c = nil
	}
	s.rmu.Unlock()
	if c != nil {
		s.t.cfg.Buffers.put(c)
	}
	signal(s.readable)
}

// peerEnded records END_STREAM. What has arrived can still be read.
func (s *Stream) peerEnded() {
	t := s.t
	t.mu.Lock()
	s.recvDone = true
	over := s.sendDone
	if over {
		t.remove(s)
	}
	t.mu.Unlock()
	s.stopReading(io.EOF, false)
	if over {
		t.settle()
	}
}

// unheard is why a write to a server that takes nothing more fails, once its
// answer has been read to the end: an error before would have the caller drop
// what it has not read yet. It is nil until then.
func (s *Stream) unheard() error {
	s.rmu.Lock()
	read := s.read
	s.rmu.Unlock()
	if !read {
		return nil
	}
	err := &ResetError{Code: http2.ErrCodeNo, Remote: true}
	s.end(err, false)
	return err
}

func (s *Stream) stopReading(err error, drop bool) {
	s.rmu.Lock()
	if s.recvErr == nil || drop {
		s.recvErr = err
	}
	if drop {
		for _, c := range s.in {
			s.t.cfg.Buffers.put(c)
		}
		s.in = nil
	}
	s.rmu.Unlock()
	signal(s.readable)
}

// end breaks a stream that is no longer among the tunnel's. Bytes that came
// before may still be read, unless they are dropped.
func (s *Stream) end(err error, drop bool) {
	t := s.t
	t.mu.Lock()
	if s.sendErr == nil {
		s.sendErr = err
	}
	if s.answer != nil && !s.answered && s.refusal == nil {
		if refusal, ok := errors.AsType[*Refusal](err); ok {
			s.refusal = refusal
		} else {
			var reset *ResetError
			untaken := errors.As(err, &reset) && reset.Remote && reset.Code == http2.ErrCodeRefusedStream
			s.refusal = &OpenError{Safe: untaken || !s.wrote, Err: err}
		}
		close(s.answer)
	}
	t.mu.Unlock()
	s.cancel(err) // first: who sees an error from the stream finds the context ended
	s.stopReading(err, drop)
	signal(s.writable)
}

// abandon ends the stream from this side: with RST_STREAM, unless both
// directions had ended.
func (s *Stream) abandon(err error, code http2.ErrCode) {
	t := s.t
	t.mu.Lock()
	if t.streams[s.id] == s {
		t.remove(s)
		if t.err == nil && !(s.sendDone && s.recvDone) {
			t.control.WriteRSTStream(s.id, code)
			t.wakeWriter()
		}
	}
	t.mu.Unlock()
	s.end(err, true)
	t.settle()
}

func (s *Stream) reset(code http2.ErrCode) { s.abandon(&ResetError{Code: code}, code) }

// Reset ends both directions at once; the peer learns the code.
func (s *Stream) Reset(code http2.ErrCode) { s.reset(code) }

// Abort is a Reset with the code that stands for a broken TCP connection.
func (s *Stream) Abort() { s.reset(http2.ErrCodeConnect) }

// Close ends the stream. If a direction has not come to its proper end the peer
// sees a reset (CANCEL). Unread bytes are dropped.
func (s *Stream) Close() error {
	s.abandon(net.ErrClosed, http2.ErrCodeCancel)
	return nil
}

// CloseWrite ends this side's direction; the other goes on.
func (s *Stream) CloseWrite() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	t := s.t
	t.mu.Lock()
	if s.sendErr != nil || s.sendDone || s.deaf {
		defer t.mu.Unlock()
		return s.sendErr
	}
	s.sendDone = true
	t.gatherData(s.id, nil, http2.FlagDataEndStream)
	over := s.recvDone
	if over {
		t.remove(s)
	}
	t.mu.Unlock()
	t.wakeWriter()
	if over {
		t.settle()
	}
	return nil
}

// Context ends when the stream is reset, closed by this side or lost with its
// tunnel, with that as its cause; not at the proper end of both directions.
func (s *Stream) Context() context.Context { return s.ctx }

// BytesIn and BytesOut count the content that was read and written.
func (s *Stream) BytesIn() uint64  { return s.bytesIn.Load() }
func (s *Stream) BytesOut() uint64 { return s.bytesOut.Load() }

// LocalAddr and RemoteAddr are those of the tunnel's connection.
func (s *Stream) LocalAddr() net.Addr  { return s.t.conn.LocalAddr() }
func (s *Stream) RemoteAddr() net.Addr { return s.t.conn.RemoteAddr() }

// deadline is a point of the tunnel's clock; zero means none.
type deadline struct {
	mu sync.Mutex
	at time.Time
}

func (d *deadline) set(at time.Time) {
	d.mu.Lock()
	d.at = at
	d.mu.Unlock()
}

func (d *deadline) get() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at
}

// SetDeadline sets both deadlines, as for a net.Conn but on the tunnel's clock.
func (s *Stream) SetDeadline(at time.Time) error {
	_ = s.SetReadDeadline(at) // never fails
	return s.SetWriteDeadline(at)
}

// SetReadDeadline makes reads that wait at that time, or later, fail with
// os.ErrDeadlineExceeded.
func (s *Stream) SetReadDeadline(at time.Time) error {
	s.readBy.set(at)
	signal(s.readable)
	return nil
}

// SetWriteDeadline does the same for writes.
func (s *Stream) SetWriteDeadline(at time.Time) error {
	s.writeBy.set(at)
	signal(s.writable)
	return nil
}

// wait blocks until woken; the reason is for the caller to look up.
func (s *Stream) wait(wake chan struct{}, d *deadline) error {
	at := d.get()
	if at.IsZero() {
		<-wake
		return nil
	}
	left := at.Sub(s.t.cfg.Clock.Now())
	if left <= 0 {
		return os.ErrDeadlineExceeded
	}
	timer := s.t.cfg.Clock.NewTimer(left)
	defer timer.Stop()
	select {
	case <-wake:
	case <-timer.C():
	}
	return nil // at the deadline the caller comes back and finds it past
}
