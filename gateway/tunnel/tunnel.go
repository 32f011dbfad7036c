package tunnel

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Handler answers one incoming stream; it runs in a goroutine of its own. When
// it returns, a stream that is not answered is refused with 500 and one that is
// not finished in both directions is reset.
type Handler func(in *Incoming)

// Tunnel is one end of a connection that carries streams. All its methods are
// safe for concurrent use.
type Tunnel struct {
	cfg     Config
	conn    net.Conn
	wire    *Wire
	handler Handler // nil on the client's side

	// Of the reading goroutine alone.
	br         *bufio.Reader
	framer     *http2.Framer // reads
	hdec       *hpack.Decoder
	recvWin    int // what the peer may still send
	recvCredit int // received, not yet returned
	budget     budget
	resets     budget // for streams reset before their answer

	mu           sync.Mutex
	streams      map[uint32]*Stream
	nextID       uint32 // client: the id of the next stream
	lastPeer     uint32 // server: the highest id seen
	handlers     int    // server: how many run
	peerStreams  int    // client: what the server allows at once
	peerCredits  bool   // it returns the connection's credit at receipt
	peerFrame    int
	peerWindow   int   // a new stream's sendWin
	sendWin      int64 // of the connection
	control      *http2.Framer
	henc         *hpack.Encoder
	hbuf         headerBuffer
	queue        []segment
	spareQueue   []segment
	queuedData   int
	queuedOther  int
	waiters      []*Stream // for the connection's window or the queue's room, first come
	draining     bool      // no new stream from here: local ones fail, or GOAWAY is sent
	goneAway     bool      // server: the last GOAWAY is out, later streams are ignored
	peerDraining bool      // the peer sent GOAWAY
	err          error
	pings        map[uint64]chan struct{}
	nextPing     uint64
	idleSince    time.Time
	opened       uint64
	refused      uint64

	kick     chan struct{}
	settled  chan struct{} // closed when the peer's SETTINGS have come
	failed   chan struct{} // closed when err is set
	done     chan struct{}
	bytesIn  atomic.Uint64
	bytesOut atomic.Uint64
	rtt      atomic.Int64
}

// drainPing marks the ping whose answer ends the time in which streams that the
// peer opened before it saw our GOAWAY are still taken.
const drainPing = 1 << 63

// Client begins a tunnel on a connection that this side has opened. It takes
// conn over and never blocks; streams may be opened at once.
func Client(conn net.Conn, cfg Config) *Tunnel {
	t := newTunnel(conn, cfg, nil)
	t.nextID = 1
	t.start([]byte(http2.ClientPreface), http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	return t
}

// Serve begins a tunnel on an accepted connection, takes conn over and returns
// at once. h runs for every stream that the peer opens.
func Serve(conn net.Conn, cfg Config, h Handler) *Tunnel {
	t := newTunnel(conn, cfg, h)
	t.start(nil, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(t.cfg.MaxStreams)})
	return t
}

func newTunnel(conn net.Conn, cfg Config, h Handler) *Tunnel {
	cfg = cfg.withDefaults()
	t := &Tunnel{
		cfg:         cfg,
		conn:        conn,
		wire:        wireOf(conn),
		handler:     h,
		br:          bufio.NewReaderSize(conn, 4<<10),
		hdec:        hpack.NewDecoder(headerTable, nil),
		recvWin:     cfg.ConnWindow,
		budget:      newBudget(cfg, 1),
		resets:      newBudget(cfg, 10),
		streams:     map[uint32]*Stream{},
		peerStreams: defaultStreams,
		peerFrame:   defaultFrame,
		peerWindow:  defaultWindow,
		sendWin:     defaultWindow,
		pings:       map[uint64]chan struct{}{},
		idleSince:   cfg.Clock.Now(),
		kick:        make(chan struct{}, 1),
		settled:     make(chan struct{}),
		failed:      make(chan struct{}),
		done:        make(chan struct{}),
	}
	t.framer = http2.NewFramer(nil, t.br)
	t.framer.SetMaxReadFrameSize(maxFrame)
	t.control = http2.NewFramer((*controlQueue)(t), nil)
	t.hdec.SetMaxStringLength(2 * cfg.MaxHeaderBytes)
	t.henc = hpack.NewEncoder(&t.hbuf)
	if t.wire != nil {
		t.wire.gather(true)
	}
	return t
}

func (t *Tunnel) start(preface []byte, role http2.Setting) {
	_, _ = (*controlQueue)(t).Write(preface) // never fails
	t.control.WriteSettings(role,
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(t.cfg.StreamWindow)},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: maxFrame},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: uint32(t.cfg.MaxHeaderBytes)},
		http2.Setting{ID: settingCredit, Val: 1},
	)
	if more := t.cfg.ConnWindow - defaultWindow; more > 0 {
		t.control.WriteWindowUpdate(0, uint32(more))
	}
	t.wakeWriter()
	go t.supervise()
}

// supervise owns the connection: it starts the two goroutines that use it and
// closes it when the tunnel has failed.
func (t *Tunnel) supervise() {
	defer close(t.done)
	written, read := make(chan struct{}), make(chan struct{})
	go func() { defer close(written); t.write() }()
	go func() { defer close(read); t.fail(t.read()) }()

	timer := t.cfg.Clock.NewTimer(t.cfg.SettingsTimeout)
	select {
	case <-t.settled:
	case <-t.failed:
	case <-timer.C():
		t.fail(violation(http2.ErrCodeSettingsTimeout, "no SETTINGS within %v", t.cfg.SettingsTimeout))
	}
	timer.Stop()
	<-t.failed
	// Let the last words out, but not for ever: the peer may read nothing.
	timer = t.cfg.Clock.NewTimer(t.cfg.SettingsTimeout)
	select {
	case <-written:
	case <-timer.C():
	}
	timer.Stop()
	if t.wire != nil {
		select {
		case <-written:
			t.wire.gather(false)
		default:
			t.wire.Conn.Close() // a write is stuck below TLS
		}
	}
	t.conn.Close()
	<-written
	<-read
}

// fail ends the tunnel; the first reason counts. ErrClosed is the orderly one.
func (t *Tunnel) fail(err error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	t.err = err
	var lost *LostError
	switch {
	case errors.As(err, &lost) && !lost.Remote && lost.Code != http2.ErrCodeNo:
		t.control.WriteGoAway(t.lastPeer, lost.Code, []byte(lost.Err.Error()))
	case errors.Is(err, ErrClosed):
		t.control.WriteGoAway(t.lastPeer, http2.ErrCodeNo, nil)
	}
	streams := t.streams
	t.streams = map[uint32]*Stream{}
	t.waiters = nil
	t.mu.Unlock()
	close(t.failed)
	t.wakeWriter()
	for _, s := range streams {
		s.end(err, false)
	}
}

// Close ends the tunnel at once, with every stream in it.
func (t *Tunnel) Close() error {
	t.fail(ErrClosed)
	<-t.done
	return nil
}

// Drain asks for no more streams: from now on Open fails, the peer is told to
// open none, and what it had opened before it heard is still served. Open
// streams live on; when the last has ended, the tunnel closes.
func (t *Tunnel) Drain() {
	t.mu.Lock()
	if t.draining || t.err != nil {
		t.mu.Unlock()
		return
	}
	t.draining = true
	if t.handler != nil {
		t.control.WriteGoAway(maxStreamID, http2.ErrCodeNo, nil)
		t.control.WritePing(false, pingData(drainPing))
	}
	finished := t.finished()
	t.mu.Unlock()
	t.wakeWriter()
	if finished {
		t.fail(ErrClosed)
	}
}

// finished reports whether a draining tunnel has nothing left to wait for.
// Callers hold mu.
func (t *Tunnel) finished() bool {
	if len(t.streams) > 0 {
		return false
	}
	if t.handler == nil {
		return t.draining || t.peerDraining
	}
	return t.goneAway
}

// Done is closed when the connection is closed and nothing runs on it any more.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Draining is true once no stream can be opened, be it this side's or the
// peer's wish, or the end.
func (t *Tunnel) Draining() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.draining || t.peerDraining || t.err != nil
}

// Err is why the tunnel ended: ErrClosed after Close or a complete drain,
// otherwise a *LostError. It is nil before.
func (t *Tunnel) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Ping measures a round trip through both ends' tunnels.
func (t *Tunnel) Ping(ctx context.Context) (time.Duration, error) {
	pong := make(chan struct{})
	t.mu.Lock()
	if t.err != nil {
		defer t.mu.Unlock()
		return 0, fmt.Errorf("ping: %w", t.err)
	}
	t.nextPing++
	id := t.nextPing
	t.pings[id] = pong
	began := t.cfg.Clock.Now()
	t.control.WritePing(false, pingData(id))
	t.mu.Unlock()
	t.wakeWriter()
	defer func() {
		t.mu.Lock()
		delete(t.pings, id)
		t.mu.Unlock()
	}()
	select {
	case <-pong:
		rtt := t.cfg.Clock.Now().Sub(began)
		t.rtt.Store(int64(rtt))
		return rtt, nil
	case <-t.failed:
		return 0, fmt.Errorf("ping: %w", t.Err())
	case <-ctx.Done():
		return 0, fmt.Errorf("ping: %w", context.Cause(ctx))
	}
}

func pingData(id uint64) (b [8]byte) {
	binary.BigEndian.PutUint64(b[:], id)
	return b
}

// Stats is a tunnel's account at one moment.
type Stats struct {
	Active            int    // streams open now
	Opened, Refused   uint64 // streams, since the start
	BytesIn, BytesOut uint64 // of streams' contents
	RTT               time.Duration
	IdleSince         time.Time // when the last stream ended; zero while one is open
}

// Stats tells how much has gone through. RTT is the last Ping's, 0 before one.
func (t *Tunnel) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Stats{
		Active: len(t.streams), Opened: t.opened, Refused: t.refused,
		BytesIn: t.bytesIn.Load(), BytesOut: t.bytesOut.Load(),
		RTT: time.Duration(t.rtt.Load()), IdleSince: t.idleSince,
	}
}

// Room is how many more streams the client's side may open now.
func (t *Tunnel) Room() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.handler != nil || t.draining || t.peerDraining || t.err != nil {
		return 0
	}
	return max(0, t.most()-len(t.streams))
}

// most is how many streams a client may have open. Callers hold mu.
func (t *Tunnel) most() int {
	own := t.cfg.LateStreams
	if t.peerCredits {
		own = t.cfg.MaxStreams
	}
	return min(t.peerStreams, own)
}

// Settled is closed when the peer's SETTINGS have come: only then is it certain
// that it speaks the protocol, and Room is exact.
func (t *Tunnel) Settled() <-chan struct{} { return t.settled }

// add and remove keep the set of open streams. Callers hold mu.
func (t *Tunnel) add(s *Stream) {
	t.streams[s.id] = s
	t.opened++
	t.idleSince = time.Time{}
}

func (t *Tunnel) remove(s *Stream) {
	if t.streams[s.id] != s {
		return
	}
	delete(t.streams, s.id)
	if len(t.streams) == 0 {
		t.idleSince = t.cfg.Clock.Now()
	}
}

// settle closes the tunnel if the stream that was just removed was the last one
// that a drain waited for.
func (t *Tunnel) settle() {
	t.mu.Lock()
	finished := t.err == nil && t.finished()
	t.mu.Unlock()
	if finished {
		t.fail(ErrClosed)
	}
}
