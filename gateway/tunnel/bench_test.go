package tunnel

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// opener opens a stream whose far end reads all, or echoes a byte.
type opener func(authority string) (io.ReadWriteCloser, func() error)

// ours and theirs are the same work over the same TLS: this package at both
// ends, and x/net's Transport and Server.
func ours(b *testing.B) opener {
	client, _ := tunnels(b, true, Config{}, Config{}, func(in *Incoming) {
		s, err := in.Accept(nil)
		if err != nil {
			return
		}
		if in.Authority == "sink" {
			io.Copy(io.Discard, struct{ io.Reader }{s})
			s.CloseWrite()
			return
		}
		var one [1]byte
		if _, err := s.Read(one[:]); err == nil {
			s.Write(one[:])
			s.CloseWrite()
			s.Read(one[:])
		}
	})
	return func(authority string) (io.ReadWriteCloser, func() error) {
		s, _, err := client.Open(context.Background(), Request{Authority: authority})
		if err != nil {
			b.Error(err)
			return nil, nil
		}
		return s, s.CloseWrite
	}
}

type theirStream struct {
	io.Reader
	io.Writer
	io.Closer
}

func theirs(b *testing.B) opener {
	c, s := connPair(b, true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv := &http2.Server{MaxUploadBufferPerStream: 1 << 20, MaxUploadBufferPerConnection: 64 << 20, MaxReadFrameSize: maxFrame, MaxConcurrentStreams: 1024}
		srv.ServeConn(s, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			if r.Host == "sink" {
				io.Copy(io.Discard, r.Body)
				return
			}
			var one [1]byte
			if _, err := r.Body.Read(one[:]); err == nil {
				w.Write(one[:])
			}
		})})
	}()
	cc, err := (&http2.Transport{AllowHTTP: true, MaxReadFrameSize: maxFrame}).NewClientConn(c)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cc.Close(); s.Close(); <-done })
	return func(authority string) (io.ReadWriteCloser, func() error) {
		pr, pw := io.Pipe()
		resp, err := cc.RoundTrip(&http.Request{
			Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
			Body: pr, ContentLength: -1, Header: http.Header{},
		})
		if err != nil {
			b.Error(err)
			return nil, nil
		}
		return theirStream{resp.Body, pw, resp.Body}, pw.Close
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBulk moves bytes through eight streams of one tunnel.
func BenchmarkBulk(b *testing.B) {
	for name, make := range map[string]func(*testing.B) opener{"weft": ours, "x-net": theirs} {
		b.Run(name, func(b *testing.B) {
			open := make(b)
			chunk := newBytes(64 << 10)
			b.SetBytes(8 * int64(len(chunk)))
			b.ResetTimer()
			before := cpu()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					s, end := open("sink")
					for range b.N {
						s.Write(chunk)
					}
					end()
					io.Copy(io.Discard, s)
					s.Close()
				})
			}
			wg.Wait()
			b.ReportMetric((cpu()-before).Seconds()/(float64(b.N)*8*float64(len(chunk))/1e9), "cpu-s/GB")
		})
	}
}

// BenchmarkSockets moves bytes from eight sockets through a tunnel to eight
// sockets, as two gateways do.
func BenchmarkSockets(b *testing.B) {
	var mu sync.Mutex
	sinks := map[string]*net.TCPConn{}
	client, _ := tunnels(b, true, Config{}, Config{}, func(in *Incoming) {
		s, err := in.Accept(nil)
		if err != nil {
			return
		}
		mu.Lock()
		dst := sinks[in.Authority]
		mu.Unlock()
		s.WriteTo(dst)
		dst.CloseWrite()
		s.CloseWrite()
	})
	chunk := newBytes(256 << 10)
	b.SetBytes(8 * int64(len(chunk)))
	var wg sync.WaitGroup
	before := cpu()
	b.ResetTimer()
	for i := range 8 {
		name := string(rune('a' + i))
		far, sink := tcpPair(b)
		app, near := tcpPair(b)
		mu.Lock()
		sinks[name] = far
		mu.Unlock()
		s := open(b, client, name)
		wg.Go(func() { s.ReadFrom(near); s.CloseWrite() })
		wg.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{sink}) })
		wg.Go(func() {
			for range b.N {
				app.Write(chunk)
			}
			app.CloseWrite()
		})
	}
	wg.Wait()
	b.ReportMetric((cpu()-before).Seconds()/(float64(b.N)*8*float64(len(chunk))/1e9), "cpu-s/GB")
}

// BenchmarkStreams opens streams, one byte there and back, 16 at a time.
func BenchmarkStreams(b *testing.B) {
	for name, make := range map[string]func(*testing.B) opener{"weft": ours, "x-net": theirs} {
		b.Run(name, func(b *testing.B) {
			open := make(b)
			b.SetParallelism(8)
			b.ResetTimer()
			before := cpu()
			b.RunParallel(func(pb *testing.PB) {
				var one [1]byte
				for pb.Next() {
					s, end := open("echo")
					s.Write(one[:])
					s.Read(one[:])
					end()
					io.Copy(io.Discard, s)
					s.Close()
				}
			})
			b.ReportMetric(float64(b.N)/(cpu()-before).Seconds(), "streams/cpu-s")
		})
	}
}

func newBytes(n int) []byte { return make([]byte, n) }
