package xds

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/e2e/envoytest"
	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// envoyNode is one Envoy in a gateway's or a proxy's place, with an agent of
// its own: nothing but a bootstrap, and what the builder made.
type envoyNode struct {
	*Builder
	node   Node
	server *Server
	leaf   *LeafServer
	dir    string
	source *swapSource
	nacks  chan Nack
	sent   atomic.Int64 // resources in responses that were acked
	rev    int64

	mu  sync.Mutex
	log strings.Builder
}

func startEnvoy(t *testing.T, n Node, svid *x509svid.SVID, configure func(*Builder)) *envoyNode {
	t.Helper()
	binary := envoytest.Binary(t)
	dir, err := os.MkdirTemp("", "weft-envoy-") // shorter than t.TempDir, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n.TrustDomain = testDomain
	n.LocalPipe = filepath.Join(dir, "local.sock")
	b, err := NewBuilder(n)
	if err != nil {
		t.Fatal(err)
	}
	e := &envoyNode{Builder: b, node: n, dir: dir, nacks: make(chan Nack, 100), source: new(swapSource)}
	e.server = NewServer(ServerConfig{
		Clock: clock.Real(), Logger: testLogger(t),
		OnAck:  func(a Ack) { e.sent.Add(int64(len(a.Names))) },
		OnNack: func(n Nack) { e.nacks <- n },
	})
	e.source.Store(svid)
	e.leaf = NewLeafServer(e.source, clock.Real(), testLogger(t))
	if err := e.leaf.Update(); err != nil {
		t.Fatal(err)
	}
	serveUnix(t, filepath.Join(dir, "agent.sock"), func(g *grpc.Server) {
		e.server.Register(g, func(context.Context) (View, error) { return "envoy", nil })
	})
	serveUnix(t, filepath.Join(dir, "leaf.sock"), func(g *grpc.Server) { e.leaf.Register(g) })
	configure(b)
	e.push(t)

	boot, err := Bootstrap{
		NodeID: "envoy", NodeCluster: string(n.Cluster),
		AgentPipe: filepath.Join(dir, "agent.sock"),
		LeafPipe:  filepath.Join(dir, "leaf.sock"),
		AdminPipe: filepath.Join(dir, "admin.sock"),
	}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "boot.json"), boot, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "--config-path", filepath.Join(dir, "boot.json"), "--disable-hot-restart", "--concurrency", "1", "-l", "warning",
		"--file-flush-interval-msec", "100")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			e.mu.Lock()
			e.log.WriteString(lines.Text() + "\n")
			e.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s envoy:\n%s", n.Cluster, e.output())
		}
	})
	return e
}

func (e *envoyNode) output() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.log.String()
}

// push sends what the builder has changed.
func (e *envoyNode) push(t *testing.T) {
	t.Helper()
	d, err := e.Take()
	if err != nil {
		t.Fatal(err)
	}
	e.set(d)
}

func (e *envoyNode) set(d Delta) {
	e.rev++
	e.server.Set("envoy", federation.Revision{Incarnation: "t", Number: e.rev}, d)
}

// swapSource is a source whose leaf can be replaced.
type swapSource struct{ atomic.Pointer[x509svid.SVID] }

func (l *swapSource) GetX509SVID() (*x509svid.SVID, error) { return l.Load(), nil }

// settled waits until everything is acked and nothing was refused.
func (e *envoyNode) settled(t *testing.T) {
	t.Helper()
	eventually(t, "envoy "+string(e.node.Cluster)+" takes its configuration", func() error {
		select {
		case n := <-e.nacks:
			t.Fatalf("%s: %s", n.Name, n.Cause)
		default:
		}
		streams := e.server.Streams()
		if len(streams) != 1 || !streams[0].InSync {
			return fmt.Errorf("streams %+v", streams)
		}
		return nil
	})
}

// admin asks Envoy's admin interface.
func (e *envoyNode) admin(t *testing.T, path string) string {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(e.dir, "admin.sock"))
	}}
	defer transport.CloseIdleConnections()
	r, err := (&http.Client{Transport: transport}).Get("http://admin" + path)
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	body, _ := io.ReadAll(r.Body)
	return string(body)
}

func (e *envoyNode) listening(t *testing.T, names ...string) {
	t.Helper()
	eventually(t, "envoy's listeners are up", func() error {
		up := e.admin(t, "/listeners")
		for _, n := range names {
			if !strings.Contains(up, n+"::") && !strings.Contains(up, n+"/") {
				return fmt.Errorf("%s is not among\n%s", n, up)
			}
		}
		return nil
	})
}

// echo says its name, then echoes.
func echo(t *testing.T, name string) netip.AddrPort {
	t.Helper()
	return echoFunc(t, name, func() {})
}

func echoFunc(t *testing.T, name string, accepted func()) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted()
			go func() {
				defer c.Close()
				fmt.Fprintf(c, "%s\n", name)
				io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// greet dials and returns the first line, after a round trip through the other
// side.
func greet(addr netip.AddrPort) (string, error) {
	c, err := net.DialTimeout("tcp", addr.String(), time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	r := bufio.NewReader(c)
	name, err := r.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("no greeting: %w", err)
	}
	fmt.Fprintln(c, "hello")
	if line, err := r.ReadString('\n'); err != nil || line != "hello\n" {
		return "", fmt.Errorf("echo %q: %v", line, err)
	}
	return strings.TrimSpace(name), nil
}

func freeAddr(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func gateways(addrs ...netip.AddrPort) []federation.Address {
	var out []federation.Address
	for _, a := range addrs {
		out = append(out, federation.Address{Host: a.Addr().String(), Port: a.Port()})
	}
	return out
}

var payments = federation.ServiceID{Namespace: "shop", Name: "payments"}

// TestEnvoyGateways: three Envoys, configured by nothing but what the builder
// makes, carry connections from one cluster to its own plain backend, to one
// behind a gateway that terminates, and to one behind a gateway and a proxy.
func TestEnvoyGateways(t *testing.T) {
	ca := newAuthority(t)
	members := Members{Roots: ca.roots(), Clusters: []federation.ClusterID{"eu-1", "eu-2", "us-1"}}
	port := freeAddr(t).Port() // the service's, everywhere
	vip := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	eu1, eu2, us1, proxyAddr := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	workload := spiffeid.RequireFromPath(testDomain, "/cluster/us-1/ns/shop/sa/payments")

	plan := func(tiers ...federation.Tier) federation.Plan {
		return federation.Plan{
			Service: payments, Port: port, Tiers: tiers, Revision: federation.Revision{Incarnation: "t", Number: 7},
			Policy: federation.PolicyID{Origin: federation.OriginController, Namespace: "shop", Name: "order"},
		}
	}
	local := federation.Backend{Cluster: "eu-1", Share: 1000, Local: true}
	terminate := federation.Backend{Cluster: "eu-2", Share: 1000, Gateways: gateways(eu2)}
	pass := federation.Backend{Cluster: "us-1", Share: 1000, Mode: federation.Passthrough, Gateways: gateways(us1), Serves: []spiffeid.ID{workload}}
	tier := func(b ...federation.Backend) federation.Tier { return federation.Tier{Backends: b} }
	candidates := []*federation.Export{
		{Cluster: "eu-1"}, {Cluster: "eu-2"}, {Cluster: "us-1", Mode: federation.Passthrough, Serves: pass.Serves},
	}
	export := func(b *Builder, x Export) {
		x.Service = payments
		must(t, b.SetExport(x))
		must(t, b.SetMembers(members))
	}

	far := startEnvoy(t, Node{Cluster: "eu-2", Bind: eu2}, ca.issue(t, "/cluster/eu-2/gateway"), func(b *Builder) {
		export(b, Export{AllCallers: true, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Addr: echo(t, "eu-2")}}}}})
	})
	gate := startEnvoy(t, Node{Cluster: "us-1", Bind: us1}, ca.issue(t, "/cluster/us-1/gateway"), func(b *Builder) {
		export(b, Export{Mode: federation.Passthrough, AllCallers: true, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Proxy: proxyAddr}}}}})
	})
	beside := startEnvoy(t, Node{Cluster: "us-1", Kind: Proxy, Bind: proxyAddr}, ca.issue(t, workload.Path()), func(b *Builder) {
		export(b, Export{Mode: federation.Passthrough, Callers: []federation.ClusterID{"eu-1"}, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Proxy: proxyAddr, App: echo(t, "us-1")}}}}})
	})
	near := startEnvoy(t, Node{Cluster: "eu-1", Bind: eu1}, ca.issue(t, "/cluster/eu-1/gateway"), func(b *Builder) {
		export(b, Export{AllCallers: true, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Addr: echo(t, "eu-1")}}}}})
		must(t, b.SetImport(Import{Listen: vip, Plan: plan(tier(local)), Candidates: candidates}))
	})
	for _, e := range []*envoyNode{far, gate, beside, near} {
		e.settled(t)
	}
	near.listening(t, portName(importKind, payments, port), "east-west", "local")
	gate.listening(t, "east-west", "local")
	beside.listening(t, "inbound", "local")

	reach := func(want string, tiers ...federation.Tier) {
		t.Helper()
		must(t, near.SetImport(Import{Listen: vip, Plan: plan(tiers...), Candidates: candidates}))
		near.push(t)
		near.settled(t)
		eventually(t, "the call reaches "+want, func() error {
			got, err := greet(vip)
			if err == nil && got != want {
				err = fmt.Errorf("reached %s", got)
			}
			return err
		})
	}
	reach("eu-1", tier(local))
	reach("eu-2", tier(terminate))
	reach("us-1", tier(pass))
	reach("us-1", tier(pass), tier(terminate))

	// A gateway that is nobody's falls through to the next tier at once.
	dead := terminate
	dead.Gateways = gateways(freeAddr(t))
	reach("us-1", tier(dead), tier(pass))

	// The log lines at both ends tell who came, and why.
	logs := func(e *envoyNode, wants ...string) {
		t.Helper()
		eventually(t, string(e.node.Cluster)+" logs the connection", func() error {
			for _, want := range wants {
				if !strings.Contains(e.output(), want) {
					return fmt.Errorf("no %s in:\n%s", want, e.output())
				}
			}
			return nil
		})
	}
	logs(far, `"from":"eu-1"`, `"peer":"spiffe://mesh.example/cluster/eu-1/gateway"`, `"status":200`)
	logs(near, `"decision":"shop/order;tier=1;share=1000"`, `"revision":"t/7"`, `"peer":"`+workload.String()+`"`)
}

// TestEnvoyRefusesAndRecovers: a caller that may not, a resource that Envoy
// cannot take, a leaf that is replaced, and an agent that restarts.
func TestEnvoyRefusesAndRecovers(t *testing.T) {
	ca := newAuthority(t)
	members := Members{Roots: ca.roots(), Clusters: []federation.ClusterID{"eu-1", "eu-2"}}
	port := freeAddr(t).Port()
	vip := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	eu1, eu2 := freeAddr(t), freeAddr(t)
	backend, accepted := countingEcho(t, "eu-2")

	far := startEnvoy(t, Node{Cluster: "eu-2", Bind: eu2}, ca.issue(t, "/cluster/eu-2/gateway"), func(b *Builder) {
		must(t, b.SetMembers(members))
		must(t, b.SetExport(Export{Service: payments, Callers: []federation.ClusterID{"eu-3"}, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Addr: backend}}}}}))
	})
	near := startEnvoy(t, Node{Cluster: "eu-1", Bind: eu1}, ca.issue(t, "/cluster/eu-1/gateway"), func(b *Builder) {
		must(t, b.SetMembers(members))
		must(t, b.SetImport(Import{Listen: vip, Plan: federation.Plan{Service: payments, Port: port, Tiers: []federation.Tier{{
			Backends: []federation.Backend{{Cluster: "eu-2", Share: 1000, Gateways: gateways(eu2)}},
		}}}}))
	})
	far.settled(t)
	near.settled(t)
	near.listening(t, portName(importKind, payments, port))
	far.listening(t, eastWestName)

	// Not allowed: closed before the backend hears of it.
	if name, err := greet(vip); err == nil {
		t.Fatalf("a caller that may not call reached %s", name)
	}
	if n := accepted.Load(); n != 0 {
		t.Fatalf("%d connections at the backend for a caller that may not call", n)
	}
	must(t, far.SetExport(Export{Service: payments, Callers: []federation.ClusterID{"eu-1"}, Ports: []ExportPort{{Number: port, Endpoints: []Backend{{Ready: true, Addr: backend}}}}}))
	far.push(t)
	far.settled(t)
	reached := func() error { _, err := greet(vip); return err }
	eventually(t, "the caller that may now is let in", reached)

	// Among good endpoints, one that Envoy refuses: the others are taken, and
	// the server knows its name.
	var bad Name
	for n := range 5 {
		i := serviceImport(n)
		i.Listen = freeAddr(t)
		i.Plan.Port = i.Listen.Port()
		must(t, near.SetImport(i))
		bad = Name{TypeEndpoints, portName(outKind, i.Plan.Service, i.Plan.Port)}
	}
	d, err := near.Take()
	must(t, err)
	for i, r := range d.Changed {
		if r.Name == bad {
			broken := new(endpointv3.ClusterLoadAssignment) // without its cluster's name
			body, err := proto.Marshal(broken)
			must(t, err)
			d.Changed[i] = &Resource{Name: r.Name, Version: "broken", Body: body}
		}
	}
	near.set(d)
	eventually(t, "the broken endpoints alone are refused", func() error {
		s := near.server.Streams()
		if len(s) != 1 || len(s[0].Rejected) != 1 || s[0].Rejected[0].Name != bad {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	<-near.nacks
	if err := reached(); err != nil {
		t.Errorf("another service is hurt: %v", err)
	}
	mended := Delta{}
	for _, r := range near.Resources() {
		if r.Name == bad {
			mended.Changed = append(mended.Changed, r)
		}
	}
	near.set(mended)
	near.settled(t)
	near.listening(t, "imp/shop/s0", "imp/shop/s4")

	// A new leaf is in use once it is acked.
	near.source.Store(ca.issue(t, "/cluster/eu-1/gateway"))
	must(t, near.leaf.Update())
	eventually(t, "the new leaf is in use", func() error {
		if n, all := near.leaf.InUse(); n == 0 || !all {
			return fmt.Errorf("%d streams, all: %t", n, all)
		}
		return nil
	})
	must(t, reached())

	// The agent restarts: until its view is complete Envoy keeps everything, and
	// then it is sent nothing that it has.
	near.server.Drop("envoy")
	eventually(t, "envoy is back", func() error {
		if n := len(near.server.Streams()); n != 1 {
			return fmt.Errorf("%d streams", n)
		}
		return nil
	})
	must(t, reached())
	near.sent.Store(0)
	near.set(Delta{Changed: near.Resources()})
	near.settled(t)
	if n := near.sent.Load(); n != 0 {
		t.Errorf("%d resources were sent again", n)
	}
	must(t, reached())
}

// countingEcho is echo that counts its connections.
func countingEcho(t *testing.T, name string) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	var n atomic.Int64
	return echoFunc(t, name, func() { n.Add(1) }), &n
}
