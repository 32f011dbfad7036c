package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// raw is a peer that says what it likes.
type raw struct {
	net.Conn
	*http2.Framer
	tb  testing.TB
	buf bytes.Buffer
	enc *hpack.Encoder
}

func newRaw(tb testing.TB, c net.Conn) *raw {
	r := &raw{Conn: c, Framer: http2.NewFramer(c, c), tb: tb}
	r.AllowIllegalWrites = true
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	r.enc = hpack.NewEncoder(&r.buf)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return r
}

func (r *raw) block(fields ...string) []byte {
	r.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return r.buf.Bytes()
}

func (r *raw) headers(id uint32, fields ...string) {
	r.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(fields...), EndHeaders: true})
}

func (r *raw) connect(id uint32) { r.headers(id, ":method", "CONNECT", ":authority", "x") }

// until reads frames until f likes one.
func (r *raw) until(what string, f func(http2.Frame) bool) {
	r.tb.Helper()
	for {
		fr, err := r.ReadFrame()
		if err != nil {
			r.tb.Fatalf("waiting for %s: %v", what, err)
		}
		if f(fr) {
			return
		}
	}
}

func (r *raw) goAway(want http2.ErrCode) {
	r.tb.Helper()
	r.until("GOAWAY", func(f http2.Frame) bool {
		g, ok := f.(*http2.GoAwayFrame)
		if ok && g.ErrCode != want {
			r.tb.Errorf("GOAWAY with %v %q, want %v", g.ErrCode, g.DebugData(), want)
		}
		return ok
	})
}

func (r *raw) rst(id uint32, want http2.ErrCode) {
	r.tb.Helper()
	r.until("RST_STREAM", func(f http2.Frame) bool {
		g, ok := f.(*http2.RSTStreamFrame)
		if !ok || g.StreamID != id {
			return false // the end of an answered one
		}
		if g.ErrCode != want {
			r.tb.Errorf("RST_STREAM %d with %v, want %v", id, g.ErrCode, want)
		}
		return true
	})
}

func (r *raw) status(id uint32, want string) {
	r.tb.Helper()
	r.until("an answer", func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		if ok && (h.StreamID != id || h.PseudoValue("status") != want) {
			r.tb.Errorf("stream %d: status %s, want stream %d: %s", h.StreamID, h.PseudoValue("status"), id, want)
		}
		return ok
	})
}

// hold accepts and keeps a stream without reading it.
func hold(in *Incoming) {
	in.Accept(nil)
	<-in.Context().Done()
}

func hostileClient(tb testing.TB, cfg Config, h Handler, polite bool) (*raw, *Tunnel) {
	c, s := tcpPair(tb)
	t := Serve(s, cfg, h)
	tb.Cleanup(func() { t.Close() })
	r := newRaw(tb, c)
	if polite {
		io.WriteString(c, http2.ClientPreface)
		r.WriteSettings()
	}
	return r, t
}

func TestServerAnswersBrokenProtocol(t *testing.T) {
	const (
		protocol = http2.ErrCodeProtocol
		flow     = http2.ErrCodeFlowControl
		calm     = http2.ErrCodeEnhanceYourCalm
	)
	cases := []struct {
		name string
		do   func(r *raw)
		want http2.ErrCode
	}{
		{"HEADERS on stream 0", func(r *raw) { r.connect(0) }, protocol},
		{"even stream", func(r *raw) { r.connect(2) }, protocol},
		{"DATA on stream 0", func(r *raw) { r.WriteRawFrame(http2.FrameData, 0, 0, []byte("x")) }, protocol},
		{"DATA on an idle stream", func(r *raw) { r.WriteData(9, false, []byte("x")) }, protocol},
		{"RST_STREAM on an idle stream", func(r *raw) { r.WriteRSTStream(9, 0) }, protocol},
		{"WINDOW_UPDATE on an idle stream", func(r *raw) { r.WriteWindowUpdate(9, 1) }, protocol},
		{"WINDOW_UPDATE of 0 on the connection", func(r *raw) { r.WriteWindowUpdate(0, 0) }, protocol},
		{"PING of the wrong size", func(r *raw) { r.WriteRawFrame(http2.FramePing, 0, 0, []byte("abc")) }, http2.ErrCodeFrameSize},
		{"PING on a stream", func(r *raw) { r.WriteRawFrame(http2.FramePing, 0, 1, make([]byte, 8)) }, protocol},
		{"SETTINGS of the wrong size", func(r *raw) { r.WriteRawFrame(http2.FrameSettings, 0, 0, []byte("abc")) }, http2.ErrCodeFrameSize},
		{"SETTINGS with a frame size out of range", func(r *raw) { r.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1}) }, protocol},
		{"SETTINGS with a window out of range", func(r *raw) {
			r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, flow},
		{"PUSH_PROMISE", func(r *raw) {
			r.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: r.block(":method", "GET"), EndHeaders: true})
		}, protocol},
		{"oversize frame", func(r *raw) { r.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, maxFrame+1)) }, http2.ErrCodeFrameSize},
		{"padding beyond the payload", func(r *raw) {
			r.connect(1)
			r.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{200, 1, 2})
		}, protocol},
		{"connection's window overflown", func(r *raw) { r.WriteWindowUpdate(0, maxWindow) }, flow},
		{"stray CONTINUATION", func(r *raw) { r.WriteContinuation(1, true, nil) }, protocol},
		{"interrupted header block", func(r *raw) {
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method", "CONNECT")})
			r.WritePing(false, [8]byte{})
		}, protocol},
		{"garbage for HPACK", func(r *raw) {
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: bytes.Repeat([]byte{0xff}, 40), EndHeaders: true})
		}, http2.ErrCodeCompression},
		{"CONTINUATION flood", func(r *raw) {
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(":method", "CONNECT")})
			for range 100 {
				r.WriteContinuation(1, false, nil)
			}
		}, calm},
		{"huge header block", func(r *raw) {
			r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: make([]byte, 60000), EndHeaders: true})
		}, calm},
		{"PING flood", func(r *raw) {
			for range 5000 {
				r.WritePing(false, [8]byte{})
			}
		}, calm},
		{"SETTINGS flood", func(r *raw) {
			for range 5000 {
				r.WriteSettings()
			}
		}, calm},
		{"empty DATA flood", func(r *raw) {
			r.connect(1)
			for range 5000 {
				r.WriteData(1, false, nil)
			}
		}, calm},
		{"rapid reset", func(r *raw) {
			for i := range uint32(5000) {
				r.connect(2*i + 1)
				r.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
			}
		}, calm},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{AbuseBurst: 100, AbuseRate: 1}
			h := hold
			if c.name == "rapid reset" { // the backends are slow
				h = func(in *Incoming) { <-in.Context().Done() }
			}
			r, server := hostileClient(t, cfg, h, true)
			go c.do(r)
			r.goAway(c.want)
			within(t, "the end", server.Done())
			var lost *LostError
			if !errors.As(server.Err(), &lost) || lost.Code != c.want || lost.Remote {
				t.Errorf("err: %v", server.Err())
			}
		})
	}
}

func TestServerAnswersBrokenStreams(t *testing.T) {
	r, server := hostileClient(t, Config{StreamWindow: 1000, MaxHeaderBytes: 1000, MaxStreams: 3}, hold, true)
	r.headers(1, ":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/")
	r.status(1, "405")
	r.headers(3, ":method", "CONNECT", ":authority", "x", "big", strings.Repeat("x", 1200))
	r.status(3, "431")
	r.headers(5, ":method", "CONNECT", ":authority", "x", ":protocol", "websocket", ":scheme", "https", ":path", "/")
	r.status(5, "501")
	for i, fields := range [][]string{
		{":method", "CONNECT"},
		{":authority", "x"},
		{":method", "CONNECT", ":authority", "x", ":path", "/"},
		{":method", "CONNECT", ":authority", "x", ":authority", "y"},
		{":method", "CONNECT", "a", "b", ":authority", "x"},
		{":method", "CONNECT", ":authority", "x", "Upper", "b"},
		{":method", "CONNECT", ":authority", "x", "a", "b\r\nc"},
		{":method", "CONNECT", ":authority", "x", ":status", "200"},
		{":method", "CONNECT", ":authority", "x", ":new", "x"},
	} {
		id := uint32(7 + 2*i)
		r.headers(id, fields...)
		r.rst(id, http2.ErrCodeProtocol)
	}

	r.connect(101)
	r.status(101, "200")
	r.WriteData(101, false, make([]byte, 1001))
	r.rst(101, http2.ErrCodeFlowControl)
	r.WriteData(101, false, []byte("what was under way is passed over"))

	r.connect(103)
	r.status(103, "200")
	r.WriteData(103, true, nil)
	r.WriteData(103, false, []byte("after the end"))
	r.rst(103, http2.ErrCodeStreamClosed)

	r.connect(105)
	r.status(105, "200")
	r.WriteWindowUpdate(105, maxWindow)
	r.rst(105, http2.ErrCodeFlowControl)

	r.connect(107)
	r.status(107, "200")
	r.headers(107, "not", "the-end")
	r.rst(107, http2.ErrCodeProtocol)

	for id := uint32(109); id < 115; id += 2 {
		r.connect(id)
		r.status(id, "200")
	}
	r.connect(115)
	r.rst(115, http2.ErrCodeRefusedStream)

	r.WriteRawFrame(0xfa, 0, 0, []byte("a type of the future"))
	r.WritePriority(109, http2.PriorityParam{StreamDep: 111})
	r.WritePing(false, [8]byte{1})
	r.until("PING answer", func(f http2.Frame) bool { _, ok := f.(*http2.PingFrame); return ok })
	if err := server.Err(); err != nil {
		t.Errorf("the tunnel fell: %v", err)
	}
}

func TestServerRefusesAnythingButThePreface(t *testing.T) {
	for name, bytes := range map[string]string{
		"http/1":        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"binary":        strings.Repeat("\x00\xff", 50),
		"half":          http2.ClientPreface[:10],
		"no SETTINGS":   http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678",
		"SETTINGS ack":  http2.ClientPreface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00",
		"nothing, ever": "",
	} {
		t.Run(name, func(t *testing.T) {
			r, server := hostileClient(t, Config{SettingsTimeout: 100 * time.Millisecond}, hold, false)
			io.WriteString(r.Conn, bytes)
			within(t, "the end", server.Done())
			var lost *LostError
			if !errors.As(server.Err(), &lost) || lost.Code == http2.ErrCodeNo {
				t.Errorf("err: %v", server.Err())
			}
		})
	}
}

// TestPeerThatReadsNothingIsBounded lets a peer cause answers without reading.
func TestPeerThatReadsNothingIsBounded(t *testing.T) {
	r, server := hostileClient(t, Config{AbuseBurst: 1 << 30, SettingsTimeout: time.Second}, hold, true)
	go func() {
		var buf bytes.Buffer
		fr := http2.NewFramer(&buf, nil)
		for range 1000 {
			fr.WritePing(false, [8]byte{})
		}
		for {
			if _, err := r.Conn.Write(buf.Bytes()); err != nil {
				return
			}
		}
	}()
	within(t, "the end", server.Done())
	var lost *LostError
	if !errors.As(server.Err(), &lost) || lost.Code != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("err: %v", server.Err())
	}
	r.Conn.Close()
}

func hostileServer(tb testing.TB) (*raw, *Tunnel) {
	c, s := tcpPair(tb)
	t := Client(c, Config{})
	tb.Cleanup(func() { t.Close() })
	r := newRaw(tb, s)
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(s, preface); err != nil {
		tb.Fatal(err)
	}
	return r, t
}

func TestClientAnswersBrokenServers(t *testing.T) {
	for name, do := range map[string]func(r *raw){
		"http/1":        func(r *raw) { io.WriteString(r.Conn, "HTTP/1.1 400 Bad Request\r\n\r\n") },
		"no SETTINGS":   func(r *raw) { r.WritePing(false, [8]byte{}) },
		"stream opened": func(r *raw) { r.WriteSettings(); r.headers(2, ":status", "200") },
		"unasked":       func(r *raw) { r.WriteSettings(); r.headers(99, ":status", "200") },
		"push": func(r *raw) {
			r.WriteSettings()
			r.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: r.block(":method", "GET"), EndHeaders: true})
		},
		"GOAWAY with an error": func(r *raw) { r.WriteSettings(); r.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, nil) },
		"gone":                 func(r *raw) { r.Conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			r, client := hostileServer(t)
			opened := make(chan error, 1)
			go func() {
				_, _, err := client.Open(t.Context(), Request{Authority: "x"})
				opened <- err
			}()
			r.until("HEADERS", func(f http2.Frame) bool { _, ok := f.(*http2.MetaHeadersFrame); return ok })
			do(r)
			var oe *OpenError
			if err := <-opened; !errors.As(err, &oe) || !oe.Safe {
				t.Errorf("open: %v", err)
			}
			within(t, "the end", client.Done())
		})
	}
}

func TestClientTypesEveryAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(r *raw)
		status int  // of the refusal, or 0
		safe   bool // of the open error
	}{
		"503 with a body": {do: func(r *raw) {
			r.headers(1, ":status", "503")
			r.WriteData(1, true, []byte("no healthy upstream"))
		}, status: 503},
		"204 is not 200":     {do: func(r *raw) { r.headers(1, ":status", "204") }, status: 204},
		"interim, then 403":  {do: func(r *raw) { r.headers(1, ":status", "100"); r.headers(1, ":status", "403") }, status: 403},
		"refused stream":     {do: func(r *raw) { r.WriteRSTStream(1, http2.ErrCodeRefusedStream) }, safe: true},
		"reset":              {do: func(r *raw) { r.WriteRSTStream(1, http2.ErrCodeCancel) }},
		"GOAWAY before it":   {do: func(r *raw) { r.WriteGoAway(0, 0, nil) }, safe: true},
		"DATA ahead":         {do: func(r *raw) { r.WriteData(1, false, []byte("x")) }},
		"no status":          {do: func(r *raw) { r.headers(1, "a", "b") }},
		"a status of words":  {do: func(r *raw) { r.headers(1, ":status", "fine") }},
		"a request's fields": {do: func(r *raw) { r.headers(1, ":status", "200", ":path", "/") }},
	} {
		t.Run(name, func(t *testing.T) {
			r, client := hostileServer(t)
			r.WriteSettings()
			s, err := client.Start(Request{Authority: "x"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Write([]byte("early")); err != nil {
				t.Fatal(err)
			}
			r.until("DATA", func(f http2.Frame) bool { _, ok := f.(*http2.DataFrame); return ok })
			c.do(r)
			_, err = s.Response(t.Context())
			var refusal *Refusal
			var oe *OpenError
			if c.status != 0 {
				if !errors.As(err, &refusal) || refusal.Status != c.status {
					t.Errorf("got %v, want a refusal with %d", err, c.status)
				}
			} else if !errors.As(err, &oe) || oe.Safe != c.safe {
				t.Errorf("got %#v, want safe %v", err, c.safe)
			}
			if n := client.Stats().Active; n != 0 {
				t.Errorf("%d streams left", n)
			}
		})
	}
}

// TestPeerLimitsAreObeyed: what the peer has not allowed is
// not sent, whatever this side could.
func TestPeerLimitsAreObeyed(t *testing.T) {
	r, client := hostileServer(t)
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 40000}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	within(t, "settings", client.Settled())
	s, err := client.Start(Request{Authority: "x"})
	if err != nil {
		t.Fatal(err)
	}
	go s.Write(make([]byte, 100000))
	got := 0
	frames := func(want int) {
		t.Helper()
		for got < want {
			r.until("DATA", func(f http2.Frame) bool {
				d, ok := f.(*http2.DataFrame)
				if ok {
					if got += len(d.Data()); len(d.Data()) > defaultFrame || got > want {
						t.Fatalf("a frame of %d, %d in all, may send %d", len(d.Data()), got, want)
					}
				}
				return ok
			})
		}
	}
	frames(40000)
	r.WriteWindowUpdate(1, 60000) // now the connection's window of 65535 holds it
	frames(65535)
	r.WriteWindowUpdate(0, 1000)
	frames(66535)
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // 33465 left become negative
	r.WriteWindowUpdate(0, 100000)
	r.WritePing(false, [8]byte{7})
	r.until("PING answer", func(f http2.Frame) bool {
		if d, ok := f.(*http2.DataFrame); ok {
			t.Errorf("%d bytes beyond the window", len(d.Data()))
		}
		p, ok := f.(*http2.PingFrame)
		return ok && p.IsAck()
	})
	r.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100000})
	frames(100000)
}

// TestAnswerBeforeTheServerWantsNoMore: a server that has sent its whole answer
// and then resets the stream with NO_ERROR has answered.
func TestAnswerBeforeTheServerWantsNoMore(t *testing.T) {
	open := func(t *testing.T) *Stream {
		r, client := hostileServer(t)
		r.WriteSettings()
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			r.until("the request", func(f http2.Frame) bool { _, ok := f.(*http2.MetaHeadersFrame); return ok })
			r.headers(1, ":status", "200")
			r.WriteData(1, true, []byte("answer"))
			r.WriteRSTStream(1, http2.ErrCodeNo)
			r.WritePing(false, [8]byte{1})
			r.until("PING answer", func(f http2.Frame) bool { _, ok := f.(*http2.PingFrame); return ok })
		}()
		s, _, err := client.Open(t.Context(), Request{Authority: "x"})
		if err != nil {
			t.Fatal(err)
		}
		within(t, "the reset", asked)
		if err := s.Context().Err(); err != nil {
			t.Errorf("the stream is broken: %v", context.Cause(s.Context()))
		}
		return s
	}
	t.Run("read, then close", func(t *testing.T) {
		s := open(t)
		got, err := io.ReadAll(s)
		if string(got) != "answer" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
	})
	t.Run("a copy of nothing", func(t *testing.T) {
		s := open(t)
		if n, err := s.ReadFrom(strings.NewReader("")); n != 0 || err != nil {
			t.Errorf("ReadFrom: %d, %v", n, err)
		}
	})
	t.Run("write", func(t *testing.T) {
		s := open(t)
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			var reset *ResetError
			if _, err := s.Write([]byte("more")); !errors.As(err, &reset) || !reset.Remote {
				t.Errorf("Write: %v", err)
			}
		}()
		if got, err := io.ReadAll(s); string(got) != "answer" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		within(t, "the end of the write", wrote)
		within(t, "the end of the stream", s.Context().Done())
	})
	t.Run("write, then close", func(t *testing.T) {
		s := open(t)
		wrote := make(chan struct{})
		go func() {
			defer close(wrote)
			if _, err := s.Write([]byte("more")); err == nil {
				t.Error("Write to nobody succeeded")
			}
		}()
		s.Close()
		within(t, "the end of the write", wrote)
	})
}
