package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// ClusterSpec says what a cluster of the lab is.
type ClusterSpec struct {
	Name, Region, Zone string
	Grants             []string
	// Reached is where other clusters reach the gateway; empty is the gateway's
	// own address. A test puts a wire of its own in between.
	Reached string
	// Proxies are the sidecars to run: one for each address HOST:PORT, with the
	// service account "namespace/name" that it stands for.
	Proxies []ProxySpec
	// Envoy is the program of an Envoy that stands in the gateway's place; empty
	// leaves it to the built-in engine.
	Envoy string
	// Agent adds to the agent's settings.
	Agent map[string]any
}

// ProxySpec is one sidecar.
type ProxySpec struct {
	Name           string
	ServiceAccount string // namespace/name
	Listen         string // HOST:PORT of its mTLS side
}

// Cluster is one member of the lab's mesh: an agent, a gateway, perhaps
// sidecars, and a folder with its services.
type Cluster struct {
	Name    string
	Index   byte // third octet of its addresses
	Source  string
	Agent   *Process
	Gateway *Process
	Envoy   *Process // nil where the gateway has the built-in engine
	Proxies map[string]*Process

	lab  *Lab
	join []string // arguments of the agent's first start
}

// Addr is an address of the cluster.
func (c *Cluster) Addr(host byte, port int) string { return c.lab.Addr(c.Index, host, port) }

// GatewayAddr is where the gateway listens for other clusters.
func (c *Cluster) GatewayAddr() string { return c.Addr(1, GatewayPort) }

// AddCluster registers a cluster by the CLI, runs the command that the CLI
// printed, and starts its gateway and proxies. Its agent reads services from
// Cluster.Source; the folder is empty but for what services holds (file name
// to YAML).
func (l *Lab) AddCluster(ctx context.Context, spec ClusterSpec, services map[string]string) (*Cluster, error) {
	l.mu.Lock()
	index := byte(len(l.clusters) + 1)
	c := &Cluster{Name: spec.Name, Index: index, Source: l.path(spec.Name, "services"), lab: l, Proxies: map[string]*Process{}}
	l.clusters[spec.Name] = c
	l.mu.Unlock()
	if err := os.MkdirAll(c.Source, 0o700); err != nil {
		return nil, err
	}
	for name, text := range services {
		if err := c.Write(name, text); err != nil {
			return nil, err
		}
	}
	if spec.Reached == "" {
		spec.Reached = c.GatewayAddr()
	}
	vips := netip.PrefixFrom(netip.AddrFrom4([4]byte{127, l.net, index, 128}), 25)
	args := []string{
		"cluster", "register", spec.Name, "--region", spec.Region, "--zone", spec.Zone,
		"--gateway", spec.Reached, "--vips", vips.String(), "-o", "json",
	}
	for _, g := range spec.Grants {
		args = append(args, "--grant", g)
	}
	out, _, err := l.Weft(ctx, args...)
	if err != nil {
		return nil, err
	}
	var registered struct {
		Token struct{ Token, CaHash string }
	}
	if err := json.Unmarshal([]byte(out), &registered); err != nil || registered.Token.Token == "" {
		return nil, fmt.Errorf("weft cluster register printed no token: %w", err)
	}
	if err := c.startAgent(ctx, spec, registered.Token.Token, registered.Token.CaHash); err != nil {
		return nil, err
	}
	if err := c.startGateway(ctx, spec); err != nil {
		return nil, err
	}
	for _, p := range spec.Proxies {
		if err := c.startProxy(p); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Write puts one YAML file into the source folder, whole at once.
func (c *Cluster) Write(name, text string) error {
	tmp := filepath.Join(filepath.Dir(c.Source), "."+name)
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.Source, name))
}

// Socket is the unix socket of the agent that stands for name: "gateway", or a
// proxy's name.
func (c *Cluster) Socket(name string) string { return c.lab.path(c.Name, name+".sock") }

func (c *Cluster) startAgent(ctx context.Context, spec ClusterSpec, token, caHash string) error {
	sockets := []map[string]string{{"path": c.Socket("gateway"), "identity": "gateway", "listen": c.GatewayAddr()}}
	for _, p := range spec.Proxies {
		ns, sa, ok := strings.Cut(p.ServiceAccount, "/")
		if !ok {
			return fmt.Errorf("service account %q: write namespace/name", p.ServiceAccount)
		}
		sockets = append(sockets, map[string]string{
			"path": c.Socket(p.Name), "identity": "ns/" + ns + "/sa/" + sa, "listen": p.Listen,
		})
	}
	admin := c.Addr(2, AdminPort)
	settings := map[string]any{
		"controller": slices.Clone(c.lab.listen), "state-dir": c.lab.path(c.Name, "agent"), "source": c.Source,
		"gateway-address": []string{spec.Reached}, "sockets": sockets, "dns-listen": c.Addr(2, DNSPort),
		"admin": admin, "log-format": "json",
	}
	maps.Copy(settings, spec.Agent)
	config, err := c.lab.writeConfig(c.Name+"/agent", settings)
	if err != nil {
		return err
	}
	c.join = []string{"--config", config, "--join", token, "--ca-hash", caHash}
	c.Agent = c.lab.process(c.Name+"/agent", progAgent, admin, c.join...)
	if err := c.Agent.Start(); err != nil {
		return err
	}
	// Later starts live on the SVID.
	c.Agent.args = []string{"--config", config}
	ctx, cancel := within(ctx, 30*time.Second)
	defer cancel()
	return c.Agent.Ready(ctx)
}

func (c *Cluster) startGateway(ctx context.Context, spec ClusterSpec) error {
	admin := c.Addr(1, AdminPort)
	settings := map[string]any{
		"agent": "unix:" + c.Socket("gateway"), "name": spec.Name + "-gateway", "state-dir": c.lab.path(c.Name, "gateway"),
		"admin": admin, "log-format": "json", "access-log": c.AccessLog(),
	}
	bootstrap := c.lab.path(c.Name, "envoy.json")
	if spec.Envoy != "" {
		maps.Copy(settings, map[string]any{"engine": "external", "sds-socket": c.lab.path(c.Name, "sds.sock"), "bootstrap": bootstrap})
	}
	config, err := c.lab.writeConfig(c.Name+"/gateway", settings)
	if err != nil {
		return err
	}
	c.Gateway = c.lab.process(c.Name+"/gateway", progGateway, admin, "--config", config)
	if err := c.Gateway.Start(); err != nil || spec.Envoy == "" {
		return err
	}
	ctx, cancel := within(ctx, 30*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(bootstrap); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s writes no bootstrap:\n%s", c.Gateway.Name, c.Gateway.Tail(15))
		case <-time.After(25 * time.Millisecond):
		}
	}
	c.Envoy, err = c.Run("envoy", spec.Envoy, "--config-path", bootstrap,
		"--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "--file-flush-interval-msec", "100")
	return err
}

// EnvoyAdmin asks the admin interface of the Envoy in the gateway's place.
func (c *Cluster) EnvoyAdmin(ctx context.Context, path string) (string, error) {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", c.lab.path(c.Name, "sds-admin.sock"))
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// AccessLog is the file with the gateway's access log, one JSON object a line.
func (c *Cluster) AccessLog() string { return c.lab.path(c.Name, "access.log") }

func (c *Cluster) startProxy(p ProxySpec) error {
	host, _, ok := strings.Cut(p.Listen, ":")
	if !ok {
		return fmt.Errorf("proxy %s: listen %q is not HOST:PORT", p.Name, p.Listen)
	}
	admin := fmt.Sprintf("%s:%d", host, AdminPort)
	config, err := c.lab.writeConfig(c.Name+"/"+p.Name, map[string]any{
		"agent": "unix:" + c.Socket(p.Name), "name": p.Name, "state-dir": c.lab.path(c.Name, p.Name),
		"admin": admin, "log-format": "json",
	})
	if err != nil {
		return err
	}
	c.Proxies[p.Name] = c.lab.process(c.Name+"/"+p.Name, progProxy, admin, "--config", config)
	return c.Proxies[p.Name].Start()
}

// Ready waits until the agent, the gateway and every proxy serve.
func (c *Cluster) Ready(ctx context.Context) error {
	ctx, cancel := within(ctx, 30*time.Second)
	defer cancel()
	errs := []error{c.Agent.Ready(ctx), c.Gateway.Ready(ctx)}
	for _, p := range c.Proxies {
		errs = append(errs, p.Ready(ctx))
	}
	return errors.Join(errs...)
}

// Run starts a program of the cluster's own, such as a backend.
func (c *Cluster) Run(name, path string, args ...string) (*Process, error) {
	p := c.lab.process(c.Name+"/"+name, "", "", args...)
	p.path = path
	return p, p.Start()
}
