package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weftmesh/weft/e2e/envoytest"
	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/xds"
)

// place is where a proxy stands: what its agent would build for it, served on a
// unix socket to whichever engine takes it.
type place struct {
	*xds.Builder
	m      *mesh
	name   string
	node   xds.Node
	path   string // of its identity
	dir    string
	server *xds.Server
	rev    int64

	engine *node // the built-in one, or

	mu  sync.Mutex
	out strings.Builder // what Envoy wrote
}

const view = "place"

func (m *mesh) place(name string, n xds.Node, path string) *place {
	m.t.Helper()
	dir, err := os.MkdirTemp("", "weft-") // short, for the sockets
	m.check(err)
	m.t.Cleanup(func() { os.RemoveAll(dir) })
	n.TrustDomain, n.LocalPipe = m.td, filepath.Join(dir, "local.sock")
	b, err := xds.NewBuilder(n)
	m.check(err)
	p := &place{Builder: b, m: m, name: name, node: n, path: path, dir: dir}
	p.server = xds.NewServer(xds.ServerConfig{
		Clock: clock.Real(), Logger: slog.New(slog.DiscardHandler),
		OnNack: func(n xds.Nack) { m.t.Errorf("%s refuses %s: %s", name, n.Name, n.Cause) },
	})
	m.check(b.SetMembers(xds.Members{Roots: m.bundle.Roots(), Clusters: m.clients}))
	m.serveUnix(filepath.Join(dir, "agent.sock"), func(g *grpc.Server) {
		p.server.Register(g, func(context.Context) (xds.View, error) { return view, nil })
	})
	return p
}

func (m *mesh) serveUnix(path string, register func(*grpc.Server)) {
	m.t.Helper()
	l, err := net.Listen("unix", path)
	m.check(err)
	g := grpc.NewServer()
	register(g)
	served := make(chan struct{})
	go func() {
		defer close(served)
		g.Serve(l)
	}()
	m.t.Cleanup(func() { g.Stop(); <-served })
}

// push sends what has changed, and waits until it is in use.
func (p *place) push() {
	p.m.t.Helper()
	d, err := p.Take()
	p.m.check(err)
	p.rev++
	p.server.Set(view, federation.Revision{Incarnation: "t", Number: p.rev}, d)
	eventually(p.m.t, p.name+" takes its configuration", func() bool {
		s := p.server.Streams()
		return len(s) == 1 && s[0].InSync
	})
}

// builtIn puts this package's engine in the place.
func (p *place) builtIn() {
	p.m.t.Helper()
	p.engine = p.m.engine(p.node.Cluster, p.path, quiet)
	conn, err := grpc.NewClient("unix:"+filepath.Join(p.dir, "agent.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	p.m.check(err)
	client := xds.NewClient(xds.ClientConfig{
		Conn: conn, NodeID: p.name, NodeCluster: string(p.node.Cluster),
		Apply: p.engine.Apply, Clock: clock.Real(), Logger: slog.New(slog.DiscardHandler),
	})
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		client.Run(ctx)
	}()
	p.m.t.Cleanup(func() { stop(); <-ran; conn.Close() })
}

// envoy puts an unmodified Envoy there, that is told nothing but a bootstrap.
func (p *place) envoy() {
	t := p.m.t
	t.Helper()
	binary := envoytest.Binary(t)
	leaf := xds.NewLeafServer(p.m.svid(p.path), clock.Real(), slog.New(slog.DiscardHandler))
	p.m.check(leaf.Update())
	p.m.serveUnix(filepath.Join(p.dir, "leaf.sock"), func(g *grpc.Server) { leaf.Register(g) })
	boot, err := xds.Bootstrap{
		NodeID: p.name, NodeCluster: string(p.node.Cluster), AgentPipe: filepath.Join(p.dir, "agent.sock"),
		LeafPipe: filepath.Join(p.dir, "leaf.sock"), AdminPipe: filepath.Join(p.dir, "admin.sock"),
	}.Marshal()
	p.m.check(err)
	file := filepath.Join(p.dir, "boot.json")
	p.m.check(os.WriteFile(file, boot, 0o600))
	cmd := exec.Command(binary, "--config-path", file, "--disable-hot-restart", "--concurrency", "1", "-l", "warning", "--file-flush-interval-msec", "100")
	cmd.Stdout, cmd.Stderr = writer(p.write), writer(p.write)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.m.check(cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s:\n%s", p.name, p.wrote())
		}
	})
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

func (p *place) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *place) wrote() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// saw waits until the place has recorded a connection whose peer was that one.
func (p *place) saw(peer string) {
	p.m.t.Helper()
	if p.engine != nil {
		p.engine.record(p.name+" records the peer "+peer, func(r Record) bool { return r.Peer == peer && r.Connected })
		return
	}
	eventually(p.m.t, p.name+" records the peer "+peer, func() bool {
		return strings.Contains(p.wrote(), `"peer":"`+peer+`"`)
	})
}

// TestEnginesInEachOthersPlaces runs one mesh three times: all places taken by
// this engine, the source by this one and the far sides by Envoy, and the other
// way round. A service has two remotes of different modes, in one tier; then one
// of them dies.
func TestEnginesInEachOthersPlaces(t *testing.T) {
	type take func(*place)
	builtIn, envoy := (*place).builtIn, (*place).envoy
	for name, c := range map[string]struct{ near, far take }{
		"built-in to built-in": {builtIn, builtIn},
		"built-in to envoy":    {builtIn, envoy},
		"envoy to built-in":    {envoy, builtIn},
	} {
		t.Run(name, func(t *testing.T) { playPlaces(t, c.near, c.far) })
	}
}

func playPlaces(t *testing.T, takeNear, takeFar func(*place)) {
	m := newMesh(t)
	service := serviceID()
	workload := spiffeid.RequireFromPath(m.td, "/cluster/c/ns/shop/sa/payments")
	vip, bAddr, cAddr, proxyAddr := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	port := vip.Port()

	b := m.place("b", xds.Node{Cluster: "b", Bind: bAddr}, gatewayPath("b"))
	m.check(b.SetExport(xds.Export{Service: service, AllCallers: true, Ports: []xds.ExportPort{{Number: port, Endpoints: []xds.Backend{{Ready: true, Addr: greeter(t, "b").addr}}}}}))
	c := m.place("c", xds.Node{Cluster: "c", Bind: cAddr}, gatewayPath("c"))
	m.check(c.SetExport(xds.Export{Service: service, Mode: federation.Passthrough, AllCallers: true, Ports: []xds.ExportPort{{Number: port, Endpoints: []xds.Backend{{Ready: true, Proxy: proxyAddr}}}}}))
	proxy := m.place("proxy", xds.Node{Cluster: "c", Kind: xds.Proxy, Bind: proxyAddr}, workload.Path())
	m.check(proxy.SetExport(xds.Export{Service: service, Mode: federation.Passthrough, AllCallers: true, Ports: []xds.ExportPort{{Number: port, Endpoints: []xds.Backend{{Ready: true, Proxy: proxyAddr, App: greeter(t, "c").addr}}}}}))

	address := func(a netip.AddrPort) []federation.Address {
		return []federation.Address{{Host: a.Addr().String(), Port: a.Port()}}
	}
	plan := federation.Plan{
		Service: service, Port: port, Revision: federation.Revision{Incarnation: "t", Number: 7},
		Tiers: []federation.Tier{{Backends: []federation.Backend{
			{Cluster: "b", Share: 700, Gateways: address(bAddr)},
			{Cluster: "c", Share: 300, Mode: federation.Passthrough, Gateways: address(cAddr), Serves: []spiffeid.ID{workload}},
		}}},
	}
	a := m.place("a", xds.Node{Cluster: "a"}, gatewayPath("a"))
	m.check(a.SetImport(xds.Import{Listen: vip, Plan: plan, Candidates: []*federation.Export{
		{Cluster: "b"}, {Cluster: "c", Mode: federation.Passthrough, Serves: []spiffeid.ID{workload}},
	}}))
	for _, far := range []*place{b, c, proxy} {
		takeFar(far)
		far.push()
	}
	takeNear(a)
	a.push()
	eventually(t, "the import listens", func() bool { _, err := ask(t, vip); return err == nil })

	got := map[string]int{}
	for range 100 {
		who, err := chat(vip)
		if err != nil {
			t.Fatalf("a request: %v", err)
		}
		got[who]++
	}
	// One connection went to see whether it listens, so the window may be off by
	// one at its edges.
	if got["b"] < 69 || got["b"] > 71 || got["b"]+got["c"] != 100 {
		t.Errorf("shares %v, want 70 and 30", got)
	}
	a.saw(m.id(gatewayPath("b")))
	a.saw(workload.String())
	b.saw(m.id(gatewayPath("a")))
	proxy.saw(m.id(gatewayPath("a")))

	// b's service dies: its gateway answers, and has nobody.
	m.check(b.SetExport(xds.Export{Service: service, AllCallers: true, Ports: []xds.ExportPort{{Number: port}}}))
	b.push()
	for i := range 40 {
		if who, err := chat(vip); err != nil || who != "c" {
			t.Fatalf("request %d after b's end: %q, %v", i, who, err)
		}
	}
}

// chat is one connection on which both sides say something.
func chat(addr netip.AddrPort) (who string, err error) {
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if who, err = line(c); err != nil {
		return "", fmt.Errorf("no greeting: %w", err)
	}
	io.WriteString(c, "hello\n")
	if got, err := line(c); err != nil || got != "hello" {
		return "", errors.Join(fmt.Errorf("echo %q", got), err)
	}
	return who, nil
}

// TestOneDeadWorkloadBehindAGateway: of two proxies behind one gateway, one has
// lost its workload. Every connection ends at the other; the gateway is not
// passed over for the next cluster.
func TestOneDeadWorkloadBehindAGateway(t *testing.T) {
	m := newMesh(t)
	const workload = "/cluster/b/ns/shop/sa/payments"
	name := xds.PassthroughName("b", serviceID(), 80)
	proxy := func(endpoint netip.AddrPort) *node {
		p := m.engine("b", workload)
		p.addr = freeAddr(t)
		p.config.Listeners["inbound"] = &xds.Listener{
			Name: "inbound", Kind: xds.InboundListener, Addr: p.addr,
			Chains: []*xds.Chain{{Name: name, ServerNames: []string{name}, ALPN: []string{xds.ALPN}, Terminate: terminate("inbound")}},
		}
		p.config.Routes["inbound"] = &xds.RouteTable{
			Name: "inbound", Peers: []xds.Peer{{SAN: xds.Match{Exact: m.id(gatewayPath("a"))}}},
			Routes: map[string]*xds.Route{payments: {Authority: payments, Cluster: "in", Attempts: 1}},
		}
		p.config.Clusters["in"] = ownCluster("in", endpoint)
		return p.start()
	}
	dying := greeter(t, "dying")
	one, two := proxy(dying.addr), proxy(greeter(t, "living").addr)

	b := m.gateway("b")
	b.config.Clusters["pass"] = ownCluster("pass", one.addr, two.addr)
	l := b.config.Listeners["east-west"]
	l.Chains = append(l.Chains, &xds.Chain{Name: name, ServerNames: []string{name}, ALPN: []string{xds.ALPN}, Passthrough: &xds.Forward{Cluster: "pass", Attempts: 3}})
	b.start()
	c := m.gateway("c").serves(payments, greeter(t, "next cluster").addr).start()

	a := m.gateway("a")
	addr := a.imports(payments,
		backendOf{cluster: "b", addrs: []netip.AddrPort{b.addr}, share: 1000, sni: name, server: m.id(workload)}, to(c, 1, 1000))
	a.start()
	for i := range 20 {
		if i == 5 {
			dying.l.Close()
		}
		who, err := ask(t, addr)
		if err != nil || who == "next cluster" || i >= 5 && who != "living" {
			t.Fatalf("connection %d: %q, %v", i, who, err)
		}
	}
}
