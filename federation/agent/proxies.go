package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// Bounds of what a proxy may send.
const (
	proxyName  = 256  // bytes of its name, engine, version
	proxyPeers = 4096 // peers in one report
)

// proxies are the attached gateways and proxies: what they see goes up, whom
// to believe goes down. It is safe for concurrent use.
type proxies struct {
	clock   clock.Clock
	metrics *metrics
	// believe is what a proxy is sent at its begin and after each change.
	believe func() *federationv1.BundleUpdate
	// changed is called after reports have changed, without the lock.
	changed func()

	mu     sync.Mutex
	list   map[*proxy]bool
	traces map[string]chan *federationv1.Access // by source address
}

// proxy is one Attach stream.
type proxy struct {
	caller
	hello *federationv1.ProxyHello
	since time.Time
	wake  chan struct{} // room for one: believe has changed, or trace has something

	// Guarded by proxies.mu.
	report *federationv1.ProxyReport
	trace  []string // source addresses to ask for
	trust  bool     // believe is to be sent
}

func newProxies(c clock.Clock, m *metrics) *proxies {
	return &proxies{
		clock: c, metrics: m,
		believe: func() *federationv1.BundleUpdate { return nil },
		changed: func() {},
		list:    make(map[*proxy]bool),
		traces:  make(map[string]chan *federationv1.Access),
	}
}

// attach serves one stream for the identity that its credential stands for.
func (p *proxies) attach(who caller, stream grpc.BidiStreamingServer[federationv1.AttachRequest, federationv1.AttachResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message must be a hello")
	}
	for _, s := range []string{hello.GetName(), hello.GetEngine(), hello.GetVersion()} {
		if len(s) > proxyName {
			return status.Errorf(codes.InvalidArgument, "a name in the hello has %d bytes, at most %d are taken", len(s), proxyName)
		}
	}
	x := &proxy{caller: who, hello: hello, since: p.clock.Now(), wake: make(chan struct{}, 1), trust: true}
	x.wake <- struct{}{}
	p.add(x)
	defer p.remove(x)

	ctx, cancel := context.WithCancel(stream.Context())
	var sender sync.WaitGroup
	defer sender.Wait()
	defer cancel()
	sender.Go(func() {
		defer cancel()
		for {
			select {
			case <-ctx.Done():
				return
			case <-x.wake:
			}
			for _, m := range p.due(x) {
				if stream.Send(m) != nil {
					return
				}
			}
		}
	})
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *federationv1.AttachRequest_Report:
			if len(m.Report.GetAddress()) > proxyName {
				return status.Error(codes.InvalidArgument, "a report with an address that is none")
			}
			if n := len(m.Report.GetPeers()); n > proxyPeers {
				return status.Errorf(codes.InvalidArgument, "a report with %d peers, at most %d are taken", n, proxyPeers)
			}
			p.mu.Lock()
			x.report = m.Report
			p.mu.Unlock()
			p.changed()
		case *federationv1.AttachRequest_Access:
			p.traced(m.Access)
		}
	}
}

func (p *proxies) add(x *proxy) {
	p.mu.Lock()
	p.list[x] = true
	p.count()
	p.mu.Unlock()
	p.changed()
}

func (p *proxies) remove(x *proxy) {
	p.mu.Lock()
	delete(p.list, x)
	p.count()
	p.mu.Unlock()
	p.changed()
}

func (p *proxies) count() {
	n := map[string]int{"gateway": 0, "proxy": 0}
	for x := range p.list {
		n[x.role()]++
	}
	for role, k := range n {
		p.metrics.proxies.WithLabelValues(role).Set(float64(k))
	}
}

// role follows from the identity, not from what the proxy says of itself.
func (x *proxy) role() string {
	if s, err := identity.ParseID(x.id); err == nil && s.Role == identity.RoleGateway {
		return "gateway"
	}
	return "proxy"
}

// due takes what is to be sent to x.
func (p *proxies) due(x *proxy) []*federationv1.AttachResponse {
	p.mu.Lock()
	trust, trace := x.trust, x.trace
	x.trust, x.trace = false, nil
	p.mu.Unlock()
	var out []*federationv1.AttachResponse
	if b := p.believe(); trust && b != nil {
		out = append(out, &federationv1.AttachResponse{Message: &federationv1.AttachResponse_Bundle{Bundle: b}})
	}
	for _, source := range trace {
		out = append(out, &federationv1.AttachResponse{Message: &federationv1.AttachResponse_TraceSource{TraceSource: source}})
	}
	return out
}

func (x *proxy) kick() {
	raise(x.wake)
}

// trustChanged has every proxy told anew whom to believe.
func (p *proxies) trustChanged() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for x := range p.list {
		x.trust = true
		x.kick()
	}
}

// trace asks the gateways for the record of the connection that comes from
// source, and returns where it will arrive. forget must be called.
func (p *proxies) trace(source string) (access <-chan *federationv1.Access, asked int, forget func()) {
	c := make(chan *federationv1.Access, 1)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.traces[source] = c
	for x := range p.list {
		if x.role() == "gateway" {
			x.trace = append(x.trace, source)
			x.kick()
			asked++
		}
	}
	return c, asked, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.traces, source)
	}
}

func (p *proxies) traced(a *federationv1.Access) {
	p.mu.Lock()
	c := p.traces[a.GetSource()]
	p.mu.Unlock()
	select {
	case c <- a: // never, where nobody asked: c is nil
	default:
	}
}

// probes are what the own gateways see of other clusters: a cluster answers if
// any of its gateways answers any of ours.
func (p *proxies) probes() map[federation.ClusterID]federation.Probe {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[federation.ClusterID]federation.Probe)
	for x := range p.list {
		if x.role() != "gateway" {
			continue
		}
		for _, peer := range x.report.GetPeers() {
			c, err := federation.ParseClusterID(peer.GetCluster())
			if err != nil {
				continue
			}
			switch now := peer.GetProbe().Decode(); {
			case now == federation.ProbeAnswers, now == federation.ProbeSilent && out[c] == federation.ProbeUnknown:
				out[c] = now
			}
		}
	}
	return out
}

// status is what the agent tells the controller of its proxies, by name. acks
// is what each has acknowledged over xDS.
func (p *proxies) status(cluster federation.ClusterID, acks func(*proxy) (federation.Revision, string)) (list []*federationv1.Gateway, bundle uint64) {
	p.mu.Lock()
	attached := slices.Collect(maps.Keys(p.list))
	p.mu.Unlock()
	first := true
	for _, x := range attached {
		p.mu.Lock()
		report := x.report
		p.mu.Unlock()
		rev, nack := acks(x)
		g := &federationv1.Gateway{
			Cluster: string(cluster), Name: x.hello.GetName(), SpiffeId: x.id.String(),
			Engine: x.hello.GetEngine(), Version: x.hello.GetVersion(), Address: report.GetAddress(), Role: x.role(),
			Acked: federationv1.EncodeRevision(rev), Nack: nack,
			ConnectedSince: timestamppb.New(x.since), SvidExpires: report.GetSvidExpires(), Peers: report.GetPeers(),
		}
		list = append(list, g)
		if s := report.GetBundleSequence(); first || s < bundle {
			bundle, first = s, false
		}
	}
	slices.SortFunc(list, func(a, b *federationv1.Gateway) int {
		return cmp.Or(cmp.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetSpiffeId(), b.GetSpiffeId()))
	})
	return list, bundle
}

// String says who is attached.
func (x *proxy) String() string { return fmt.Sprintf("%s %s", x.role(), x.hello.GetName()) }
