package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// badFile is a file of the cluster's folder that is wrong, and what 'weft
// check' says of it.
type badFile struct {
	name, text string
	words      []string
}

// orders is a service beside payments; the replacements make it wrong.
func orders(m *testMesh, replace ...string) string {
	return strings.NewReplacer(replace...).Replace(m.service("orders", 2, false, 12))
}

func badFiles(m *testMesh) []badFile {
	return []badFile{
		{"malformed YAML", "apiVersion: weft.dev/v1\nkind: [Service\n", []string{"bad.yaml", "line"}},
		{"huge YAML", orders(m) + "#" + strings.Repeat(" weft", 2<<20/5), []string{"bad.yaml", "1048576"}},
		{"an unknown field", orders(m, "export: true", "exports: true"), []string{"bad.yaml", "exports", "export"}},
		{"a service twice", m.service("payments", 2, false, 13), []string{"shop/payments", "bad.yaml", "services.yaml"}},
		{"a port out of range", orders(m, "port: 8080", "port: 80800"), []string{"bad.yaml", "80800", "65535"}},
		{"a service outside the grant", orders(m, "namespace: shop", "namespace: bank"), []string{"bank/orders", "grant", "weft cluster grant"}},
	}
}

// TestBadInput gives a running mesh what it must not take, one thing after the
// other. Each is told to the person who can mend it, and the service beside it
// goes on serving all the time.
func TestBadInput(t *testing.T) {
	m := newMesh(t)
	controller := m.controller()
	eu1 := m.cluster(lab.ClusterSpec{Name: "eu-1"})
	eu2 := m.cluster(lab.ClusterSpec{Name: "eu-2"}, m.service("payments", 2, false, 10))
	m.backend(eu2, 10)
	m.follows(eu1, "payments", map[string]int{"eu-2": 1000})
	load := m.load(m.resolve(eu1, "payments"))
	// goesOn: whatever was just done, requests of before and after are served.
	goesOn := func(t *testing.T) {
		t.Helper()
		inTest := *m
		inTest.t = t
		(&traffic{m: &inTest, stop: load.stop}).watch(load, 20)
	}
	sub := func(name string, do func(*testMesh)) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			inTest := *m
			inTest.t = t
			do(&inTest)
			goesOn(t)
		})
	}

	const shortLife = 10 * time.Second
	lateToken, lateHash := m.token("eu-7", "--token-ttl", shortLife.String())
	tokenMade := time.Now()

	for _, f := range badFiles(m) {
		sub(f.name, func(m *testMesh) {
			m.check(eu2.Write("zz-bad.yaml", f.text))
			m.finds(f.words...)
			m.check(os.Remove(filepath.Join(eu2.Source, "zz-bad.yaml")))
			m.findsNothing()
		})
	}
	sub("an emptied folder", func(m *testMesh) {
		kept := filepath.Join(m.Dir, "kept.yaml")
		m.check(os.Rename(filepath.Join(eu2.Source, "services.yaml"), kept))
		m.finds(eu2.Source, "no services in it", ".weft-empty")
		m.check(os.Rename(kept, filepath.Join(eu2.Source, "services.yaml")))
		m.findsNothing()
	})
	sub("an unreadable folder", func(m *testMesh) {
		m.check(os.Rename(eu2.Source, eu2.Source+".away"))
		m.check(os.WriteFile(eu2.Source, []byte("no folder"), 0o600))
		m.finds(eu2.Source, "not a directory")
		m.check(os.Remove(eu2.Source))
		m.check(os.Rename(eu2.Source+".away", eu2.Source))
		m.findsNothing()
	})
	sub("a gateway address outside the registration", func(m *testMesh) {
		elsewhere := m.Addr(9, 9, lab.GatewayPort)
		m.cluster(lab.ClusterSpec{Name: "eu-3", Agent: map[string]any{"gateway-address": []string{elsewhere}}}, m.service("payments", 3, false, 10))
		m.finds("eu-3", elsewhere, "regist")
		m.weft("cluster", "deregister", "eu-3")
	})

	// What a new agent is told, that may not come in.
	sub("a used token", func(m *testMesh) {
		token, hash := m.token("eu-4")
		first := m.agent("eu-4", token, hash)
		m.check(first.start())
		m.eventually("the first use enrols", func() error {
			if !strings.Contains(first.said(), `msg=enrolled`) {
				return errors.New(first.said())
			}
			return nil
		})
		m.check(first.end())
		m.says(m.agent("eu-4", token, hash).fails(), "join token", "weft cluster token")
	})
	sub("a wrong CA hash", func(m *testMesh) {
		token, _ := m.token("eu-5")
		m.says(m.agent("eu-5", token, "sha256:"+strings.Repeat("ab", 32)).fails(), "--ca-hash", m.Addr(0, 1, lab.ControllerPort))
	})
	sub("a token that is none", func(m *testMesh) {
		_, hash := m.token("eu-6")
		m.says(m.agent("eu-6", "let-me-in", hash).fails(), "--join", "token")
	})

	// What arrives at a gateway's port.
	sub("an unknown name", func(m *testMesh) {
		for _, name := range []string{"eu-9.t.weft", "8080.orders.shop.eu-2.p.weft", "example.org", ""} {
			c, err := net.Dial("tcp", eu2.GatewayAddr())
			m.check(err)
			err = tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{"weft/1"}}).Handshake()
			if err == nil {
				m.t.Errorf("a handshake for %q came about", name)
			}
			c.Close()
		}
		m.counts(eu2.Gateway, `weft_gateway_unadmitted_total`)
	})
	sub("plain bytes", func(m *testMesh) {
		c, err := net.Dial("tcp", eu2.GatewayAddr())
		m.check(err)
		defer c.Close()
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: payments\r\n\r\n")
		m.check(c.SetDeadline(time.Now().Add(20 * time.Second)))
		if answer, err := io.ReadAll(c); len(answer) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			m.t.Errorf("plain bytes got %q, %v", answer, err)
		}
	})
	sub("silence", func(m *testMesh) {
		c, err := net.Dial("tcp", eu2.GatewayAddr())
		m.check(err)
		defer c.Close()
		m.check(c.SetDeadline(time.Now().Add(20 * time.Second)))
		if answer, err := io.ReadAll(c); len(answer) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			m.t.Errorf("silence got %q, %v", answer, err)
		}
	})
	sub("an unknown service", func(m *testMesh) {
		m.says(m.refused("call", "shop/nothing", "--from", "eu-1"), "shop/nothing", "eu-1", "no cluster exports it")
	})

	// What a program is started with.
	sub("a busy port", func(m *testMesh) {
		busy := controller.Admin
		agent := m.agent("eu-1", "", "")
		agent.Args = append(agent.Args, "--admin", busy)
		m.says(agent.fails(), busy, "--admin", "another process")
		settings := []string{
			"--name", "other", "--trust-domain", m.TrustDomain, "--region", "home", "--data-dir", t.TempDir(),
			"--kek-file", filepath.Join(t.TempDir(), "kek"), "--admin-credential", filepath.Join(t.TempDir(), "contexts.yaml"),
			"--admin", m.Addr(0, 7, lab.AdminPort), "--advertise", m.Addr(0, 1, lab.ControllerPort),
		}
		m.says(m.command("weft-controller", append(settings, "--listen", m.Addr(0, 1, lab.ControllerPort))...).fails(),
			m.Addr(0, 1, lab.ControllerPort), "--listen", "another process")
	})
	sub("a wrong etcd endpoint", func(m *testMesh) {
		c := m.command("weft-controller", "--name", "other", "--trust-domain", m.TrustDomain, "--region", "home",
			"--kek-file", filepath.Join(t.TempDir(), "kek"), "--admin-credential", filepath.Join(t.TempDir(), "contexts.yaml"),
			"--admin", m.Addr(0, 8, lab.AdminPort), "--listen", m.Addr(0, 8, lab.ControllerPort), "--advertise", m.Addr(0, 8, lab.ControllerPort),
			"--etcd-endpoints", "http://"+m.Addr(0, 9, 2379))
		m.check(c.start())
		m.eventually("the controller names the endpoint", func() error {
			for _, w := range []string{m.Addr(0, 9, 2379), "etcd"} {
				if !strings.Contains(c.said(), w) {
					return errors.New(c.said())
				}
			}
			return nil
		})
		m.check(c.end())
	})
	sub("an expired token", func(m *testMesh) {
		// etcd's lease ends it within a second or two of its time.
		time.Sleep(time.Until(tokenMade.Add(shortLife + 3*time.Second)))
		m.says(m.agent("eu-7", lateToken, lateHash).fails(), "join token", "expired", "weft cluster token")
	})
	load.unharmed()
}

// watch waits until n more of another traffic's requests have ended well.
func (tr *traffic) watch(of *traffic, n int) {
	tr.m.t.Helper()
	from := len(of.since(0))
	tr.m.eventually("requests are served", func() error {
		if got := len(of.since(from)); got < n {
			return fmt.Errorf("%d of %d ended", got, n)
		}
		return nil
	})
	for _, a := range of.since(from) {
		if a.err != nil {
			tr.m.t.Fatalf("a request failed at %s: %v", a.began.Format("15:04:05.000"), a.err)
		}
	}
}

// finds waits until 'weft check' says all the words in one go.
func (m *testMesh) finds(words ...string) {
	m.t.Helper()
	m.eventually("weft check finds it", func() error {
		out, said, _ := m.Weft(m.t.Context(), "check", "--all")
		for _, w := range words {
			if !strings.Contains(strings.ToLower(out), strings.ToLower(w)) {
				return fmt.Errorf("no %q in\n%s%s", w, out, said)
			}
		}
		return nil
	})
}

// findsNothing waits until nothing is wrong with eu-2 any more.
func (m *testMesh) findsNothing() {
	m.t.Helper()
	m.eventually("the findings of eu-2 go", func() error {
		var list struct {
			Items []struct{ ReportedBy, Code, Message string }
		}
		m.check(json.Unmarshal([]byte(m.weft("get", "findings", "-o", "json")), &list))
		for _, f := range list.Items {
			if strings.Contains(f.ReportedBy+f.Message, "eu-2") {
				return fmt.Errorf("%+v", f)
			}
		}
		return nil
	})
}

// token registers a cluster and returns what its agent needs to join.
func (m *testMesh) token(cluster string, args ...string) (token, caHash string) {
	m.t.Helper()
	var r struct {
		Token struct{ Token, CaHash string }
	}
	args = append([]string{
		"cluster", "register", cluster, "--region", "eu", "--grant", "shop/*",
		"--gateway", m.Addr(7, 1, lab.GatewayPort), "-o", "json",
	}, args...)
	m.check(json.Unmarshal([]byte(m.weft(args...)), &r))
	return r.Token.Token, r.Token.CaHash
}

// command is one program with what it prints.
type command struct {
	*exec.Cmd
	m   *testMesh
	log string
}

func (m *testMesh) command(name string, args ...string) *command {
	m.t.Helper()
	// Ended at last when the test is: nothing that it starts stays behind.
	c := &command{Cmd: exec.CommandContext(m.t.Context(), program(name), args...), m: m, log: filepath.Join(m.t.TempDir(), name+".log")}
	f, err := os.Create(c.log)
	m.check(err)
	m.t.Cleanup(func() { f.Close() })
	c.Stdout, c.Stderr = f, f
	c.Env = append(os.Environ(), "WEFT_CONTEXTS="+m.Contexts)
	return c
}

// agent is an agent with a state folder of its own.
func (m *testMesh) agent(cluster, token, hash string) *command {
	dir := m.t.TempDir()
	return m.command("weft-agent", "--controller", m.Addr(0, 1, lab.ControllerPort), "--join", token, "--ca-hash", hash,
		"--state-dir", dir, "--source", dir, "--admin", m.Addr(8, 1, lab.AdminPort))
}

func (c *command) start() error { return c.Start() }

func (c *command) said() string {
	data, err := os.ReadFile(c.log)
	c.m.check(err)
	return string(data)
}

func (c *command) end() error {
	err := c.Process.Kill()
	_ = c.Wait() // killed
	return err
}

// fails runs the command, which must end by itself with an error, and returns
// what it said.
func (c *command) fails() string {
	c.m.t.Helper()
	c.m.check(c.start())
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	ctx, cancel := context.WithTimeout(c.m.t.Context(), 20*time.Second)
	defer cancel()
	select {
	case err := <-ended:
		if err == nil {
			c.m.t.Errorf("%s ended well:\n%s", c.Path, c.said())
		}
	case <-ctx.Done():
		_ = c.Process.Kill()
		<-ended
		c.m.t.Errorf("%s goes on:\n%s", c.Path, c.said())
	}
	return c.said()
}

// counts checks that a process has counted something under the metric.
func (m *testMesh) counts(p *lab.Process, metric string) {
	m.t.Helper()
	text, err := p.Metrics(m.t.Context())
	m.check(err)
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, metric) && !strings.HasSuffix(strings.TrimSpace(line), " 0") {
			return
		}
	}
	m.t.Errorf("%s has counted nothing as %s", p.Name, metric)
}
