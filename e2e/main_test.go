// Package e2e tests Weft as people run it: the real programs, as processes of
// their own, in meshes of several clusters on one machine.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// binariesEnv names the folder of the programs under test. TestMain builds
// them into one of its own unless it is set.
const binariesEnv = "WEFT_TEST_BINARIES"

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Getenv(binariesEnv) != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "weft-programs-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "../cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		return 1
	}
	if err := os.Setenv(binariesEnv, dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func program(name string) string { return filepath.Join(os.Getenv(binariesEnv), name) }

// testMesh is a lab under test.
type testMesh struct {
	*lab.Lab
	t *testing.T
}

// newMesh makes a lab that ends with the test. When the test failed it shows
// what the processes said last.
func newMesh(t *testing.T) *testMesh {
	t.Helper()
	l, err := lab.New(t.Context(), lab.Options{Binaries: os.Getenv(binariesEnv)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range l.Processes() {
				if words := lastWords(p); words != "" {
					t.Logf("%s:\n%s", p.Name, words)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return &testMesh{l, t}
}

// lastWords are the last lines that a process printed, but for those about
// single connections.
func lastWords(p *lab.Process) string {
	var lines []string
	for line := range strings.Lines(p.Tail(1000)) {
		if !strings.Contains(line, `"bytesIn":`) && !strings.Contains(line, `"bytesSent":`) {
			lines = append(lines, line)
		}
	}
	return strings.TrimSpace(strings.Join(lines[max(0, len(lines)-6):], ""))
}

func (m *testMesh) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// weft runs the CLI, which must succeed.
func (m *testMesh) weft(args ...string) string {
	m.t.Helper()
	out, _, err := m.Weft(m.t.Context(), args...)
	m.check(err)
	return out
}

// refused runs the CLI, which must fail, and returns what it said.
func (m *testMesh) refused(args ...string) string {
	m.t.Helper()
	out, said, err := m.Weft(m.t.Context(), args...)
	if err == nil {
		m.t.Fatalf("weft %s succeeded:\n%s", strings.Join(args, " "), out)
	}
	return said
}

// controller starts one with an etcd of its own.
func (m *testMesh) controller() *lab.Process {
	m.t.Helper()
	p, err := m.Controller(m.t.Context(), nil)
	m.check(err)
	return p
}

// cluster adds one with the services that its YAML documents tell of.
func (m *testMesh) cluster(spec lab.ClusterSpec, documents ...string) *lab.Cluster {
	m.t.Helper()
	if spec.Region == "" {
		spec.Region, _, _ = strings.Cut(spec.Name, "-")
	}
	if spec.Zone == "" {
		spec.Zone = spec.Name + "-a"
	}
	if spec.Grants == nil {
		spec.Grants = []string{"shop/*"}
	}
	files := map[string]string{}
	if len(documents) > 0 {
		files["services.yaml"] = strings.Join(documents, "---\n")
	}
	c, err := m.AddCluster(m.t.Context(), spec, files)
	m.check(err)
	m.check(c.Ready(m.t.Context()))
	return c
}

const servicePort = 8080

// backend starts an HTTP server at the cluster's address host; it says on
// every request in which cluster it is.
func (m *testMesh) backend(c *lab.Cluster, host byte) *lab.Process {
	m.t.Helper()
	name := fmt.Sprintf("backend-%d", host)
	p, err := c.Run(name, program("weft"), "demo", "backend", "--cluster", c.Name, "--name", name, "--http", c.Addr(host, servicePort))
	m.check(err)
	return p
}

// service is the YAML of an exported HTTP service of the cluster with that
// index; each endpoint is a host's number in it, with the proxy before it where
// the service passes TLS through.
func (m *testMesh) service(name string, index byte, proxies bool, hosts ...byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: weft.dev/v1
kind: Service
metadata: {name: %s, namespace: shop}
spec:
  export: true
  ports: [{name: http, port: %d}]
  serviceAccounts: [%[1]s]
  healthCheck: {http: {path: /healthz, port: http}, interval: 200ms, timeout: 200ms, unhealthyAfter: 2, healthyAfter: 1}
  mode: %[3]s
  endpoints:
`, name, servicePort, map[bool]string{false: "terminate", true: "passthrough"}[proxies])
	for _, h := range hosts {
		address, _, _ := net.SplitHostPort(m.Addr(index, h, servicePort))
		fmt.Fprintf(&b, "  - {address: %s", address)
		if proxies {
			fmt.Fprintf(&b, ", proxy: \"%s\"", m.Addr(index, h+10, lab.GatewayPort))
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// apply applies a policy.
func (m *testMesh) apply(text string) {
	m.t.Helper()
	file := filepath.Join(m.t.TempDir(), "policy.yaml")
	m.check(os.WriteFile(file, []byte(text), 0o600))
	m.weft("apply", "-f", file)
}

// splitPolicy shares payments out over clusters in one tier.
func splitPolicy(shares map[string]int) string {
	var names, parts []string
	for name, share := range shares {
		names = append(names, name)
		parts = append(parts, fmt.Sprintf("%s: %d", name, share))
	}
	slices.Sort(names)
	slices.Sort(parts)
	return fmt.Sprintf(`apiVersion: weft.dev/v1
kind: FailoverPolicy
metadata: {name: payments, namespace: shop}
spec:
  target: {service: payments}
  order: [{clusters: [%s], split: {%s}}]
`, strings.Join(names, ", "), strings.Join(parts, ", "))
}

// resolve asks the cluster's DNS for a service's clusterset address.
func (m *testMesh) resolve(c *lab.Cluster, service string) string {
	m.t.Helper()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, c.Addr(2, lab.DNSPort))
	}}
	var address string
	m.eventually(service+" has an address in "+c.Name, func() error {
		ips, err := r.LookupNetIP(m.t.Context(), "ip4", service+".shop.svc.clusterset.local.")
		if err == nil && len(ips) != 1 {
			err = fmt.Errorf("%d addresses", len(ips))
		}
		if err == nil {
			address = fmt.Sprintf("%s:%d", ips[0], servicePort)
		}
		return err
	})
	return address
}

// eventually waits up to half a minute for a state.
func (m *testMesh) eventually(what string, good func() error) {
	m.t.Helper()
	end := time.Now().Add(30 * time.Second)
	for {
		err := good()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("waited in vain: %s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// why is what 'weft why -o json' says.
type why struct {
	Predicted bool
	Plan      struct {
		Verdicts []struct {
			Cluster             string
			Tier, SharePerMille int
			Readiness           struct{ Ready, Total int }
			Reason, Detail      string
		}
	}
	Proxies []struct {
		Name  string
		Acked bool
	}
}

func (m *testMesh) why(service string, from *lab.Cluster) (why, error) {
	var w why
	out, _, err := m.Weft(m.t.Context(), "why", "shop/"+service, "--from", from.Name, "-o", "json")
	if err != nil {
		return w, err
	}
	return w, json.Unmarshal([]byte(out), &w)
}

// follows waits until the cluster's own proxies have acknowledged a plan with
// these shares in tier 0.
func (m *testMesh) follows(c *lab.Cluster, service string, shares map[string]int) {
	m.t.Helper()
	m.eventually(fmt.Sprintf("%s follows %v for %s", c.Name, shares, service), func() error {
		w, err := m.why(service, c)
		if err != nil {
			return err
		}
		got := map[string]int{}
		for _, v := range w.Plan.Verdicts {
			if v.Tier == 0 && v.SharePerMille > 0 {
				got[v.Cluster] = v.SharePerMille
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(shares) || w.Predicted || len(w.Proxies) == 0 {
			return fmt.Errorf("the answer is %+v", w)
		}
		for _, p := range w.Proxies {
			if !p.Acked {
				return fmt.Errorf("%s has not acknowledged it: %+v", p.Name, w)
			}
		}
		return nil
	})
}

// answer is one request on a connection of its own; cluster is who served it.
type answer struct {
	began, ended time.Time
	cluster      string
	err          error
}

func request(ctx context.Context, address string) (a answer) {
	a.began = time.Now()
	defer func() { a.ended = time.Now() }()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://payments.shop.svc.clusterset.local/", http.NoBody)
	if err != nil {
		a.err = err
		return a
	}
	resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Do(req)
	if err != nil {
		a.err = err
		return a
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	var says struct{ Cluster string }
	if err == nil {
		err = json.Unmarshal(body, &says)
	}
	if err == nil && (resp.StatusCode != http.StatusOK || says.Cluster == "") {
		err = fmt.Errorf("%s: %.80q", resp.Status, body)
	}
	a.cluster, a.err = says.Cluster, err
	return a
}

// traffic is a stream of requests to one address.
type traffic struct {
	m    *testMesh
	stop context.CancelFunc
	done sync.WaitGroup

	mu      sync.Mutex
	answers []answer
}

// clients is how many send at once.
const clients = 4

// load sends requests one after another, by several clients at once, until the
// test or end stops it.
func (m *testMesh) load(address string) *traffic {
	ctx, stop := context.WithCancel(context.Background())
	tr := &traffic{m: m, stop: stop}
	m.t.Cleanup(tr.end)
	for range clients {
		tr.done.Go(func() {
			for ctx.Err() == nil {
				a := request(context.Background(), address)
				tr.mu.Lock()
				tr.answers = append(tr.answers, a)
				tr.mu.Unlock()
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	return tr
}

func (tr *traffic) end() {
	tr.stop()
	tr.done.Wait()
}

// since copies the answers from number n on.
func (tr *traffic) since(n int) []answer {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.answers[n:])
}

// served waits until n more requests have ended well, and returns who served
// those. Requests that failed make the test fail, but for those in flight while
// a process died.
func (tr *traffic) served(n int, deaths ...lab.Death) map[string]int {
	tr.m.t.Helper()
	from := len(tr.since(0))
	got, seen, good := map[string]int{}, from, 0
	tr.m.eventually(fmt.Sprintf("%d requests are served", n), func() error {
		for _, a := range tr.since(seen) {
			seen++
			if a.err == nil {
				got[a.cluster]++
				good++
			}
		}
		if good < n {
			return fmt.Errorf("%d of %d were, the last answers %v", good, n, tail(tr.since(0), 3))
		}
		return nil
	})
	tr.unharmed(deaths...)
	return got
}

// unharmed fails the test if any request so far failed without an excuse.
func (tr *traffic) unharmed(deaths ...lab.Death) {
	tr.m.t.Helper()
	for i, a := range tr.since(0) {
		excused := slices.ContainsFunc(deaths, func(d lab.Death) bool {
			return !a.began.After(d.Gone) && !a.ended.Before(d.Sent)
		})
		if a.err != nil && !excused {
			tr.m.t.Fatalf("request %d failed at %s: %v (deaths %v)", i, a.began.Format("15:04:05.000"), a.err, deaths)
		}
	}
}

func tail(list []answer, n int) []answer { return list[max(0, len(list)-n):] }

// killAll kills processes at once, and says how long they took to die.
func (m *testMesh) killAll(list ...*lab.Process) []lab.Death {
	m.t.Helper()
	deaths, errs := make([]lab.Death, len(list)), make([]error, len(list))
	var wg sync.WaitGroup
	for i, p := range list {
		wg.Go(func() { deaths[i], errs[i] = p.Kill() })
	}
	wg.Wait()
	m.check(errors.Join(errs...))
	return deaths
}

// says fails the test unless text holds every one of the words.
func (m *testMesh) says(text string, words ...string) {
	m.t.Helper()
	for _, w := range words {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(w)) {
			m.t.Errorf("no %q in what a person reads:\n%s", w, text)
		}
	}
}
