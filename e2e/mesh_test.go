package e2e

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/weftmesh/weft/e2e/lab"
	"github.com/weftmesh/weft/federation/access"
)

// etcd starts one member of an external etcd, and returns its URL.
func (m *testMesh) etcd() string {
	m.t.Helper()
	client, peer := url.URL{Scheme: "http", Host: m.Addr(0, 100, 2379)}, url.URL{Scheme: "http", Host: m.Addr(0, 100, 2380)}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.LogLevel = "external", m.t.TempDir(), "error"
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	cfg.InitialClusterToken = rand.Text()
	member, err := embed.StartEtcd(cfg)
	m.check(err)
	m.t.Cleanup(member.Close)
	select {
	case <-member.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		m.t.Fatal("etcd was not ready in time")
	}
	return client.String()
}

// knows makes the CLI know these controllers, in the file of contexts at path.
func (m *testMesh) knows(path string, controllers ...string) {
	m.t.Helper()
	c, err := access.Load(m.Contexts)
	m.check(err)
	for i := range c.Contexts {
		c.Contexts[i].Controllers = controllers
	}
	m.check(c.Save(path))
}

// status is what 'weft status -o json' says.
type status struct {
	Controllers []struct {
		Name   string
		Leader bool
	}
}

func (m *testMesh) status() (s status, leader string) {
	m.t.Helper()
	out, _, err := m.Weft(m.t.Context(), "status", "-o", "json")
	if err != nil {
		return s, ""
	}
	m.check(json.Unmarshal([]byte(out), &s))
	for _, c := range s.Controllers {
		if c.Leader {
			leader = c.Name
		}
	}
	return s, leader
}

// TestEitherControllerMayDie runs two controllers over one external etcd and
// kills the one that leads.
func TestEitherControllerMayDie(t *testing.T) {
	m := newMesh(t)
	etcd := map[string]any{"etcd-endpoints": []string{m.etcd()}}
	controllers := map[string]*lab.Process{}
	for n := range 2 {
		p, err := m.Controller(t.Context(), etcd)
		m.check(err)
		controllers[fmt.Sprintf("controller-%d", n+1)] = p
	}
	first, second := m.Addr(0, 1, lab.ControllerPort), m.Addr(0, 2, lab.ControllerPort)
	m.knows(m.Contexts, first, second)
	eu1 := m.cluster(lab.ClusterSpec{Name: "eu-1"}, m.service("payments", 1, false, 10))
	eu2 := m.cluster(lab.ClusterSpec{Name: "eu-2"}, m.service("payments", 2, false, 10))
	m.backend(eu1, 10)
	m.backend(eu2, 10)
	m.follows(eu1, "payments", map[string]int{"eu-1": 1000})
	load := m.load(m.resolve(eu1, "payments"))

	var leader string
	m.eventually("both controllers are there, and one leads", func() error {
		s, who := m.status()
		if leader = who; len(s.Controllers) != 2 || leader == "" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	m.sameEverywhere(first, second)

	_, err := controllers[leader].Kill()
	m.check(err)
	m.eventually("the other one leads", func() error {
		if s, now := m.status(); now == "" || now == leader {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	m.apply(splitPolicy(map[string]int{"eu-2": 100}))
	m.follows(eu1, "payments", map[string]int{"eu-2": 1000})
	if got := load.served(50); got["eu-2"] == 0 {
		t.Errorf("served by %v after the policy", got)
	}
	m.check(controllers[leader].Start())
	m.check(controllers[leader].Ready(t.Context()))
	m.sameEverywhere(first, second)
	load.served(50)
}

// sameEverywhere compares what the controllers say of the catalog.
func (m *testMesh) sameEverywhere(controllers ...string) {
	m.t.Helper()
	for _, kind := range []string{"services", "exports", "policies"} {
		m.eventually("the controllers agree on the "+kind, func() error {
			var said []string
			for _, c := range controllers {
				file := m.Dir + "/only.yaml"
				m.knows(file, c)
				out, _, err := m.Weft(m.t.Context(), "get", kind, "-o", "json", "--contexts", file)
				if err != nil {
					return err
				}
				said = append(said, out)
			}
			if said[0] != said[1] {
				return fmt.Errorf("%s says\n%s%s says\n%s", controllers[0], said[0], controllers[1], said[1])
			}
			return nil
		})
	}
}

// TestAloneAndDeregistered: an agent that starts while the controller is dead
// serves from its last good state; one that is deregistered is refused, and its
// traffic moves.
func TestAloneAndDeregistered(t *testing.T) {
	m := newMesh(t)
	controller := m.controller()
	eu1 := m.cluster(lab.ClusterSpec{Name: "eu-1"})
	eu2 := m.cluster(lab.ClusterSpec{Name: "eu-2"}, m.service("payments", 2, false, 10))
	us1 := m.cluster(lab.ClusterSpec{Name: "us-1"}, m.service("payments", 3, false, 10))
	m.backend(eu2, 10)
	m.backend(us1, 10)
	m.follows(eu1, "payments", map[string]int{"eu-2": 1000})
	address := m.resolve(eu1, "payments")
	load := m.load(address)
	load.served(50)

	_, err := controller.Kill()
	m.check(err)
	// A stop writes the last good state; a kill loses its last moments.
	m.check(eu1.Agent.Stop(20 * time.Second))
	m.check(eu1.Agent.Start())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m.check(eu1.Agent.Ready(ctx))
	// The gateway too: it gets its configuration from this agent alone.
	load.end()
	m.check(eu1.Gateway.Stop(20 * time.Second))
	m.check(eu1.Gateway.Start())
	m.check(eu1.Gateway.Ready(ctx))
	if again := m.resolve(eu1, "payments"); again != address {
		t.Errorf("payments is at %s after the restart, was at %s", again, address)
	}
	m.eventually("a request is served without a controller", func() error { return request(t.Context(), address).err })

	m.check(controller.Start())
	m.check(controller.Ready(ctx))
	m.follows(eu1, "payments", map[string]int{"eu-2": 1000})
	load = m.load(address)
	load.served(20)
	// Trust in eu-2 ends with its registration, and cuts what is open to it: of
	// each client at most the one request that is in flight.
	cut := lab.Death{Sent: time.Now()}
	m.weft("cluster", "deregister", "eu-2")
	m.follows(eu1, "payments", map[string]int{"us-1": 1000})
	cut.Gone = time.Now()
	failed := 0
	for _, a := range load.since(0) {
		if a.err != nil {
			failed++
		}
	}
	if failed > clients {
		t.Errorf("%d requests failed, more than the %d in flight", failed, clients)
	}
	if got := load.served(50, cut); got["us-1"] == 0 {
		t.Errorf("served by %v after eu-2 was deregistered", got)
	}
	if out := m.weft("get", "exports", "-o", "name"); strings.Contains(out, "eu-2/") {
		t.Errorf("exports of a cluster that is gone: %s", out)
	}
	m.eventually("eu-2's agent says that it is refused", func() error {
		said := eu2.Agent.Tail(50)
		if !strings.Contains(said, "deregistered") {
			return errors.New(said)
		}
		return nil
	})
}

// TestDrainOnSIGTERM: a gateway that is told to end lets an open stream live
// until its end; told twice, it ends at once.
func TestDrainOnSIGTERM(t *testing.T) {
	m := newMesh(t)
	m.controller()
	eu1 := m.cluster(lab.ClusterSpec{Name: "eu-1"})
	eu2 := m.cluster(lab.ClusterSpec{Name: "eu-2"}, strings.Replace(m.service("payments", 2, false, 10), "http: {path: /healthz, port: http}", "tcp: {port: http}", 1))
	name := "backend"
	_, err := eu2.Run(name, program("weft"), "demo", "backend", "--cluster", "eu-2", "--name", name,
		"--http", eu2.Addr(11, servicePort), "--echo", eu2.Addr(10, servicePort))
	m.check(err)
	m.follows(eu1, "payments", map[string]int{"eu-2": 1000})
	address := m.resolve(eu1, "payments")

	open := func() (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", address)
		m.check(err)
		t.Cleanup(func() { c.Close() })
		m.check(c.SetDeadline(time.Now().Add(30 * time.Second)))
		r := bufio.NewReader(c)
		if greeting, err := r.ReadString('\n'); err != nil || greeting != "hello from eu-2\n" {
			t.Fatalf("greeting %q, %v", greeting, err)
		}
		return c, r
	}
	c, r := open()
	m.check(eu1.Gateway.Signal(syscall.SIGTERM))
	m.eventually("new connections are refused", func() error {
		if probe, err := net.Dial("tcp", address); err == nil {
			probe.Close()
			return errors.New("one was taken")
		}
		return nil
	})
	for n := range 10 {
		line := fmt.Sprintf("line %d\n", n)
		if _, err := c.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if got, err := r.ReadString('\n'); err != nil || got != line {
			t.Fatalf("%q came back as %q, %v", line, got, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if !eu1.Gateway.Running() {
		t.Fatal("the gateway ended before its stream")
	}
	c.Close()
	m.eventually("the gateway ends after its stream", func() error { return stillRuns(eu1.Gateway) })

	m.check(eu1.Gateway.Start())
	m.check(eu1.Gateway.Ready(t.Context()))
	// Ready is the first configuration; this service's listener may come after.
	m.eventually("the gateway listens again", func() error {
		probe, err := net.Dial("tcp", address)
		if err == nil {
			err = probe.Close()
		}
		return err
	})
	_, r = open()
	m.check(eu1.Gateway.Signal(syscall.SIGTERM))
	m.eventually("the gateway drains", func() error {
		if strings.Count(eu1.Gateway.Tail(60), `"msg":"draining"`) < 2 { // the first is of the first time
			return errors.New(eu1.Gateway.Tail(20))
		}
		return nil
	})
	// Again until it counts: two in quick succession are one.
	m.eventually("the second signal ends it", func() error {
		m.check(eu1.Gateway.Signal(syscall.SIGTERM))
		return stillRuns(eu1.Gateway)
	})
	m.says(eu1.Gateway.Tail(3), "second signal", "ending at once")
	if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the stream after the gateway's end: %v", err)
	}
}

func stillRuns(p *lab.Process) error {
	if p.Running() {
		return fmt.Errorf("%s still runs", p.Name)
	}
	return nil
}
