package demo

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftmesh/weft/e2e/lab"
)

// The clusters of the play.
const (
	eu1 = "eu-1"
	eu2 = "eu-2"
	us1 = "us-1"
)

// Services of the play.
const (
	payments     = "shop/payments"
	paymentsPort = 8080
	echo         = "shop/echo"
	echoPort     = 7000
)

// stage is the mesh with its backends and the wires between its gateways.
type stage struct {
	lab        *lab.Lab
	controller *lab.Process
	clusters   map[string]*lab.Cluster
	backends   map[string][]*lab.Process // by cluster
	wires      map[string]*recorder      // in front of each cluster's gateway
}

// setUp starts everything and waits until every cluster can call payments.
func setUp(ctx context.Context, l *lab.Lab, progress func(string, ...any)) (*stage, error) {
	s := &stage{lab: l, clusters: map[string]*lab.Cluster{}, backends: map[string][]*lab.Process{}, wires: map[string]*recorder{}}
	began := time.Now()
	c, err := l.Controller(ctx, nil)
	if err != nil {
		return s, err
	}
	s.controller = c
	progress("controller with its own etcd, authorities made (%s)", since(began))
	for i, name := range []string{eu1, eu2, us1} {
		began := time.Now()
		if err := s.addCluster(ctx, byte(i+1), name); err != nil {
			return s, fmt.Errorf("cluster %s: %w", name, err)
		}
		progress("%s registered, enrolled, serving (%s)", name, since(began))
	}
	began = time.Now()
	if err := s.settle(ctx); err != nil {
		return s, err
	}
	progress("every gateway has the catalog (%s)", since(began))
	return s, nil
}

func since(t time.Time) string { return time.Since(t).Round(10 * time.Millisecond).String() }

// backendName is a backend's own name in its cluster.
func backendName(n int) string { return fmt.Sprintf("backend-%d", n+1) }

func (s *stage) addCluster(ctx context.Context, index byte, name string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// The wire that others come by; the gateway itself listens beside it.
	wire, err := record(ctx, s.lab.Addr(index, 3, lab.GatewayPort), s.lab.Addr(index, 1, lab.GatewayPort))
	if err != nil {
		return err
	}
	s.wires[name] = wire
	spec := lab.ClusterSpec{
		Name: name, Region: strings.TrimRight(name, "-0123456789"), Zone: name + "-a",
		Grants: []string{"shop/*"}, Reached: s.lab.Addr(index, 3, lab.GatewayPort),
	}
	mode := "terminate"
	if name == us1 {
		// Its backends stand behind sidecars, so that TLS goes through the gateway.
		mode = "passthrough"
		for n := range 2 {
			spec.Proxies = append(spec.Proxies, lab.ProxySpec{
				Name: fmt.Sprintf("proxy-%d", n+1), ServiceAccount: payments, Listen: s.lab.Addr(index, byte(20+n), lab.GatewayPort),
			})
		}
	}
	c, err := s.lab.AddCluster(ctx, spec, map[string]string{"services.yaml": s.services(index, name, mode)})
	if err != nil {
		return err
	}
	s.clusters[name] = c
	for n := range 2 {
		args := []string{"demo", "backend", "--cluster", name, "--name", backendName(n), "--http", s.lab.Addr(index, byte(10+n), paymentsPort)}
		if name != eu1 && n == 0 {
			args = append(args, "--echo", s.lab.Addr(index, 10, echoPort))
		}
		p, err := c.Run(backendName(n), self, args...)
		if err != nil {
			return err
		}
		s.backends[name] = append(s.backends[name], p)
	}
	return c.Ready(ctx)
}

// services is the file that the cluster's agent reads.
func (s *stage) services(index byte, name, mode string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: weft.dev/v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  export: true
  mode: %s
  serviceAccounts: [payments]
  ports: [{name: http, port: %d, appProtocol: http}]
  endpoints:
`, mode, paymentsPort)
	for n := range 2 {
		fmt.Fprintf(&b, "  - address: %s\n", host(s.lab.Addr(index, byte(10+n), paymentsPort)))
		if mode == "passthrough" {
			fmt.Fprintf(&b, "    proxy: %s\n", s.lab.Addr(index, byte(20+n), lab.GatewayPort))
		}
	}
	b.WriteString("  healthCheck: {http: {path: /healthz, port: http}, interval: 250ms, timeout: 200ms, unhealthyAfter: 2, healthyAfter: 1}\n")
	if name != eu1 {
		fmt.Fprintf(&b, `---
apiVersion: weft.dev/v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  export: true
  ports: [{name: tcp, port: %d}]
  endpoints: [{address: %s}]
`, echoPort, host(s.lab.Addr(index, 10, echoPort)))
	}
	return b.String()
}

func host(address string) string {
	h, _, _ := net.SplitHostPort(address)
	return h
}

// settle waits until payments is reachable from eu-1 in all three clusters,
// and eu-1's gateway has acknowledged the plan that says so.
func (s *stage) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var last error
	for {
		w, err := s.why(ctx, payments)
		if err == nil {
			err = w.settled()
		}
		if err == nil {
			w, err = s.why(ctx, echo)
			if err == nil && !w.acked() {
				err = fmt.Errorf("%s is not acknowledged yet", echo)
			}
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the mesh did not settle: %w", last)
		}
		last = err
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// address is where eu-1's clients reach a service: its clusterset name, as
// eu-1's agent resolves it.
func (s *stage) address(ctx context.Context, service string, port int) (string, error) {
	ns, name, _ := strings.Cut(service, "/")
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, s.clusters[eu1].Addr(2, lab.DNSPort))
	}}
	fqdn := name + "." + ns + ".svc.clusterset.local."
	ips, err := r.LookupNetIP(ctx, "ip4", fqdn)
	if err != nil {
		return "", err
	}
	if len(ips) != 1 {
		return "", fmt.Errorf("%s has %d addresses, want 1", fqdn, len(ips))
	}
	return fmt.Sprintf("%s:%d", ips[0], port), nil
}

// killBackends ends backends of a cluster, all at once.
func (s *stage) killBackends(cluster string, which ...int) ([]lab.Death, error) {
	var g errgroup.Group
	deaths := make([]lab.Death, len(which))
	for i, n := range which {
		g.Go(func() (err error) {
			deaths[i], err = s.backends[cluster][n].Kill()
			return err
		})
	}
	return deaths, g.Wait()
}

func (s *stage) startBackends(cluster string, which ...int) error {
	for _, n := range which {
		if err := s.backends[cluster][n].Start(); err != nil {
			return err
		}
	}
	return nil
}

// close ends everything.
func (s *stage) close() error {
	err := s.lab.Close()
	for _, w := range s.wires {
		w.close()
	}
	return err
}
