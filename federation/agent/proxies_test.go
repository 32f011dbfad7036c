package agent

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// attachment is a gateway's Attach stream, with everything that came down.
type attachment struct {
	stream federationv1.Local_AttachClient
	mu     sync.Mutex
	trust  []*federationv1.BundleUpdate
	traces []string
	ended  error
	done   chan struct{}
}

func attach(t *testing.T, conn *grpc.ClientConn, name string) *attachment {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := federationv1.NewLocalClient(conn).Attach(ctx)
	if err != nil {
		t.Fatal(err)
	}
	x := &attachment{stream: stream, done: make(chan struct{})}
	if err := stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Hello{
		Hello: &federationv1.ProxyHello{Name: name, Engine: "test", Version: "1"},
	}}); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(x.done)
		for {
			m, err := stream.Recv()
			x.mu.Lock()
			if err != nil {
				x.ended = err
				x.mu.Unlock()
				return
			}
			switch m := m.GetMessage().(type) {
			case *federationv1.AttachResponse_Bundle:
				x.trust = append(x.trust, m.Bundle)
			case *federationv1.AttachResponse_TraceSource:
				x.traces = append(x.traces, m.TraceSource)
			}
			x.mu.Unlock()
		}
	}()
	t.Cleanup(func() { cancel(); <-x.done })
	return x
}

// newest is the last trust that came down.
func (x *attachment) newest() *federationv1.BundleUpdate {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.trust) == 0 {
		return nil
	}
	return x.trust[len(x.trust)-1]
}

func (x *attachment) report(t *testing.T, probe federationv1.Probe, clusters ...string) {
	t.Helper()
	r := &federationv1.ProxyReport{BundleSequence: 1}
	for _, c := range clusters {
		r.Peers = append(r.Peers, &federationv1.Peer{Cluster: c, Probe: probe})
	}
	if err := x.stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Report{Report: r}}); err != nil {
		t.Fatal(err)
	}
}

func (h *hub) lastStatus() *federationv1.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.statuses) == 0 {
		return nil
	}
	return h.statuses[len(h.statuses)-1]
}

// follow is an engine that takes everything it is told, but what refuse names.
func follow(t *testing.T, conn *grpc.ClientConn, node string, refuse func(*xds.Update) []xds.Refusal) *xds.Client {
	t.Helper()
	if refuse == nil {
		refuse = func(*xds.Update) []xds.Refusal { return nil }
	}
	c := xds.NewClient(xds.ClientConfig{Conn: conn, NodeID: node, NodeCluster: "x", Apply: refuse, Clock: clock.Real(), Logger: testLog(t)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

// A failover changes endpoints alone: how to authenticate a cluster is known to
// the gateway whether the plan uses it at the moment or not.
func TestFailoverKeepsTheTransports(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	h.remote("eu-3", payments, "10.0.0.3:15443", "127.9.0.1", 2)
	c := h.config(t)
	a := start(t, c)
	eventually(t, "both serve", func() bool { return a.first(payments) == "eu-2,eu-3" })
	client := follow(t, dialSocket(t, c.Sockets[0].Path), "gw", nil)
	localities := func() (transports, used int) {
		out := client.Config().Clusters["out/shop/payments/80"]
		if out == nil {
			return 0, 0
		}
		return len(out.TLS), len(out.Localities)
	}
	eventually(t, "the gateway has both", func() bool { _, used := localities(); return used == 2 })
	before, _ := localities()
	h.put(federationv1.ReadinessRecord(federation.ExportID{Cluster: "eu-2", Service: payments}, federation.Readiness{Ready: 0, Total: 2}))
	eventually(t, "the gateway has one", func() bool { _, used := localities(); return used == 1 })
	if after, _ := localities(); after != before || before < 2 {
		t.Errorf("%d transports before the failover, %d after it", before, after)
	}
}

// What gateways see moves traffic, whom to believe reaches them, and their
// state reaches the controller.
func TestGatewaysSeeAndBelieve(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	h.remote("eu-3", payments, "10.0.0.3:15443", "127.9.0.1", 2)
	c := h.config(t)
	a := start(t, c)
	eventually(t, "both serve", func() bool { return a.first(payments) == "eu-2,eu-3" })

	conn := dialSocket(t, c.Sockets[0].Path)
	x := attach(t, conn, "gw-a")
	eventually(t, "the gateway knows whom to believe", func() bool {
		u := x.newest()
		return u != nil && len(u.GetBundle().GetRoots()) == 1 && len(u.GetMembers()) == 3
	})
	x.report(t, federationv1.Probe_PROBE_SILENT, "eu-2", "no such cluster!", "")
	eventually(t, "a silent cluster stands behind", func() bool { return a.first(payments) == "eu-3" })
	// Another gateway reaches it: the cluster answers.
	y := attach(t, conn, "gw-b")
	y.report(t, federationv1.Probe_PROBE_ANSWERS, "eu-2")
	eventually(t, "one that answers one of ours is back", func() bool { return a.first(payments) == "eu-2,eu-3" })

	h.put(federationv1.DenialRecord(federation.Denial{Cluster: "eu-3", Generation: 1, Reason: "stolen"}))
	eventually(t, "a denial reaches the gateways", func() bool {
		return len(x.newest().GetDenials()) == 1 && len(y.newest().GetDenials()) == 1
	})
	eventually(t, "their state reaches the controller", func() bool {
		s := h.lastStatus()
		return len(s.GetGateways()) == 2 && s.GetGateways()[0].GetName() == "gw-a" && s.GetBundleAcked() == 1 &&
			s.GetGateways()[0].GetRole() == "gateway" && s.GetGateways()[0].GetSpiffeId() == "spiffe://weft.test/cluster/eu-1/gateway" &&
			len(s.GetDenials()) == 1
	})
	// A gateway that goes takes what it saw with it.
	if err := y.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last word is the remaining gateway's", func() bool { return a.first(payments) == "eu-3" })
}

// A proxy is told the plan, and what it refuses is a finding; why says both.
func TestProxiesAreToldAndAnswer(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	c := h.config(t)
	write(t, c, "a.yaml", serviceYAML("payments", "127.0.0.1:8081"))
	a := start(t, c)
	conn := dialSocket(t, c.Sockets[0].Path)
	var refuse sync.Map
	engine := follow(t, conn, "gw-a", func(u *xds.Update) []xds.Refusal {
		var list []xds.Refusal
		for _, n := range u.Listeners {
			if _, no := refuse.Load(n); no {
				list = append(list, xds.Refusal{Name: xds.Name{Type: xds.TypeListener, Name: n}, Reason: "address in use"})
			}
		}
		return list
	})
	eventually(t, "the import listener, at the service's address", func() bool {
		l := engine.Config().Listeners["imp/shop/payments/80"]
		return l != nil && l.Addr == netip.MustParseAddrPort("127.9.0.1:80")
	})
	eventually(t, "the plan, own cluster first", func() bool {
		out := engine.Config().Clusters["out/shop/payments/80"]
		return out != nil && len(out.Localities) == 2 && out.Localities[0].Endpoints[0].Labels[xds.LabelCluster] == "eu-1" &&
			out.Localities[1].Endpoints[0].Addr == netip.MustParseAddrPort("10.0.0.2:15443")
	})
	eventually(t, "the own endpoint, inwards", func() bool {
		in := engine.Config().Clusters["in/shop/payments/80"]
		return in != nil && len(in.Localities) == 1 && in.Localities[0].Endpoints[0].Addr == netip.MustParseAddrPort("127.0.0.1:8081")
	})
	eventually(t, "the acknowledgement, at the controller", func() bool {
		s := h.lastStatus()
		return s.GetApplied().GetNumber() > 10 && s.GetAcked().GetNumber() == s.GetApplied().GetNumber()
	})
	why := func() *federationv1.WhyResponse {
		r, err := a.why(&federationv1.WhyRequest{Namespace: "shop", Name: "payments", Port: 80, From: "eu-1"})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	w := why()
	if w.GetPredicted() || len(w.GetPlan().GetVerdicts()) != 2 || w.GetPlan().GetVerdicts()[0].GetCluster() != "eu-1" || w.GetWorld() == "" {
		t.Errorf("why: %v", w)
	}
	eventually(t, "why says that the proxy has it", func() bool {
		p := why().GetProxies()
		return len(p) == 1 && p[0].GetName() == "gw-a" && p[0].GetAcked()
	})

	refuse.Store("imp/shop/carts/80", true)
	h.remote("eu-2", federation.ServiceID{Namespace: "shop", Name: "carts"}, "10.0.0.2:15443", "127.9.0.2", 1)
	eventually(t, "a finding names what the proxy refused, and why", func() bool {
		for _, f := range a.Findings() {
			if f.Code == federation.CodeProxyRefusedConfig {
				return strings.Contains(f.Message, "imp/shop/carts/80") && strings.Contains(f.Message, "address in use")
			}
		}
		return false
	})
	eventually(t, "why says that the proxy has not all of it", func() bool {
		p := why().GetProxies()
		return len(p) == 1 && !p[0].GetAcked() && p[0].GetNack() != ""
	})
	if engine.Config().Clusters["out/shop/payments/80"] == nil {
		t.Error("the other service is gone")
	}
	h.del(federationv1.VIPKey("eu-1", federation.ServiceID{Namespace: "shop", Name: "carts"}).String())
	eventually(t, "the finding is over with the service", func() bool { return len(a.findings.of("proxies")) == 0 })
}

// A workload's proxy is told of the endpoint that it stands before, and of the
// services that its socket names; callers are its identity.
func TestWorkloadProxy(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", federation.ServiceID{Namespace: "shop", Name: "carts"}, "10.0.0.2:15443", "127.9.0.2", 1)
	c := h.config(t)
	front := netip.MustParseAddrPort("127.0.0.1:15444")
	c.Sockets = append(c.Sockets, Socket{
		Path: c.Sockets[0].Path + "p", Identity: "ns/shop/sa/payments", Listen: front,
		Outbound: map[federation.ServiceID]netip.Addr{{Namespace: "shop", Name: "carts"}: netip.MustParseAddr("127.0.0.9")},
	})
	write(t, c, "a.yaml", `
apiVersion: weft.dev/v1
kind: Service
metadata: {namespace: shop, name: payments}
spec:
  export: true
  mode: passthrough
  serviceAccounts: [payments]
  ports: [{name: http, port: 80}]
  endpoints:
    - {address: 127.0.0.1, ports: {http: 8081}, proxy: "127.0.0.1:15444"}
    - {address: 127.0.0.1, ports: {http: 8082}, proxy: "127.0.0.1:15445"}
`)
	start(t, c)
	engine := follow(t, dialSocket(t, c.Sockets[1].Path), "px", nil)
	eventually(t, "its workload, and no other", func() bool {
		var addrs []string
		for name, cluster := range engine.Config().Clusters {
			if strings.HasPrefix(name, "app/shop/payments") {
				for _, l := range cluster.Localities {
					for _, e := range l.Endpoints {
						addrs = append(addrs, e.Addr.String())
					}
				}
			}
		}
		return slices.Equal(addrs, []string{"127.0.0.1:8081"})
	})
	eventually(t, "its outbound listener", func() bool {
		l := engine.Config().Listeners["imp/shop/carts/80"]
		return l != nil && l.Addr == netip.MustParseAddrPort("127.0.0.9:80")
	})
	if l := engine.Config().Listeners["imp/shop/payments/80"]; l != nil {
		t.Errorf("it was given a listener that its socket does not name: %v", l.Addr)
	}
	eventually(t, "the export names its identity", func() bool {
		return slices.Equal(h.record("export/eu-1/shop/payments").GetExport().GetServes(), []string{"spiffe://weft.test/cluster/eu-1/ns/shop/sa/payments"})
	})
}

// Over mutual TLS the certificate says who it is: the own cluster's configured
// proxies and nobody else.
func TestXDSOverTLS(t *testing.T) {
	h := newHub(t, "eu-1")
	h.put(federationv1.MemberRecord(member("eu-2", "10.0.0.2:15443")))
	c := h.config(t)
	c.XDSListen = "127.0.0.1:0"
	c.Sockets = append(c.Sockets, Socket{Identity: "ns/shop/sa/payments", Listen: netip.MustParseAddrPort("127.0.0.1:15444")})
	a := start(t, c)
	eventually(t, "a session", h.connected)
	dial := func(id string) *grpc.ClientConn {
		t.Helper()
		v := identity.NewVerifier(identity.VerifierConfig{Clock: clock.Real(), Mesh: h.bundle, Metrics: prometheus.NewRegistry()})
		conn, err := grpc.NewClient(a.XDSAddr().String(), grpc.WithTransportCredentials(credentials.NewTLS(v.Client(identity.ClientConfig{
			SVID: leafSource{h.svid(spiffeid.RequireFromString(id))}, Authorize: identity.AllowAgentOf("eu-1"),
		}))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	issue := func(conn *grpc.ClientConn) (string, error) {
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := identity.NewCSR(key)
		if err != nil {
			t.Fatal(err)
		}
		r, err := federationv1.NewLocalClient(conn).Issue(context.Background(), &federationv1.LocalIssueRequest{Csr: csr})
		return r.GetChain().GetSpiffeId(), err
	}
	for id, want := range map[string]codes.Code{
		"spiffe://weft.test/cluster/eu-1/gateway":             codes.OK,
		"spiffe://weft.test/cluster/eu-1/ns/shop/sa/payments": codes.OK,
		"spiffe://weft.test/cluster/eu-1/ns/shop/sa/other":    codes.PermissionDenied,
		"spiffe://weft.test/cluster/eu-1/agent":               codes.PermissionDenied,
		"spiffe://weft.test/cluster/eu-2/gateway":             codes.Unavailable, // the handshake fails
	} {
		got, err := issue(dial(id))
		if status.Code(err) != want || want == codes.OK && got != id {
			t.Errorf("%s: %s, %v, want %v", id, got, err, want)
		}
	}
	// A denial counts for connections that are open already.
	conn := dial("spiffe://weft.test/cluster/eu-1/gateway")
	if _, err := issue(conn); err != nil {
		t.Fatal(err)
	}
	h.put(federationv1.DenialRecord(federation.Denial{Cluster: "eu-1", Generation: 1}))
	eventually(t, "an open connection of a denied cluster is refused", func() bool {
		_, err := issue(conn)
		return status.Code(err) == codes.PermissionDenied
	})
}

// A call goes through the cluster's own listener and comes back with the
// gateway's record of it.
func TestCallThroughTheMesh(t *testing.T) {
	h := newHub(t, "eu-1")
	gate, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(gate.Addr().String())
	h.put(
		federationv1.ExportRecord(federation.Export{
			Cluster: "eu-1", Service: payments, Ports: []federation.Port{{Number: at.Port(), Protocol: federation.TCP}},
		}),
		federationv1.VIPRecord("eu-1", payments, federation.VIP{Address: at.Addr()}),
	)
	c := h.config(t)
	c.Source = ""
	a := start(t, c)
	eventually(t, "the service has an address", func() bool { return a.mesh.vip(payments).IsValid() })
	x := attach(t, dialSocket(t, c.Sockets[0].Path), "gw-a")
	eventually(t, "the gateway is attached", func() bool { return x.newest() != nil })

	// The gateway: it serves one request for each connection, and tells of the
	// connection at its end.
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := gate.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer conn.Close()
				r, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil {
					return
				}
				switch r.URL.Path {
				case "/hang":
					_, _ = conn.Read(make([]byte, 1))
					return
				case "/cut":
					return
				case "/endless":
					if _, err := conn.Write([]byte("HTTP/1.1 200 OK\r\n\r\n")); err != nil {
						return
					}
					for err == nil {
						_, err = conn.Write([]byte(strings.Repeat("x", 4096)))
					}
					return
				}
				_, _ = conn.Write([]byte("HTTP/1.1 203 Fine\r\nContent-Length: 5\r\n\r\nhello"))
				_, _ = conn.Read(make([]byte, 1)) // the caller closes
				source := conn.RemoteAddr().String()
				asked := func() bool {
					x.mu.Lock()
					defer x.mu.Unlock()
					return slices.Contains(x.traces, source)
				}
				for !asked() && x.stream.Context().Err() == nil {
					time.Sleep(time.Millisecond)
				}
				if asked() {
					_ = x.stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Access{
						Access: &federationv1.Access{Source: source, Cluster: "eu-2", Peer: r.Host},
					}})
				}
			})
		}
	})
	defer served.Wait()
	defer gate.Close()

	question := func(path string, timeout time.Duration) *federationv1.CallResponse {
		t.Helper()
		ctx, cancel := withTimeout(context.Background(), clock.Real(), timeout)
		defer cancel()
		r, err := a.call(ctx, &federationv1.CallRequest{Namespace: "shop", Name: "payments", Path: path})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := question("/", time.Minute)
	if r.GetStatus() != 203 || r.GetBody() != "hello" || r.GetError() != "" || r.GetDuration().AsDuration() <= 0 {
		t.Errorf("the answer: %v", r)
	}
	if r.GetAccess().GetCluster() != "eu-2" || r.GetAccess().GetPeer() != "payments.shop.svc.clusterset.local" {
		t.Errorf("its path: %v", r.GetAccess())
	}
	if r := question("/hang", 200*time.Millisecond); !strings.Contains(r.GetError(), "no answer in time") {
		t.Errorf("a request that hangs: %v", r)
	}
	if r := question("/cut", time.Minute); r.GetError() == "" || r.GetStatus() != 0 {
		t.Errorf("a request that is cut: %v", r)
	}
	if r := question("/endless", time.Minute); r.GetStatus() != 200 || len(r.GetBody()) != callBody {
		t.Errorf("an endless answer: status %d, %d bytes", r.GetStatus(), len(r.GetBody()))
	}
	for _, bad := range []*federationv1.CallRequest{
		{Namespace: "shop", Name: "none"},
		{Namespace: "shop", Name: "payments", From: "eu-9"},
		{Namespace: "shop", Name: "payments", Path: "no-slash"},
		{Namespace: "shop", Name: "payments", Path: "/a b\r\nX: y"},
		{Namespace: "shop", Name: "payments", Port: 70000},
		{Namespace: "..", Name: "/"},
	} {
		if _, err := a.call(context.Background(), bad); err == nil {
			t.Errorf("%v is answered", bad)
		}
	}

	// The same over the Sync stream, as the controller asks.
	h.mu.Lock()
	for s := range h.streams {
		s.ask <- &federationv1.Question{Id: 7, Question: &federationv1.Question_Call{Call: &federationv1.CallRequest{Namespace: "shop", Name: "payments"}}}
		s.ask <- &federationv1.Question{Id: 8, Question: &federationv1.Question_Why{Why: &federationv1.WhyRequest{Namespace: "shop", Name: "none"}}}
		s.ask <- &federationv1.Question{Id: 9}
	}
	h.mu.Unlock()
	answers := map[uint64]*federationv1.Answer{}
	for range 3 {
		select {
		case m := <-h.answers:
			answers[m.GetId()] = m
		case <-time.After(20 * time.Second):
			t.Fatalf("answers: %v", answers)
		}
	}
	if answers[7].GetCall().GetStatus() != 203 || answers[8].GetError() == "" || answers[9].GetError() == "" {
		t.Errorf("answers: %v", answers)
	}
}

// A proxy that does not keep to the protocol harms itself alone.
func TestRudeProxies(t *testing.T) {
	h := newHub(t, "eu-1")
	c := h.config(t)
	a := start(t, c)
	conn := dialSocket(t, c.Sockets[0].Path)
	send := func(m *federationv1.AttachRequest) error {
		t.Helper()
		stream, err := federationv1.NewLocalClient(conn).Attach(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := stream.Recv(); err != nil {
				return err
			}
		}
	}
	if err := send(&federationv1.AttachRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no hello: %v", err)
	}
	long := &federationv1.ProxyHello{Name: strings.Repeat("x", proxyName+1)}
	if err := send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Hello{Hello: long}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an endless name: %v", err)
	}
	x := attach(t, conn, "gw")
	many := make([]string, proxyPeers+1)
	x.report(t, federationv1.Probe_PROBE_SILENT, many...)
	<-x.done
	if status.Code(x.ended) != codes.InvalidArgument {
		t.Errorf("too many peers: %v", x.ended)
	}
	// An access that nobody asked for goes nowhere.
	y := attach(t, conn, "gw")
	if err := y.stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Access{Access: &federationv1.Access{Source: "1.2.3.4:5"}}}); err != nil {
		t.Fatal(err)
	}
	y.report(t, federationv1.Probe_PROBE_SILENT, "eu-2")
	eventually(t, "what comes behind it counts", func() bool {
		_, w := a.mesh.present()
		return w.Probe("eu-2") == federation.ProbeSilent
	})
}
