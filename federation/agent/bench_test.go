package agent

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/xds"
)

type nowhere struct{}

func (nowhere) Set(xds.View, federation.Revision, xds.Delta) {}

// BenchmarkReadinessChange is one remote readiness change, from the update to
// the resources, among many services of four clusters.
func BenchmarkReadinessChange(b *testing.B) {
	for _, services := range []int{100, 10_000} {
		b.Run(fmt.Sprint("services=", services), func(b *testing.B) {
			log := slog.New(slog.DiscardHandler)
			m := newMesh(td.Name(), "eu-1", log)
			hosts := newHosts(clock.Real(), nil, func() {})
			socket := Socket{Identity: gatewayIdentity, Listen: netip.MustParseAddrPort("127.0.0.1:15443"), LocalPipe: "/tmp/p"}
			builder, err := xds.NewBuilder(xds.Node{TrustDomain: td, Cluster: "eu-1", Bind: socket.Listen, LocalPipe: socket.LocalPipe})
			if err != nil {
				b.Fatal(err)
			}
			d := &driver{
				clock: clock.Real(), log: log, metrics: newMetrics(prometheus.NewRegistry()), mesh: m, hosts: hosts,
				state: func(endpointKey) health { return healthReady }, trust: func() {},
				roots: func() []*x509.Certificate { return nil }, out: nowhere{},
				found: func([]federation.Finding) {}, applied: func(*scene) {}, failed: make(map[string]federation.Finding),
				views: []*view{{name: "v", socket: socket, builder: builder, imports: make(map[federation.ServiceID][]uint16)}},
			}
			d.opened.Store(true)
			var full federationv1.Update
			vip := netip.MustParseAddr("10.128.0.0")
			for i := range services {
				s := federation.ServiceID{Namespace: "shop", Name: fmt.Sprint("s", i)}
				vip = vip.Next()
				full.Puts = append(full.Puts, federationv1.VIPRecord("eu-1", s, federation.VIP{Address: vip}))
				for c := 1; c <= 4; c++ {
					x := federation.Export{
						Cluster: federation.ClusterID(fmt.Sprint("eu-", c)), Service: s,
						Ports:    []federation.Port{{Number: 80, Protocol: federation.TCP}},
						Gateways: []federation.Address{{Host: fmt.Sprint("10.0.0.", c), Port: 15443}},
					}
					full.Puts = append(full.Puts, federationv1.ExportRecord(x), federationv1.ReadinessRecord(x.ID(), federation.Readiness{Ready: 2, Total: 2}))
				}
			}
			for c := 1; c <= 4; c++ {
				full.Puts = append(full.Puts, federationv1.MemberRecord(member(federation.ClusterID(fmt.Sprint("eu-", c)), fmt.Sprintf("10.0.0.%d:15443", c))))
			}
			full.Revision, full.Full = &federationv1.Revision{Incarnation: "i", Number: 1}, true
			if err := m.begin(&federationv1.Welcome{TrustDomain: td.Name()}); err != nil {
				b.Fatal(err)
			}
			m.update(&full)
			d.step()
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				id := federation.ExportID{Cluster: "eu-2", Service: federation.ServiceID{Namespace: "shop", Name: "s7"}}
				m.update(&federationv1.Update{
					Revision: &federationv1.Revision{Incarnation: "i", Number: int64(i + 2)},
					Puts:     []*federationv1.Record{federationv1.ReadinessRecord(id, federation.Readiness{Ready: i % 2, Total: 2})},
				})
				d.step()
			}
		})
	}
}
