package agent

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// plan is the one in force for a service port, as the cluster's own callers get
// it; empty while nothing is in force.
func (r *running) plan(s federation.ServiceID, port uint16) federation.Plan {
	force := r.inForce.Load()
	if force == nil {
		return federation.Plan{}
	}
	return force.catalog.PlanPort(s, port, federation.Caller{Cluster: r.who.Cluster, Zone: "eu-a"}, force.world)
}

// first are the clusters of the first tier.
func (r *running) first(s federation.ServiceID) string {
	p := r.plan(s, 80)
	var names []string
	if len(p.Tiers) > 0 {
		for _, b := range p.Tiers[0].Backends {
			names = append(names, string(b.Cluster))
		}
	}
	return strings.Join(names, ",")
}

func ask(t *testing.T, at net.Addr, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	r, _, err := (&dns.Client{Net: network, Timeout: 5 * time.Second}).Exchange(m, at.String())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// From a join token to traffic: the agent enrols, reports its own service, takes
// the others', names them by DNS, and does all of it again after a restart with
// no controller there.
func TestFromTokenToTrafficAndBack(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	c := h.config(t)
	write(t, c, "payments.yaml", serviceYAML("payments", "127.0.0.1:8081", "127.0.0.1:8082"))
	a := start(t, c)

	eventually(t, "the own export is reported", func() bool {
		return h.record("export/eu-1/shop/payments") != nil && h.record("ready/eu-1/shop/payments").GetReadiness().GetReady() == 2
	})
	eventually(t, "the own cluster serves", func() bool { return a.first(payments) == "eu-1" })
	if p := a.plan(payments, 80); len(p.Tiers) != 2 || p.Tiers[1].Backends[0].Cluster != "eu-2" {
		t.Fatalf("no fallback to eu-2: %+v", p.Tiers)
	}
	vip := func() string {
		m := ask(t, a.DNSAddr(), "udp", "payments.shop.svc.clusterset.local.", dns.TypeA)
		if len(m.Answer) != 1 {
			return ""
		}
		return m.Answer[0].(*dns.A).A.String()
	}
	eventually(t, "DNS knows the service", func() bool { return vip() == "127.9.0.1" })
	if h.enrolments != 1 {
		t.Fatalf("%d enrolments", h.enrolments)
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Sockets[0].Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}

	h.stop()
	a = start(t, c)
	if a.first(payments) != "eu-1" {
		t.Fatalf("without a controller the restarted agent plans %+v", a.plan(payments, 80))
	}
	if vip() != "127.9.0.1" {
		t.Fatal("without a controller the restarted agent knows no address")
	}

	// The controller comes back, and the agent finds it without enrolling anew.
	h.restart()
	eventually(t, "the agent returns", h.connected)
	h.put(federationv1.ReadinessRecord(federation.ExportID{Cluster: "eu-2", Service: payments}, federation.Readiness{Ready: 0, Total: 2}))
	eventually(t, "changes arrive again", func() bool {
		p := a.plan(payments, 80)
		return len(p.Tiers) == 1
	})
	if h.enrolments != 1 {
		t.Errorf("%d enrolments", h.enrolments)
	}
}

// A proxy's identity is that of its socket, whatever it says.
func TestIdentityComesFromTheSocket(t *testing.T) {
	h := newHub(t, "eu-1")
	c := h.config(t)
	c.Sockets = append(c.Sockets, Socket{Path: filepath.Join(filepath.Dir(c.Sockets[0].Path), "p.sock"), Identity: "ns/shop/sa/payments"})
	a := start(t, c)
	eventually(t, "a session", h.connected)

	for path, want := range map[string]string{
		c.Sockets[0].Path: "spiffe://weft.test/cluster/eu-1/gateway",
		c.Sockets[1].Path: "spiffe://weft.test/cluster/eu-1/ns/shop/sa/payments",
	} {
		conn := dialSocket(t, path)
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		csr, err := identity.NewCSR(key)
		if err != nil {
			t.Fatal(err)
		}
		var r *federationv1.LocalIssueResponse
		eventually(t, "an SVID", func() bool {
			r, err = federationv1.NewLocalClient(conn).Issue(context.Background(), &federationv1.LocalIssueRequest{Csr: csr})
			return err == nil
		})
		if got := r.GetChain().GetSpiffeId(); got != want {
			t.Errorf("%s stands for %s, want %s", path, got, want)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
	}

	// Without a controller a new SVID has to wait, and the error says so.
	h.stop()
	eventually(t, "the agent has noticed", func() bool { _, err := a.link.connection(); return err != nil })
	conn := dialSocket(t, c.Sockets[0].Path)
	_, err := federationv1.NewLocalClient(conn).Issue(context.Background(), &federationv1.LocalIssueRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has to wait") {
		t.Errorf("Issue without a controller: %v", err)
	}
}

func dialSocket(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// What no waiting mends ends the agent at once, and says what to do.
func TestHopelessStarts(t *testing.T) {
	h := newHub(t, "eu-1")
	other := newHub(t, "eu-1")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"a wrong CA hash":        {func(c *Config) { c.CAHash = identity.PinOf(other.root.Certificate()) }, "--ca-hash"},
		"a token of nobody":      {func(c *Config) { c.Join, _ = identity.NewJoinToken("eu-1") }, "refused the join token"},
		"no token, no state":     {func(c *Config) { c.Join = identity.JoinToken{} }, "--join TOKEN"},
		"a token without a hash": {func(c *Config) { c.CAHash = identity.Pin{} }, "--ca-hash"},
		"no controller":          {func(c *Config) { c.Controllers = nil }, "--controller"},
		"a busy DNS port":        {func(c *Config) { c.DNSListen = busy.Addr().String() }, "--dns-listen"},
		"a socket's path too long": {func(c *Config) {
			c.Sockets[0].Path = filepath.Join(c.StateDir, strings.Repeat("x", 110))
			c.Sockets[0].LocalPipe = c.Sockets[0].Path[:50]
		}, "choose a shorter folder"},
		"a file in the socket's place": {func(c *Config) {
			if err := os.WriteFile(c.Sockets[0].Path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "no socket is in its place"},
	} {
		t.Run(name, func(t *testing.T) {
			c := h.config(t)
			tt.change(&c)
			a, err := tryStart(t, c)
			if err == nil {
				_ = a.stop()
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v\ndoes not say %q", err, tt.want)
			}
			if strings.Contains(err.Error(), c.Join.Reveal()) && !c.Join.IsZero() {
				t.Error("the error shows the token")
			}
		})
	}
}

// One state folder belongs to one agent, and one socket to one process; what a
// crash left behind is taken over.
func TestFoldersAndSocketsHaveOneOwner(t *testing.T) {
	h := newHub(t, "eu-1")
	c := h.config(t)
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Sockets[0].Path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close() // the file of a process that is gone
	start(t, c)

	if _, err := tryStart(t, c); err == nil || !strings.Contains(err.Error(), "another agent uses it") {
		t.Errorf("a second agent in the same folder: %v", err)
	}
	second := h.config(t)
	second.Sockets = c.Sockets
	// The token has been used by another key.
	if _, err := tryStart(t, second); err == nil || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a second agent on the same socket: %v", err)
	}
}
