package gateway

import (
	"io"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"time"
)

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func quiet(c *Config) { c.Log = slog.New(slog.DiscardHandler) }

// BenchmarkConnections makes connections through two gateways, a byte there
// and back on each. CPU is that of both gateways, the caller and the backend.
func BenchmarkConnections(b *testing.B) {
	m := newMesh(b)
	s := serve(b, func(c *net.TCPConn) {
		var one [1]byte
		if _, err := c.Read(one[:]); err == nil {
			c.Write(one[:])
		}
	})
	far := m.gateway("b", quiet).serves(payments, s.addr).start()
	near := m.gateway("a", quiet)
	addr := near.imports(payments, to(far, 0, 1000))
	near.start()
	ask := func() {
		c, err := net.Dial("tcp", addr.String())
		if err != nil {
			b.Error(err)
			return
		}
		var one [1]byte
		c.Write(one[:])
		if _, err := io.ReadFull(c, one[:]); err != nil {
			b.Error(err)
		}
		c.(*net.TCPConn).SetLinger(0) // no port waits in TIME_WAIT
		c.Close()
	}
	ask()
	b.SetParallelism(8)
	b.ResetTimer()
	before := cpu()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			ask()
		}
	})
	b.ReportMetric(float64(b.N)/(cpu()-before).Seconds(), "connections/cpu-s")
}

// BenchmarkBytes moves bytes one way through two gateways on eight connections.
func BenchmarkBytes(b *testing.B) {
	m := newMesh(b)
	s := serve(b, func(c *net.TCPConn) {
		io.Copy(io.Discard, struct{ io.Reader }{c})
	})
	far := m.gateway("b", quiet).serves(payments, s.addr).start()
	near := m.gateway("a", quiet)
	addr := near.imports(payments, to(far, 0, 1000))
	near.start()
	chunk := make([]byte, 256<<10)
	b.SetBytes(8 * int64(len(chunk)))
	done := make(chan struct{})
	before := cpu()
	for range 8 {
		c := dial(b, addr)
		c.SetDeadline(time.Time{})
		go func() {
			for range b.N {
				c.Write(chunk)
			}
			c.CloseWrite()
			io.Copy(io.Discard, c)
			done <- struct{}{}
		}()
	}
	for range 8 {
		<-done
	}
	b.ReportMetric((cpu()-before).Seconds()/(float64(b.N)*8*float64(len(chunk))/1e9), "cpu-s/GB")
}
