package tunnel

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// certificate is a fresh self-signed one for localhost.
func certificate(tb testing.TB) tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func tlsConfigs(tb testing.TB) (server, client *tls.Config) {
	cert := certificate(tb)
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		tb.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	server = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{ALPN}, SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true}
	client = &tls.Config{RootCAs: pool, ServerName: "localhost", MinVersion: tls.VersionTLS13, NextProtos: []string{ALPN}, DynamicRecordSizingDisabled: true}
	return server, client
}

// tcpPair is a connected pair of sockets on loopback.
func tcpPair(tb testing.TB) (dialled, accepted *net.TCPConn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); a.Close() })
	return c.(*net.TCPConn), a.(*net.TCPConn)
}

// connPair is a connected pair, with TLS above a Wire if asked for.
func connPair(tb testing.TB, secure bool) (client, server net.Conn) {
	tb.Helper()
	c, s := tcpPair(tb)
	if !secure {
		return c, s
	}
	sc, cc := tlsConfigs(tb)
	st, ct := tls.Server(NewWire(s), sc), tls.Client(NewWire(c), cc)
	shaken := make(chan error, 1)
	go func() { shaken <- st.Handshake() }()
	if err := ct.Handshake(); err != nil {
		tb.Fatal(err)
	}
	if err := <-shaken; err != nil {
		tb.Fatal(err)
	}
	return ct, st
}

// tunnels is a connected pair of tunnels, closed with the test.
func tunnels(tb testing.TB, secure bool, cc, sc Config, h Handler) (client, server *Tunnel) {
	tb.Helper()
	c, s := connPair(tb, secure)
	server = Serve(s, sc, h)
	client = Client(c, cc)
	tb.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func open(tb testing.TB, t *Tunnel, authority string, h ...Field) *Stream {
	tb.Helper()
	s, _, err := t.Open(context.Background(), Request{Authority: authority, Header: h})
	if err != nil {
		tb.Fatalf("open %s: %v", authority, err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

// echo sends everything back and ends when the peer does.
func echo(in *Incoming) {
	s, err := in.Accept(nil)
	if err != nil {
		return
	}
	if _, err := s.ReadFrom(s); err == nil {
		s.CloseWrite()
	}
}

func both(t *testing.T, f func(t *testing.T, secure bool)) {
	for _, secure := range []bool{false, true} {
		name := "tcp"
		if secure {
			name = "tls"
		}
		t.Run(name, func(t *testing.T) { f(t, secure) })
	}
}

func within(tb testing.TB, what string, c <-chan struct{}) {
	tb.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		tb.Fatalf("%s did not happen", what)
	}
}

func TestRequestAndAnswerCarryAuthorityAndHeaders(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		client, _ := tunnels(t, secure, Config{}, Config{}, func(in *Incoming) {
			if in.Authority != "in/shop/payments/80" || in.Header.Get("weft-caller") != "spiffe://td/x" {
				in.Refuse(400, nil)
				return
			}
			s, err := in.Accept(Header{{"weft-endpoint", "pod-7"}})
			if err == nil {
				s.CloseWrite()
				io.Copy(io.Discard, s)
			}
		})
		s, resp, err := client.Open(context.Background(), Request{Authority: "in/shop/payments/80", Header: Header{{"weft-caller", "spiffe://td/x"}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.Header.Get("weft-endpoint"); got != "pod-7" {
			t.Errorf("answer's header: %q", got)
		}
		s.CloseWrite()
		if _, err := io.ReadAll(s); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusalsAreTyped(t *testing.T) {
	client, _ := tunnels(t, false, Config{}, Config{}, func(in *Incoming) {
		switch in.Authority {
		case "deny":
			in.Refuse(403, Header{{"weft-reason", "caller"}})
		case "silent": // returns without an answer
		}
	})
	for authority, status := range map[string]int{"deny": 403, "silent": 500} {
		_, _, err := client.Open(context.Background(), Request{Authority: authority})
		var refusal *Refusal
		if !errors.As(err, &refusal) || refusal.Status != status {
			t.Errorf("%s: got %v, want status %d", authority, err, status)
		}
		if authority == "deny" && refusal.Header.Get("weft-reason") != "caller" {
			t.Errorf("refusal's header: %v", refusal.Header)
		}
	}
	for _, bad := range []Request{{Authority: ""}, {Authority: "a\nb"}, {Authority: "a", Header: Header{{"Upper", "x"}}}, {Authority: "a", Header: Header{{"x", "a\r\nb"}}}} {
		var oe *OpenError
		if _, _, err := client.Open(context.Background(), bad); !errors.As(err, &oe) || !oe.Safe {
			t.Errorf("%+v: got %v", bad, err)
		}
	}
	if st := client.Stats(); st.Active != 0 || st.Refused != 2 {
		t.Errorf("stats %+v", st)
	}
}

func TestHalfCloseIsKeptInBothDirections(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		got := make(chan string, 1)
		client, server := tunnels(t, secure, Config{}, Config{}, func(in *Incoming) {
			s, _ := in.Accept(nil)
			switch in.Authority {
			case "client first":
				b, _ := io.ReadAll(s)
				fmt.Fprintf(s, "%d bytes", len(b))
				s.CloseWrite()
			case "server first":
				io.WriteString(s, "220 ready")
				s.CloseWrite()
				b, _ := io.ReadAll(s)
				got <- string(b)
			}
		})
		s := open(t, client, "client first")
		s.Write(make([]byte, 300000))
		s.CloseWrite()
		if b, err := io.ReadAll(s); err != nil || string(b) != "300000 bytes" {
			t.Errorf("client first: %q, %v", b, err)
		}
		s = open(t, client, "server first")
		if b, err := io.ReadAll(s); err != nil || string(b) != "220 ready" {
			t.Errorf("server first: %q, %v", b, err)
		}
		io.WriteString(s, "QUIT")
		s.CloseWrite()
		if b := <-got; b != "QUIT" {
			t.Errorf("after the server's end: %q", b)
		}
		eventually(t, "streams forgotten", func() bool { return client.Stats().Active == 0 && server.Stats().Active == 0 })
	})
}

func eventually(tb testing.TB, what string, f func() bool) {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("%s: never", what)
		}
	}
}

// TestBytesArriveAsSent moves random sizes through every way of reading and
// writing, on streams side by side.
func TestBytesArriveAsSent(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		client, _ := tunnels(t, secure, Config{}, Config{StreamWindow: 100_000}, echo)
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() {
				rng := mrand.New(mrand.NewPCG(uint64(i), 7))
				s := open(t, client, "x")
				sent, got := sha256.New(), sha256.New()
				total := 200_000 + rng.IntN(1<<20)
				go func() {
					buf := make([]byte, 150_000)
					for left := total; left > 0; {
						n := min(left, 1+rng.IntN([]int{20, 3000, 150_000}[rng.IntN(3)]))
						for j := range buf[:n] {
							buf[j] = byte(rng.Uint32())
						}
						sent.Write(buf[:n])
						if _, err := s.Write(buf[:n]); err != nil {
							t.Errorf("write: %v", err)
						}
						left -= n
					}
					s.CloseWrite()
				}()
				var n int64
				var err error
				if i%2 == 0 {
					n, err = s.WriteTo(got)
				} else {
					n, err = io.Copy(got, struct{ io.Reader }{s})
				}
				if err != nil || n != int64(total) || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
					t.Errorf("stream %d: %d of %d bytes, %v", i, n, total, err)
				}
				if s.BytesIn() != uint64(total) || s.BytesOut() != uint64(total) {
					t.Errorf("counted %d in, %d out, want %d", s.BytesIn(), s.BytesOut(), total)
				}
			})
		}
		wg.Wait()
	})
}

// TestSocketsAreJoinedWhole takes the path of a gateway: a socket, a stream, a
// socket.
func TestSocketsAreJoinedWhole(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		backend, far := tcpPair(t)
		client, _ := tunnels(t, secure, Config{}, Config{}, func(in *Incoming) {
			s, _ := in.Accept(nil)
			var back sync.WaitGroup
			back.Go(func() { s.ReadFrom(far); s.CloseWrite() })
			s.WriteTo(far)
			far.CloseWrite()
			back.Wait()
		})
		near, app := tcpPair(t)
		s := open(t, client, "x")
		go func() { s.ReadFrom(near); s.CloseWrite() }()
		go func() { s.WriteTo(near); near.CloseWrite() }()

		data := make([]byte, 5<<20)
		mrand.NewChaCha8([32]byte{1}).Read(data)
		go func() { app.Write(data); app.CloseWrite() }()
		got, err := io.ReadAll(backend)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("there: %d bytes, %v", len(got), err)
		}
		go func() { backend.Write(data); backend.CloseWrite() }()
		got, err = io.ReadAll(app)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("back: %d bytes, %v", len(got), err)
		}
	})
}

func TestEarlyDataArrivesAfterTheAnswer(t *testing.T) {
	client, _ := tunnels(t, false, Config{}, Config{}, echo)
	s, err := client.Start(Request{Authority: "x"})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(s, "early")
	s.CloseWrite()
	if _, err := s.Response(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(s); string(b) != "early" {
		t.Errorf("got %q", b)
	}
}

func TestResetReachesThePeer(t *testing.T) {
	accepted, end := make(chan *Stream, 1), make(chan struct{})
	client, _ := tunnels(t, false, Config{}, Config{}, func(in *Incoming) {
		s, _ := in.Accept(nil)
		accepted <- s
		<-end
	})
	defer close(end)
	a := open(t, client, "x")
	far := <-accepted
	io.WriteString(far, "last")
	far.Reset(http2.ErrCodeConnect)
	within(t, "end of the context", a.Context().Done())
	buf := make([]byte, 10)
	if n, err := a.Read(buf); string(buf[:n]) != "last" || err != nil {
		t.Errorf("what came before the reset: %q, %v", buf[:n], err)
	}
	var re *ResetError
	if _, err := a.Read(buf); !errors.As(err, &re) || re.Code != http2.ErrCodeConnect || !re.Remote {
		t.Errorf("read: %v", err)
	}
	if _, err := a.Write(buf); !errors.As(err, &re) {
		t.Errorf("write: %v", err)
	}
}

func TestCancelledOpenIsTakenBack(t *testing.T) {
	taken := make(chan struct{})
	client, server := tunnels(t, false, Config{}, Config{}, func(in *Incoming) {
		<-in.Context().Done()
		close(taken)
		if _, err := in.Accept(nil); err == nil {
			t.Error("a stream that was taken back was accepted")
		}
	})
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("enough")
	go func() {
		for server.Stats().Active == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel(why)
	}()
	_, _, err := client.Open(ctx, Request{Authority: "x"})
	var oe *OpenError
	if !errors.As(err, &oe) || !oe.Safe || !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	within(t, "cancellation at the far side", taken)
}

func TestDrainKeepsOpenStreamsAndRefusesNewOnes(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			client, server := tunnels(t, true, Config{}, Config{}, echo)
			old := open(t, client, "x")
			if side == "client" {
				client.Drain()
			} else {
				server.Drain()
			}
			eventually(t, "no new stream", client.Draining)
			if _, _, err := client.Open(t.Context(), Request{Authority: "y"}); !errors.Is(err, ErrDraining) {
				t.Fatalf("a stream after the drain: %v", err)
			}
			io.WriteString(old, "still here")
			old.CloseWrite()
			if b, err := io.ReadAll(old); err != nil || string(b) != "still here" {
				t.Fatalf("the old stream: %q, %v", b, err)
			}
			within(t, "the client's end", client.Done())
			within(t, "the server's end", server.Done())
			if !errors.Is(client.Err(), ErrClosed) || !errors.Is(server.Err(), ErrClosed) {
				t.Errorf("client: %v, server: %v", client.Err(), server.Err())
			}
		})
	}
}

// TestDrainLosesNoStream opens streams as fast as it can while the server
// drains: each is either served or said to be safe to take elsewhere.
func TestDrainLosesNoStream(t *testing.T) {
	for range 20 {
		client, server := tunnels(t, false, Config{}, Config{}, func(in *Incoming) {
			s, err := in.Accept(nil)
			if err != nil {
				return
			}
			s.CloseWrite()
			io.Copy(io.Discard, s)
		})
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					s, _, err := client.Open(context.Background(), Request{Authority: "x"})
					if err != nil {
						var oe *OpenError
						if !errors.As(err, &oe) || !oe.Safe {
							t.Errorf("open: %v", err)
						}
						return
					}
					s.CloseWrite()
					if _, err := io.ReadAll(s); err != nil {
						t.Errorf("a served stream: %v", err)
					}
				}
			})
		}
		eventually(t, "streams", func() bool { return client.Stats().Opened > 20 })
		server.Drain()
		wg.Wait()
		within(t, "end", server.Done())
	}
}

func TestThousandStreamsAtOnce(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		client, _ := tunnels(t, secure, Config{}, Config{}, echo)
		within(t, "settings", client.Settled())
		var opened, wg sync.WaitGroup
		opened.Add(1000)
		for i := range 1000 {
			wg.Go(func() {
				s := open(t, client, "x")
				opened.Done()
				opened.Wait()
				msg := fmt.Sprintf("stream %d", i)
				io.WriteString(s, msg)
				s.CloseWrite()
				if b, err := io.ReadAll(s); err != nil || string(b) != msg {
					t.Errorf("%s: %q, %v", msg, b, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestMaxStreams(t *testing.T) {
	client, _ := tunnels(t, false, Config{}, Config{MaxStreams: 3}, echo)
	within(t, "settings", client.Settled())
	var streams []*Stream
	for range 3 {
		streams = append(streams, open(t, client, "x"))
	}
	if _, _, err := client.Open(t.Context(), Request{Authority: "x"}); !errors.Is(err, ErrFull) || client.Room() != 0 {
		t.Errorf("a fourth stream: %v, room %d", err, client.Room())
	}
	streams[0].Close()
	if client.Room() != 1 {
		t.Errorf("room %d after one closed", client.Room())
	}
	open(t, client, "x")
}

// TestStalledStreamsDoNotStallTheTunnel leaves eight streams full and unread in
// both directions, with windows of which a connection that returned its credit
// late would hold two.
func TestStalledStreamsDoNotStallTheTunnel(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		stop := make(chan struct{})
		cfg := Config{StreamWindow: 256 << 10, ConnWindow: 512 << 10}
		client, _ := tunnels(t, secure, cfg, cfg, func(in *Incoming) {
			if in.Authority != "stall" {
				echo(in)
				return
			}
			s, _ := in.Accept(nil)
			go s.Write(make([]byte, 10<<20))
			<-stop
		})
		defer close(stop)
		var stalled []*Stream
		for range 8 {
			s := open(t, client, "stall")
			stalled = append(stalled, s)
			go s.Write(make([]byte, 10<<20))
		}
		for _, s := range stalled {
			eventually(t, "a full window", func() bool {
				s.rmu.Lock()
				defer s.rmu.Unlock()
				return s.recvWin == 0 && s.BytesOut() == 256<<10
			})
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				s := open(t, client, "busy")
				go func() { s.Write(make([]byte, 8<<20)); s.CloseWrite() }()
				if n, err := io.Copy(io.Discard, s); n != 8<<20 || err != nil {
					t.Errorf("a busy stream: %d bytes, %v", n, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestDeadlines(t *testing.T) {
	client, _ := tunnels(t, false, Config{}, Config{StreamWindow: 1000}, func(in *Incoming) {
		in.Accept(nil)
		<-in.Context().Done()
	})
	s := open(t, client, "x")
	s.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	s.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	eventually(t, "the small window", func() bool {
		client.mu.Lock()
		defer client.mu.Unlock()
		return s.sendWin == 1000
	})
	if n, err := s.Write(make([]byte, 5000)); n != 1000 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %d, %v", n, err)
	}
	s.SetDeadline(time.Time{})
	go func() {
		time.Sleep(10 * time.Millisecond)
		s.SetReadDeadline(time.Now())
	}()
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read with a deadline that came later: %v", err)
	}
}

func TestPingMeasuresAndFailsWithTheTunnel(t *testing.T) {
	client, server := tunnels(t, true, Config{}, Config{}, echo)
	if rtt, err := client.Ping(t.Context()); err != nil || rtt <= 0 || client.Stats().RTT != rtt {
		t.Errorf("client: %v, %v", rtt, err)
	}
	if _, err := server.Ping(t.Context()); err != nil {
		t.Errorf("server: %v", err)
	}
	server.Close()
	within(t, "end", client.Done())
	if _, err := client.Ping(t.Context()); err == nil {
		t.Errorf("after the end: %v", err)
	}
}

func TestLostConnectionEndsEveryStream(t *testing.T) {
	c, s := tcpPair(t)
	server := Serve(s, Config{}, echo)
	client := Client(c, Config{})
	defer client.Close()
	defer server.Close()
	st := open(t, client, "x")
	s.SetLinger(0)
	s.Close()
	if _, err := st.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read: %v, a crash must not look like the end of the file", err)
	}
	within(t, "end", client.Done())
	if _, ok := errors.AsType[*LostError](client.Err()); !ok {
		t.Errorf("err: %v", client.Err())
	}
	var oe *OpenError
	if _, _, err := client.Open(t.Context(), Request{Authority: "x"}); !errors.As(err, &oe) || !oe.Safe {
		t.Errorf("open: %v", err)
	}
}

func TestDetectDeadPeer(t *testing.T) {
	c, _ := tcpPair(t)
	if err := DetectDeadPeer(c, 5*time.Second); err != nil {
		t.Fatal(err)
	}
}

// TestAnswersRaceWithPatience: an answer may come at the very moment at which
// the caller gives up, or the tunnel ends.
func TestAnswersRaceWithPatience(t *testing.T) {
	client, _ := tunnels(t, false, Config{}, Config{}, func(in *Incoming) {
		if s, err := in.Accept(nil); err == nil {
			s.CloseWrite()
		}
	})
	within(t, "settings", client.Settled())
	var answered, late sync.Map
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 500 {
				s, _, err := client.Open(context.Background(), Request{Authority: "x", Within: time.Duration(20+(i*61+j*7)%200) * time.Microsecond})
				switch {
				case err == nil:
					answered.Store(i*1000+j, true)
					s.Close()
				case errors.Is(err, ErrNoAnswer):
					late.Store(i*1000+j, true)
				default:
					t.Errorf("open: %v", err)
				}
			}
		})
	}
	wg.Wait()
	count := func(m *sync.Map) (n int) {
		m.Range(func(any, any) bool { n++; return true })
		return n
	}
	if a, l := count(&answered), count(&late); a+l != 4000 {
		t.Errorf("%d answered, %d late", a, l)
	}
	if n := client.Stats().Active; n != 0 {
		t.Errorf("%d streams left", n)
	}
}
