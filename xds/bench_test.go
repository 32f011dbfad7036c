package xds

import (
	"fmt"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/federation"
)

// cpu is the CPU time that the process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkChange: the endpoints of one of 1,000 imports change; how long until
// every stream has acked, and what it costs, the streams' own end included.
func BenchmarkChange(b *testing.B) {
	for _, streams := range []int{1, 100, 500} {
		b.Run(fmt.Sprintf("streams=%d", streams), func(b *testing.B) {
			f := newFixture(b)
			for n := range 1000 {
				must(b, f.SetImport(serviceImport(n)))
			}
			acked := make(chan struct{}, streams*16)
			f.server.cfg.OnAck = func(a Ack) {
				if len(a.Names) == 1 && a.Names[0] == "out/shop/s0/80" {
					acked <- struct{}{}
				}
			}
			rev := f.push(b)
			f.follow(b, streams)
			f.inSync(b, streams, rev)
			runtime.GC()
			port, start := 0, cpu()
			b.ResetTimer()
			for b.Loop() {
				port++
				must(b, f.SetImport(serviceImport(0, federation.Tier{Backends: []federation.Backend{{
					Cluster: "eu-2", Share: 1000, Gateways: []federation.Address{{Host: "127.0.2.1", Port: uint16(1 + port%60000)}},
				}}})))
				f.push(b)
				for range streams {
					<-acked
				}
			}
			b.ReportMetric(float64(cpu()-start)/float64(time.Microsecond)/float64(b.N), "cpu-us/change")
		})
	}
}

// BenchmarkBuild is one import's change without a server.
func BenchmarkBuild(b *testing.B) {
	f := newFixture(b)
	for n := range 1000 {
		must(b, f.SetImport(serviceImport(n)))
	}
	_, err := f.Take()
	must(b, err)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		must(b, f.SetImport(serviceImport(0, federation.Tier{Backends: []federation.Backend{{
			Cluster: "eu-2", Share: 1000, Gateways: []federation.Address{{Host: "127.0.2.1", Port: uint16(1 + n%60000)}},
		}}})))
		if d, err := f.Take(); err != nil || len(d.Changed) != 1 {
			b.Fatalf("%v %v", d, err)
		}
	}
}

// BenchmarkRead is what an engine pays for one import, from bytes.
func BenchmarkRead(b *testing.B) {
	resources := sample(b)
	for _, name := range []Name{{TypeCluster, "out/shop/s1/80"}, {TypeEndpoints, "out/shop/s1/80"}, {TypeListener, "imp/shop/s1/80"}} {
		b.Run(name.Type.String(), func(b *testing.B) {
			b.ReportAllocs()
			w := wire(resources[name])
			for b.Loop() {
				if _, err := readResource(name.Type, name.Name, w); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
