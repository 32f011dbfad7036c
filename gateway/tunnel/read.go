package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"golang.org/x/net/http2"

	"github.com/weftmesh/weft/federation/clock"
)

// read takes the peer's frames until the tunnel ends, and returns why. It never
// waits for the goroutine that writes.
func (t *Tunnel) read() error {
	err := t.readFrames()
	var lost *LostError
	var code http2.ConnectionError
	switch {
	case errors.As(err, &lost):
		return err
	case errors.As(err, &code):
		detail := t.framer.ErrorDetail()
		if detail == nil {
			detail = err
		}
		return &LostError{Code: http2.ErrCode(code), Err: detail}
	case errors.Is(err, http2.ErrFrameTooLarge):
		return &LostError{Code: http2.ErrCodeFrameSize, Err: err}
	case errors.Is(err, io.EOF):
		t.mu.Lock()
		over := len(t.streams) == 0 && (t.draining || t.peerDraining)
		t.mu.Unlock()
		if over {
			return ErrClosed
		}
		return &LostError{Err: errors.New("the peer closed the connection")}
	default:
		return &LostError{Err: err}
	}
}

func (t *Tunnel) readFrames() error {
	if t.handler != nil {
		var preface [len(http2.ClientPreface)]byte
		if _, err := io.ReadFull(t.br, preface[:]); err != nil {
			return err
		}
		if string(preface[:]) != http2.ClientPreface {
			return violation(http2.ErrCodeProtocol, "the connection does not begin with the HTTP/2 preface")
		}
	}
	for first := true; ; first = false {
		fh, err := t.framer.ReadFrameHeader()
		if err != nil {
			return err
		}
		if first && (fh.Type != http2.FrameSettings || fh.Flags.Has(http2.FlagSettingsAck)) {
			return violation(http2.ErrCodeProtocol, "the first frame is %v, not SETTINGS", fh.Type)
		}
		if fh.Type == http2.FrameData {
			if err := t.readData(fh); err != nil {
				return err
			}
			continue
		}
		if err := t.readOther(fh); err != nil {
			return err
		}
		if first {
			close(t.settled)
		}
		t.mu.Lock()
		unread := t.queuedOther
		t.mu.Unlock()
		if unread > maxQueuedControl {
			return violation(http2.ErrCodeEnhanceYourCalm, "%d bytes of answers wait because the peer does not read", unread)
		}
	}
}

func (t *Tunnel) readOther(fh http2.FrameHeader) error {
	if fh.Type == http2.FrameHeaders && int(fh.Length) > 2*t.cfg.MaxHeaderBytes {
		return violation(http2.ErrCodeEnhanceYourCalm, "a HEADERS frame of %d bytes, the limit is %d", fh.Length, 2*t.cfg.MaxHeaderBytes)
	}
	f, err := t.framer.ReadFrameForHeader(fh)
	if se, ok := errors.AsType[http2.StreamError](err); ok {
		return t.badStream(se.StreamID, se.Code)
	}
	if err != nil {
		return err
	}
	switch f := f.(type) {
	case *http2.HeadersFrame:
		return t.onHeaders(f)
	case *http2.SettingsFrame:
		return t.onSettings(f)
	case *http2.WindowUpdateFrame:
		return t.onWindowUpdate(f)
	case *http2.RSTStreamFrame:
		return t.onReset(f)
	case *http2.PingFrame:
		return t.onPing(f)
	case *http2.GoAwayFrame:
		return t.onGoAway(f)
	case *http2.PushPromiseFrame:
		return violation(http2.ErrCodeProtocol, "PUSH_PROMISE, which is switched off")
	default: // PRIORITY and types of the future carry nothing for us
		return t.budget.spend(fh.Type)
	}
}

// budget bounds the frames that make work and carry nothing.
type budget struct {
	clock  clock.Clock
	rate   float64 // a second
	burst  float64
	left   float64
	filled int64 // when left was computed, in UnixNano
}

func newBudget(cfg Config, times float64) budget {
	burst := times * float64(cfg.AbuseBurst)
	return budget{
		clock: cfg.Clock, rate: times * float64(cfg.AbuseRate), burst: burst,
		left: burst, filled: cfg.Clock.Now().UnixNano(),
	}
}

func (b *budget) spend(what fmt.Stringer) error {
	if b.left < 1 {
		now := b.clock.Now().UnixNano()
		b.left = math.Min(b.burst, b.left+float64(now-b.filled)*b.rate/1e9)
		b.filled = now
		if b.left < 1 {
			return violation(http2.ErrCodeEnhanceYourCalm, "too many %v frames that carry nothing", what)
		}
	}
	b.left--
	return nil
}

// known finds a stream by the id of a frame. A nil stream without error is one
// that has ended: what the peer sent before it knew is passed over.
func (t *Tunnel) known(id uint32, what http2.FrameType) (*Stream, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.streams[id]; s != nil {
		return s, nil
	}
	idle := id > t.lastPeer || id%2 == 0
	if t.handler == nil {
		idle = id >= t.nextID || id%2 == 0
	}
	if idle {
		return nil, violation(http2.ErrCodeProtocol, "%v for stream %d, which was never opened", what, id)
	}
	return nil, nil
}

// badStream answers a frame that is an error of one stream only.
func (t *Tunnel) badStream(id uint32, code http2.ErrCode) error {
	s, err := t.known(id, http2.FrameRSTStream)
	if err != nil {
		return err
	}
	if s != nil {
		s.reset(code)
	}
	return t.budget.spend(http2.FrameRSTStream)
}

func (t *Tunnel) readData(fh http2.FrameHeader) error {
	n := int(fh.Length)
	if fh.StreamID == 0 {
		return violation(http2.ErrCodeProtocol, "DATA on stream 0")
	}
	if t.recvWin -= n; t.recvWin < 0 {
		return violation(http2.ErrCodeFlowControl, "DATA beyond the connection's window")
	}
	if t.recvCredit += n; t.recvCredit >= t.cfg.ConnWindow/4 {
		t.mu.Lock()
		if t.err == nil {
			t.control.WriteWindowUpdate(0, uint32(t.recvCredit))
		}
		t.mu.Unlock()
		t.wakeWriter()
		t.recvWin += t.recvCredit
		t.recvCredit = 0
	}
	padding := 0
	if fh.Flags.Has(http2.FlagDataPadded) {
		p, err := t.br.ReadByte()
		if err != nil {
			return err
		}
		padding = int(p)
		if n -= 1 + padding; n < 0 {
			return violation(http2.ErrCodeProtocol, "DATA with more padding than payload")
		}
	}
	end := fh.Flags.Has(http2.FlagDataEndStream)
	if n == 0 && !end {
		if err := t.budget.spend(http2.FrameData); err != nil {
			return err
		}
	}
	s, err := t.known(fh.StreamID, http2.FrameData)
	if err != nil {
		return err
	}
	if s != nil {
		if code := s.claim(int(fh.Length), int(fh.Length)-n); code != http2.ErrCodeNo {
			s.reset(code)
			if err := t.budget.spend(http2.FrameData); err != nil {
				return err
			}
			s = nil
		}
	}
	if s == nil {
		_, err := t.br.Discard(n + padding)
		return err
	}
	t.bytesIn.Add(uint64(n))
	if err := t.deliver(s, n); err != nil {
		return err
	}
	if _, err := t.br.Discard(padding); err != nil {
		return err
	}
	if end {
		s.peerEnded()
	}
	return nil
}

// deliver moves n bytes from the connection to s.
func (t *Tunnel) deliver(s *Stream, n int) error {
	if n == 0 {
		return nil
	}
	if n <= chunkSmall {
		p, err := t.br.Peek(n)
		if err != nil {
			return err
		}
		s.receive(p, nil)
		_, _ = t.br.Discard(n) // they are there: Peek saw them
		return nil
	}
	c := t.cfg.Buffers.get(n)
	if _, err := io.ReadFull(t.br, c.b[:n]); err != nil {
		t.cfg.Buffers.put(c)
		return err
	}
	c.w = n
	s.receive(c.bytes(), c)
	return nil
}

func (t *Tunnel) onSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if err := t.budget.spend(http2.FrameSettings); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return nil
	}
	if t.handler == nil && t.peerStreams == defaultStreams {
		t.peerStreams = math.MaxInt32 // unless it says otherwise below
	}
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingMaxFrameSize:
			t.peerFrame = int(s.Val)
		case http2.SettingMaxConcurrentStreams:
			t.peerStreams = int(min(s.Val, math.MaxInt32))
		case settingCredit:
			t.peerCredits = s.Val == 1
		case http2.SettingHeaderTableSize:
			t.henc.SetMaxDynamicTableSize(min(s.Val, headerTable))
		case http2.SettingInitialWindowSize:
			grown := int64(s.Val) - int64(t.peerWindow)
			t.peerWindow = int(s.Val)
			for _, st := range t.streams {
				if st.sendWin += grown; st.sendWin > maxWindow {
					return violation(http2.ErrCodeFlowControl, "SETTINGS made the window of stream %d too large", st.id)
				}
				signal(st.writable)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.control.WriteSettingsAck()
	t.wakeWriter()
	return nil
}

func (t *Tunnel) onWindowUpdate(f *http2.WindowUpdateFrame) error {
	if f.StreamID == 0 {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.sendWin += int64(f.Increment); t.sendWin > maxWindow {
			return violation(http2.ErrCodeFlowControl, "WINDOW_UPDATE made the connection's window too large")
		}
		t.wakeNext()
		return nil
	}
	s, err := t.known(f.StreamID, f.Type)
	if s == nil || err != nil {
		return err
	}
	t.mu.Lock()
	s.sendWin += int64(f.Increment)
	over := s.sendWin > maxWindow
	t.mu.Unlock()
	if over {
		return t.badStream(f.StreamID, http2.ErrCodeFlowControl)
	}
	signal(s.writable)
	return nil
}

func (t *Tunnel) onReset(f *http2.RSTStreamFrame) error {
	s, err := t.known(f.StreamID, f.Type)
	if s == nil || err != nil {
		return err
	}
	t.mu.Lock()
	early := t.handler != nil && !s.answered
	t.remove(s)
	// A server that has sent its whole answer may say so that it wants no more
	// (RFC 9113, 8.1): the answer counts. Envoy does when its backend has closed.
	s.deaf = t.handler == nil && s.recvDone && f.ErrCode == http2.ErrCodeNo
	deaf := s.deaf
	t.mu.Unlock()
	if deaf {
		signal(s.writable)
	} else {
		s.end(&ResetError{Code: f.ErrCode, Remote: true}, false)
	}
	t.settle()
	if early {
		return t.resets.spend(f.Type)
	}
	return nil
}

func (t *Tunnel) onPing(f *http2.PingFrame) error {
	if !f.IsAck() {
		if err := t.budget.spend(f.Type); err != nil {
			return err
		}
		t.mu.Lock()
		if t.err == nil {
			t.control.WritePing(true, f.Data)
		}
		t.mu.Unlock()
		t.wakeWriter()
		return nil
	}
	id := binary.BigEndian.Uint64(f.Data[:])
	t.mu.Lock()
	if pong := t.pings[id]; pong != nil {
		delete(t.pings, id)
		close(pong)
	}
	final := id == drainPing && t.draining && !t.goneAway && t.err == nil
	if final {
		t.goneAway = true
		t.control.WriteGoAway(t.lastPeer, http2.ErrCodeNo, nil)
	}
	t.mu.Unlock()
	if final {
		t.wakeWriter()
		t.settle()
	}
	return nil
}

func (t *Tunnel) onGoAway(f *http2.GoAwayFrame) error {
	t.mu.Lock()
	t.peerDraining = true
	var untaken []*Stream
	if t.handler == nil {
		for id, s := range t.streams {
			if id > f.LastStreamID {
				untaken = append(untaken, s)
				t.remove(s)
			}
		}
	}
	t.mu.Unlock()
	for _, s := range untaken {
		s.end(&ResetError{Code: http2.ErrCodeRefusedStream, Remote: true}, false)
	}
	if f.ErrCode != http2.ErrCodeNo {
		return &LostError{Code: f.ErrCode, Remote: true, Err: fmt.Errorf("GOAWAY %q", clip(f.DebugData()))}
	}
	t.settle()
	return nil
}

// clip bounds what of a peer's text reaches our errors.
func clip(b []byte) []byte { return b[:min(len(b), 200)] }

func (t *Tunnel) onHeaders(f *http2.HeadersFrame) error {
	id, end := f.StreamID, f.StreamEnded()
	b, err := t.readBlock(f)
	if err != nil {
		return err
	}
	if t.handler != nil && id%2 == 1 && id > t.lastPeer { // lastPeer changes here only
		return t.onRequest(id, end, b)
	}
	s, err := t.known(id, http2.FrameHeaders)
	if s == nil || err != nil {
		return err
	}
	t.mu.Lock()
	answered := s.answered || t.handler != nil
	t.mu.Unlock()
	if !answered {
		return t.onAnswer(s, end, b)
	}
	if !end || b.malformed != "" { // trailers that do not trail
		return t.badStream(id, http2.ErrCodeProtocol)
	}
	s.peerEnded()
	return nil
}

// onRequest opens a stream that the peer asks for.
func (t *Tunnel) onRequest(id uint32, end bool, b *block) error {
	status, malformed := b.connect()
	t.mu.Lock()
	t.lastPeer = id
	if t.goneAway || t.err != nil {
		t.mu.Unlock()
		return nil // the peer learns from the GOAWAY that it is untaken
	}
	code := http2.ErrCodeNo
	switch {
	case malformed != "":
		code = http2.ErrCodeProtocol
	case len(t.streams) >= t.cfg.MaxStreams || t.handlers >= 2*t.cfg.MaxStreams:
		code = http2.ErrCodeRefusedStream
	}
	if code != http2.ErrCodeNo {
		t.refused++
		t.control.WriteRSTStream(id, code)
		t.mu.Unlock()
		t.wakeWriter()
		return t.resets.spend(http2.FrameHeaders)
	}
	s := newStream(t, id)
	t.add(s)
	if status == 0 {
		t.handlers++
	}
	t.mu.Unlock()
	if end {
		s.peerEnded()
	}
	in := &Incoming{Authority: b.authority, Header: b.header, s: s}
	if status != 0 {
		_ = in.Refuse(status, nil) // fails only where the tunnel has
		return t.budget.spend(http2.FrameHeaders)
	}
	go in.run()
	return nil
}

// onAnswer is the response to a stream that this side opened.
func (t *Tunnel) onAnswer(s *Stream, end bool, b *block) error {
	status, malformed := b.answer()
	if malformed != "" {
		return t.badStream(s.id, http2.ErrCodeProtocol)
	}
	if status < 200 {
		if end {
			return t.badStream(s.id, http2.ErrCodeProtocol)
		}
		return t.budget.spend(http2.FrameHeaders) // an interim answer
	}
	if status != 200 {
		t.mu.Lock()
		t.refused++
		t.mu.Unlock()
		s.abandon(&Refusal{Status: status, Header: b.header}, http2.ErrCodeCancel)
		return nil
	}
	t.mu.Lock()
	if s.refusal != nil { // given up in this very moment
		t.mu.Unlock()
		return nil
	}
	s.answered = true
	s.response = Response{Header: b.header}
	close(s.answer)
	t.mu.Unlock()
	if end {
		s.peerEnded()
	}
	return nil
}
