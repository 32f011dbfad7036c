package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/weftmesh/weft/e2e/envoytest"
	"github.com/weftmesh/weft/e2e/lab"
)

// TestEnvoyInAGatewaysPlace runs one mesh twice: an unmodified Envoy at the far
// side, then at the near one, and the built-in engine opposite. A service has
// two remotes of different modes; then the backends of one of them die.
func TestEnvoyInAGatewaysPlace(t *testing.T) {
	envoy := envoytest.Binary(t)
	for name, c := range map[string]struct{ near, far string }{
		"built-in to Envoy": {far: envoy},
		"Envoy to built-in": {near: envoy},
	} {
		t.Run(name, func(t *testing.T) { playEnvoy(t, c.near, c.far) })
	}
}

func playEnvoy(t *testing.T, near, far string) {
	m := newMesh(t)
	m.controller()
	eu1 := m.cluster(lab.ClusterSpec{Name: "eu-1", Envoy: near})
	eu2 := m.cluster(lab.ClusterSpec{Name: "eu-2", Envoy: far}, m.service("payments", 2, false, 10, 11))
	us1 := m.cluster(lab.ClusterSpec{Name: "us-1", Envoy: far, Proxies: []lab.ProxySpec{
		{Name: "proxy-1", ServiceAccount: "shop/payments", Listen: m.Addr(3, 20, lab.GatewayPort)},
	}}, m.service("payments", 3, true, 10))
	doomed := []*lab.Process{m.backend(eu2, 10), m.backend(eu2, 11)}
	m.backend(us1, 10)
	m.apply(splitPolicy(map[string]int{"eu-2": 50, "us-1": 50}))
	m.follows(eu1, "payments", map[string]int{"eu-2": 500, "us-1": 500})

	address := m.resolve(eu1, "payments")
	load := m.load(address)
	if got := load.served(100); got["eu-2"] < 30 || got["us-1"] < 30 {
		t.Errorf("served by %v, want about half each", got)
	}

	// Who met whom, as each end's own log has it.
	gateway := func(c *lab.Cluster) string { return "spiffe://" + m.TrustDomain + "/cluster/" + c.Name + "/gateway" }
	workload := "spiffe://" + m.TrustDomain + "/cluster/us-1/ns/shop/sa/payments"
	m.met(accessLog(eu1), gateway(eu2), workload)
	m.met(accessLog(eu2), gateway(eu1))
	m.met(us1.Proxies["proxy-1"].Log(), gateway(eu1))

	for _, c := range []*lab.Cluster{eu1, eu2, us1} {
		if c.Envoy != nil {
			m.listens(c)
		}
	}

	deaths := m.killAll(doomed...)
	m.follows(eu1, "payments", map[string]int{"us-1": 1000})
	if got := load.served(100, deaths...); got["eu-2"] > 0 {
		t.Errorf("served by %v although eu-2's backends are dead", got)
	}
	m.unrefused(eu1, eu2, us1)
}

// accessLog is the file with the access lines of the cluster's gateway: what
// the built-in engine writes, or what Envoy prints.
func accessLog(c *lab.Cluster) string {
	if c.Envoy != nil {
		return c.Envoy.Log()
	}
	return c.AccessLog()
}

// met waits until an access log has connections with these peers, and fails if
// it has one with any other.
func (m *testMesh) met(file string, want ...string) {
	m.t.Helper()
	m.eventually(fmt.Sprintf("%s tells of %v", file, want), func() error {
		seen := m.peers(file)
		for _, peer := range want {
			if seen[peer] == 0 {
				return fmt.Errorf("no connection with %s among %v", peer, seen)
			}
			delete(seen, peer)
		}
		if len(seen) > 0 {
			m.t.Fatalf("%s tells of others than %v: %v", file, want, seen)
		}
		return nil
	})
}

// peers counts the peers in an access log.
func (m *testMesh) peers(file string) map[string]int {
	m.t.Helper()
	data, err := os.ReadFile(file)
	m.check(err)
	seen := map[string]int{}
	for line := range strings.Lines(string(data)) {
		var entry struct {
			Peer   string
			Access struct{ Peer string }
		}
		if !strings.HasSuffix(line, "\n") || !strings.HasPrefix(line, "{") {
			continue // not whole yet, or no access line
		}
		m.check(json.Unmarshal([]byte(line), &entry))
		if peer := entry.Peer + entry.Access.Peer; peer != "" {
			seen[peer]++
		}
	}
	return seen
}

// listens checks that Envoy took its listeners: each is up, and none has an
// error or waits for something.
func (m *testMesh) listens(c *lab.Cluster) {
	m.t.Helper()
	up, err := c.EnvoyAdmin(m.t.Context(), "/listeners")
	m.check(err)
	want := []string{"east-west::" + c.GatewayAddr(), "imp/shop/payments/8080::"}
	for _, w := range want {
		if !strings.Contains(up, w) {
			m.t.Errorf("%s: Envoy's listeners lack %s:\n%s", c.Name, w, up)
		}
	}
	dump, err := c.EnvoyAdmin(m.t.Context(), "/config_dump?resource=dynamic_listeners")
	m.check(err)
	if strings.Contains(dump, "error_state") || strings.Contains(dump, "warming_state") {
		m.t.Errorf("%s: a listener of Envoy's is not in use:\n%s", c.Name, dump)
	}
	stats, err := c.EnvoyAdmin(m.t.Context(), "/stats?filter=update_rejected")
	m.check(err)
	for line := range strings.Lines(stats) {
		if !strings.HasSuffix(strings.TrimSpace(line), ": 0") {
			m.t.Errorf("%s: Envoy refused something: %s", c.Name, line)
		}
	}
}

// unrefused waits until the agents have told of the gateways, under the engine
// that runs there, and checks that none has refused anything it was sent.
func (m *testMesh) unrefused(clusters ...*lab.Cluster) {
	m.t.Helper()
	for _, c := range clusters {
		engine := "built-in"
		if c.Envoy != nil {
			engine = "external"
		}
		m.eventually("the status of the gateway of "+c.Name, func() error {
			var list struct {
				Items []struct{ Name, Role, Engine, Nack string }
			}
			m.check(json.Unmarshal([]byte(m.weft("get", "gateways", "--cluster", c.Name, "-o", "json")), &list))
			for _, g := range list.Items {
				if g.Nack != "" {
					m.t.Fatalf("%s has refused something: %s", g.Name, g.Nack)
				}
				if g.Role == "gateway" && g.Engine == engine {
					return nil
				}
			}
			return fmt.Errorf("no gateway with engine %s in %+v", engine, list.Items)
		})
	}
}
