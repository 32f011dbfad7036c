package federation

import (
	"fmt"
	"testing"
)

// sized is a mesh in which every one of n clusters exports every one of s
// services.
func sized(n, s int) parts {
	var p parts
	for i := range n {
		c := ClusterID(fmt.Sprintf("c%03d", i))
		p.members = append(p.members, Member{
			Cluster: c, Region: fmt.Sprintf("r%d", i%5), State: MemberActive, Generation: 1,
			Grants: []Grant{{"*", "*"}}, Gateways: []Address{addressOf(c)},
		})
		for j := range s {
			p.exports = append(p.exports, Export{
				Cluster: c, Service: service(j), Accepted: int64(i*s + j), Gateways: []Address{addressOf(c)},
				Ports: []Port{{"http", 8080, TCP, "http"}, {"metrics", 9090, TCP, ""}},
			})
		}
	}
	return p
}

func service(j int) ServiceID {
	return ServiceID{fmt.Sprintf("ns%d", j%10), fmt.Sprintf("svc%04d", j)}
}

func (p parts) world() *World {
	var w *World
	for i := range p.exports {
		w = w.WithReadiness(p.exports[i].ID(), Readiness{3, 3})
	}
	return w
}

const benchClusters, benchServices = 100, 1000

func BenchmarkMerge(b *testing.B) {
	p := sized(benchClusters, benchServices)
	b.ReportAllocs()
	for b.Loop() {
		p.merge()
	}
}

// BenchmarkChange is what one changed export costs from its event to the plan
// of one caller of one service, by the number of clusters that export every
// service: Apply and Diff cost the same whatever that is, a plan goes through
// its candidates.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1, 10, 100, 250} {
		p := sized(n, 100_000/250)
		c, w := p.merge(), p.world()
		e := p.exports[len(p.exports)/2]
		e.Accepted++
		next := c.Apply(Revision{"test", 2}, PutExport{e})
		if len(Diff(c, next)) != 2 {
			b.Fatalf("%v", Diff(c, next))
		}
		b.Run(fmt.Sprintf("apply/clusters=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.Apply(Revision{"test", 2}, PutExport{e})
			}
		})
		b.Run(fmt.Sprintf("diff/clusters=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Diff(c, next)
			}
		})
		w2 := w.WithReadiness(e.ID(), Readiness{1, 3})
		b.Run(fmt.Sprintf("world/clusters=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				DiffWorlds(c, w, w.WithReadiness(e.ID(), Readiness{1, 3}))
			}
		})
		b.Run(fmt.Sprintf("plan/clusters=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				next.PlanPort(e.Service, 8080, Caller{Cluster: e.Cluster}, w2)
			}
		})
	}
}

func BenchmarkFindings(b *testing.B) {
	c := sized(benchClusters, benchServices).merge()
	b.ReportAllocs()
	for b.Loop() {
		if f := c.Findings(); len(f) > 0 {
			b.Fatalf("%d findings, %v first", len(f), f[0])
		}
	}
}
