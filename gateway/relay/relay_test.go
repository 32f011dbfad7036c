package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weftmesh/weft/federation/clock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func tcpPair(tb testing.TB) (a, b *net.TCPConn) {
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
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// hidden keeps a socket from being spliced, as TLS would.
type hidden struct{ c *net.TCPConn }

func (h hidden) Read(p []byte) (int, error)         { return h.c.Read(p) }
func (h hidden) Write(p []byte) (int, error)        { return h.c.Write(p) }
func (h hidden) Close() error                       { return h.c.Close() }
func (h hidden) CloseWrite() error                  { return h.c.CloseWrite() }
func (h hidden) Abort()                             { h.c.SetLinger(0); h.c.Close() }
func (h hidden) LocalAddr() net.Addr                { return h.c.LocalAddr() }
func (h hidden) RemoteAddr() net.Addr               { return h.c.RemoteAddr() }
func (h hidden) SetDeadline(t time.Time) error      { return h.c.SetDeadline(t) }
func (h hidden) SetReadDeadline(t time.Time) error  { return h.c.SetReadDeadline(t) }
func (h hidden) SetWriteDeadline(t time.Time) error { return h.c.SetWriteDeadline(t) }

// joined is an application and a server with a relay between them.
type joined struct {
	app, server *net.TCPConn
	relay       *Relay
	result      chan Result
}

func start(ctx context.Context, tb testing.TB, spliced bool, o Options) *joined {
	tb.Helper()
	app, client := tcpPair(tb)
	backend, server := tcpPair(tb)
	r := New(clock.Real())
	j := &joined{app: app, server: server, relay: r, result: make(chan Result, 1)}
	go func() {
		if spliced {
			j.result <- r.Join(ctx, client, backend, o)
		} else {
			j.result <- r.Join(ctx, hidden{client}, hidden{backend}, o)
		}
		r.Close()
	}()
	return j
}

func (j *joined) end(tb testing.TB) Result {
	tb.Helper()
	select {
	case r := <-j.result:
		return r
	case <-time.After(20 * time.Second):
		tb.Fatal("the relay did not end")
		return Result{}
	}
}

func ways(t *testing.T, f func(t *testing.T, spliced bool)) {
	t.Run("tcp", func(t *testing.T) { f(t, true) })
	t.Run("copied", func(t *testing.T) { f(t, false) })
}

func TestBytesArriveAsSentBothWays(t *testing.T) {
	ways(t, func(t *testing.T, spliced bool) {
		j := start(t.Context(), t, spliced, Options{Prefix: []byte("hello, ")})
		there, back := make([]byte, 12<<20), make([]byte, 9<<20)
		rng := mrand.NewChaCha8([32]byte{3})
		rng.Read(there)
		rng.Read(back)
		send := func(c *net.TCPConn, p []byte) {
			for n := 1; len(p) > 0; n = n*7%500_003 + 1 { // small and large, bulk and talk
				n := min(n, len(p))
				if _, err := c.Write(p[:n]); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				p = p[n:]
			}
			c.CloseWrite()
		}
		go send(j.app, there)
		go send(j.server, back)
		var wg sync.WaitGroup
		wg.Go(func() {
			got, err := io.ReadAll(j.server)
			if err != nil || !bytes.Equal(got, append([]byte("hello, "), there...)) {
				t.Errorf("there: %d bytes, %v", len(got), err)
			}
		})
		wg.Go(func() {
			got, err := io.ReadAll(j.app)
			if err != nil || !bytes.Equal(got, back) {
				t.Errorf("back: %d bytes, %v", len(got), err)
			}
		})
		wg.Wait()
		r := j.end(t)
		if r.ToBackend != int64(len(there)+7) || r.ToClient != int64(len(back)) || r.Err != nil {
			t.Errorf("%+v", r)
		}
	})
}

func TestHalfCloseIsKept(t *testing.T) {
	ways(t, func(t *testing.T, spliced bool) {
		j := start(t.Context(), t, spliced, Options{})
		io.WriteString(j.app, "question")
		j.app.CloseWrite()
		if b, err := io.ReadAll(j.server); string(b) != "question" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		io.WriteString(j.server, "answer")
		j.server.CloseWrite()
		if b, err := io.ReadAll(j.app); string(b) != "answer" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		if r := j.end(t); r.Reason != ClientClosed || r.Err != nil {
			t.Errorf("%+v", r)
		}

		j = start(t.Context(), t, spliced, Options{})
		io.WriteString(j.server, "220 ready")
		j.server.CloseWrite()
		if b, err := io.ReadAll(j.app); string(b) != "220 ready" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		io.WriteString(j.app, "thanks")
		j.app.CloseWrite()
		if b, err := io.ReadAll(j.server); string(b) != "thanks" || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
		if r := j.end(t); r.Reason != BackendClosed || r.Err != nil {
			t.Errorf("%+v", r)
		}
	})
}

func reset(c *net.TCPConn) { c.SetLinger(0); c.Close() }

func TestResetIsPassedOn(t *testing.T) {
	ways(t, func(t *testing.T, spliced bool) {
		for name, c := range map[string]struct {
			do   func(j *joined) (other *net.TCPConn)
			want Reason
		}{
			"client":  {func(j *joined) *net.TCPConn { reset(j.app); return j.server }, ClientReset},
			"backend": {func(j *joined) *net.TCPConn { reset(j.server); return j.app }, BackendReset},
		} {
			t.Run(name, func(t *testing.T) {
				j := start(t.Context(), t, spliced, Options{})
				io.WriteString(j.app, "x")
				io.ReadFull(j.server, make([]byte, 1))
				other := c.do(j)
				if _, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the other side sees %v", err)
				}
				if r := j.end(t); r.Reason != c.want || r.Err == nil {
					t.Errorf("%+v, want %v", r, c.want)
				}
			})
		}
	})
}

// TestResetAfterHalfCloseIsSeen: the client ends its direction, then resets while
// the backend says nothing; nobody reads from the client any more.
func TestResetAfterHalfCloseIsSeen(t *testing.T) {
	j := start(t.Context(), t, true, Options{})
	io.WriteString(j.app, "x")
	j.app.CloseWrite()
	if b, err := io.ReadAll(j.server); string(b) != "x" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	reset(j.app)
	if r := j.end(t); r.Reason != ClientReset || r.Err == nil {
		t.Errorf("%+v", r)
	}
	if _, err := j.server.Write([]byte("late")); err == nil {
		_, err = j.server.Write([]byte("later"))
		if err == nil {
			t.Error("the backend still writes into a connection that was reset")
		}
	}
}

func TestContextEndsTheRelay(t *testing.T) {
	ways(t, func(t *testing.T, spliced bool) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("trust withdrawn")
		j := start(ctx, t, spliced, Options{})
		io.WriteString(j.app, "x")
		io.ReadFull(j.server, make([]byte, 1))
		cancel(why)
		if r := j.end(t); r.Reason != Cancelled || r.Err != why || r.ToBackend != 1 {
			t.Errorf("%+v", r)
		}
		short, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer stop()
		if r := start(short, t, spliced, Options{}).end(t); r.Reason != Deadline {
			t.Errorf("%+v", r)
		}
	})
}

func TestIdleEndsOnlyTheIdle(t *testing.T) {
	ways(t, func(t *testing.T, spliced bool) {
		j := start(t.Context(), t, spliced, Options{Idle: 150 * time.Millisecond})
		began := time.Now()
		for range 20 { // longer in all than the limit, each pause shorter
			io.WriteString(j.app, "x")
			if _, err := io.ReadFull(j.server, make([]byte, 1)); err != nil {
				t.Fatalf("after %v: %v", time.Since(began), err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if r := j.end(t); r.Reason != Idle || r.ToBackend != 20 {
			t.Errorf("%+v", r)
		}
	})
}

// TestPipesAreHeldOnlyWhileBytesFlow counts descriptors: many relays that have
// moved bulk and are now quiet hold none.
func TestPipesAreHeldOnlyWhileBytesFlow(t *testing.T) {
	r := New(clock.Real())
	var apps, servers []*net.TCPConn
	var wg sync.WaitGroup
	for range 20 {
		app, client := tcpPair(t)
		backend, server := tcpPair(t)
		apps, servers = append(apps, app), append(servers, server)
		wg.Go(func() { r.Join(t.Context(), client, backend, Options{}) })
	}
	bulk, sink := make([]byte, 2<<20), make([]byte, 2<<20)
	for i := range apps {
		go apps[i].Write(bulk)
		if _, err := io.ReadFull(servers[i], sink); err != nil {
			t.Fatal(err)
		}
	}
	r.pool.mu.Lock()
	pipes := len(r.pool.pipes)
	r.pool.mu.Unlock()
	// One after the other they had bulk, so a few pipes served all, all are back.
	if pipes == 0 || pipes > 4 {
		t.Errorf("%d pipes wait in the pool, 20 relays had bulk in turn", pipes)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if most := 20*4 + 2*4 + 20; len(entries) > most {
		t.Errorf("%d descriptors, expected at most %d", len(entries), most)
	}
	for _, a := range apps {
		reset(a)
	}
	wg.Wait()
	r.Close()
}

// TestStalledBackendHoldsBackTheClient: a relay buffers little.
func TestStalledBackendHoldsBackTheClient(t *testing.T) {
	j := start(t.Context(), t, true, Options{})
	j.app.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	total := 0
	for {
		n, err := j.app.Write(make([]byte, 1<<20))
		total += n
		if err != nil {
			break
		}
		if total > 64<<20 {
			t.Fatal("64 MiB went into a backend that reads nothing")
		}
	}
	j.app.CloseWrite()
	if n, err := io.Copy(io.Discard, j.server); n != int64(total) || err != nil {
		t.Errorf("%d of %d arrived, %v", n, total, err)
	}
	j.server.Close()
	j.end(t)
}

func BenchmarkRelay(b *testing.B) {
	for _, spliced := range []bool{true, false} {
		name := "copied"
		if spliced {
			name = "spliced"
		}
		b.Run(name, func(b *testing.B) {
			j := start(b.Context(), b, spliced, Options{})
			done := make(chan struct{})
			go func() {
				io.Copy(io.Discard, struct{ io.Reader }{j.server})
				close(done)
			}()
			chunk := make([]byte, 256<<10)
			b.SetBytes(int64(len(chunk)))
			var before, after syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			for b.Loop() {
				j.app.Write(chunk)
			}
			j.app.CloseWrite()
			<-done
			syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			b.ReportMetric(cpu.Seconds()/(float64(b.N)*float64(len(chunk))/1e9), "cpu-s/GB")
			j.server.Close()
			j.end(b)
		})
	}
}

func newRelay(tb testing.TB) *Relay {
	r := New(clock.Real())
	tb.Cleanup(r.Close)
	return r
}

func selfSigned(tb testing.TB) tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
