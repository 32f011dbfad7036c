package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"
)

// Options say where a lab lives and what it runs. The zero value is good.
type Options struct {
	// Dir is the parent of the lab's folder; empty is the system's.
	Dir string
	// Binaries is the folder with Weft's programs; empty looks beside the
	// running one, then on PATH.
	Binaries string
	// TrustDomain is "weft.test" if empty.
	TrustDomain string
	// Keep leaves the folder behind at Close.
	Keep bool
}

// Lab is one mesh on this machine.
type Lab struct {
	Dir         string // holds everything that its processes write
	TrustDomain string
	Contexts    string // file of contexts, with an operator's credential

	keep     bool
	binaries map[string]string
	net      byte // second octet of every address

	mu          sync.Mutex
	processes   []*Process
	controllers []*Process
	listen      []string // addresses of the controllers
	clusters    map[string]*Cluster
}

// Names of the programs that a lab runs.
const (
	progCLI        = "weft"
	progController = "weft-controller"
	progAgent      = "weft-agent"
	progGateway    = "weft-gateway"
	progProxy      = "weft-proxy"
)

// Ports that every process of a lab uses, on an address of its own.
const (
	ControllerPort = 15012
	GatewayPort    = 15443
	AdminPort      = 15000
	DNSPort        = 15053
)

// New finds the programs, makes the folder and picks addresses that nobody on
// this machine uses. It starts nothing.
func New(ctx context.Context, o Options) (*Lab, error) {
	binaries, err := Binaries(o.Binaries, progCLI, progController, progAgent, progGateway, progProxy)
	if err != nil {
		return nil, err
	}
	octet, err := freeNetwork(ctx)
	if err != nil {
		return nil, err
	}
	// Short, because paths of unix sockets are.
	dir, err := os.MkdirTemp(o.Dir, "weft-")
	if err != nil {
		return nil, err
	}
	if o.TrustDomain == "" {
		o.TrustDomain = "weft.test"
	}
	return &Lab{
		Dir: dir, TrustDomain: o.TrustDomain, Contexts: filepath.Join(dir, "contexts.yaml"),
		keep: o.Keep, binaries: binaries, net: octet, clusters: map[string]*Cluster{},
	}, nil
}

// freeNetwork finds an octet n such that the first controller's address in
// 127.n.0.0/16 is free. Two labs that start at once try different ones first.
func freeNetwork(ctx context.Context) (byte, error) {
	var lc net.ListenConfig
	var errs []error
	for _, n := range rand.Perm(200)[:20] {
		octet := byte(n + 20)
		ln, err := lc.Listen(ctx, "tcp", addr(octet, 0, 1, ControllerPort))
		if err == nil {
			return octet, ln.Close()
		}
		errs = append(errs, err)
	}
	return 0, fmt.Errorf("no free network in 127.0.0.0/8: %w", errors.Join(errs...))
}

func addr(octet, cluster, host byte, port int) string {
	return fmt.Sprintf("%s:%d", netip.AddrFrom4([4]byte{127, octet, cluster, host}), port)
}

// Addr is an address of the lab: cluster 0 is the controllers'.
func (l *Lab) Addr(cluster, host byte, port int) string { return addr(l.net, cluster, host, port) }

// path is a file in the lab's folder.
func (l *Lab) path(parts ...string) string {
	return filepath.Join(append([]string{l.Dir}, parts...)...)
}

// process describes a program of the lab; it does not start it.
func (l *Lab) process(name, program, admin string, args ...string) *Process {
	p := &Process{
		Name: name, Admin: admin, path: l.binaries[program], args: args,
		log: l.path(strings.ReplaceAll(name, "/", "-") + ".log"),
		env: []string{"WEFT_CONTEXTS=" + l.Contexts},
	}
	l.mu.Lock()
	l.processes = append(l.processes, p)
	l.mu.Unlock()
	return p
}

// Processes are all that were ever started, in their order.
func (l *Lab) Processes() []*Process {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.processes)
}

// writeConfig writes a program's settings as its YAML file.
func (l *Lab) writeConfig(name string, settings map[string]any) (string, error) {
	data, err := yaml.Marshal(settings)
	if err != nil {
		return "", err
	}
	path := l.path(strings.ReplaceAll(name, "/", "-") + ".yaml")
	return path, os.WriteFile(path, data, 0o600)
}

// Controller starts one more controller and waits until it serves. Without
// etcd endpoints in settings it embeds its store; then there can be only one.
func (l *Lab) Controller(ctx context.Context, settings map[string]any) (*Process, error) {
	l.mu.Lock()
	n := byte(len(l.controllers) + 1)
	l.mu.Unlock()
	name := fmt.Sprintf("controller-%d", n)
	listen, admin := l.Addr(0, n, ControllerPort), l.Addr(0, n, AdminPort)
	all := map[string]any{
		"name": name, "trust-domain": l.TrustDomain, "region": "home",
		"data-dir": l.path(name), "kek-file": l.path("kek"), "admin-credential": l.Contexts,
		"listen": listen, "advertise": listen, "admin": admin, "log-format": "json",
	}
	maps.Copy(all, settings)
	config, err := l.writeConfig(name, all)
	if err != nil {
		return nil, err
	}
	p := l.process(name, progController, admin, "--config", config)
	l.mu.Lock()
	l.controllers = append(l.controllers, p)
	l.listen = append(l.listen, listen)
	l.mu.Unlock()
	if err := p.Start(); err != nil {
		return nil, err
	}
	return p, p.Ready(ctx)
}

// Weft runs the CLI against this mesh, and returns what it printed.
func (l *Lab) Weft(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, l.binaries[progCLI], args...)
	cmd.Env = append(os.Environ(), "WEFT_CONTEXTS="+l.Contexts, "NO_COLOR=1")
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	if err != nil {
		err = fmt.Errorf("weft %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), errOut.String(), err
}

// Close ends every process, the data path first, and removes the folder.
func (l *Lab) Close() error {
	var errs []error
	all := l.Processes()
	slices.Reverse(all) // what was started last depends on what came before
	for _, p := range all {
		// Paused processes would never see the end.
		_ = p.Signal(syscall.SIGCONT)
	}
	var wg sync.WaitGroup
	for _, p := range all {
		wg.Go(func() { _, _ = p.Kill() })
	}
	wg.Wait()
	for _, p := range all {
		if p.Running() {
			errs = append(errs, fmt.Errorf("%s (pid %d) still runs", p.Name, p.Pid()))
		}
	}
	if !l.keep {
		errs = append(errs, os.RemoveAll(l.Dir))
	}
	return errors.Join(errs...)
}

// within bounds a wait that has no bound of its own.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, d)
}
