package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/weftmesh/weft/xds"
)

// Who carries the traffic: Config.Engine.
const (
	BuiltIn = "built-in" // this process, by package gateway
	// External is an Envoy that somebody else starts and ends. This process
	// keeps its key and serves it, and speaks for it to the agent; it sends no
	// probes and writes no access log, for it sees no traffic.
	External = "external"
)

// maxPipe is the length of a unix socket's path that Linux takes.
const maxPipe = 107

// beside is what an Envoy beside this process needs.
type beside struct {
	agent, sds, admin string // paths of unix sockets, absolute
	bootstrap         string // file
}

// newBeside checks the settings of an external engine.
func newBeside(agent string, c *Config) (*beside, error) {
	if c.SDSSocket == "" || c.Bootstrap == "" {
		return nil, errors.New("--engine external needs --sds-socket and --bootstrap: where to serve the key, and where to write what the engine is started with")
	}
	// What tells the type of the file is its name; Envoy reads it so.
	if filepath.Ext(c.Bootstrap) != ".json" {
		return nil, fmt.Errorf("--bootstrap %s: its name must end in .json", c.Bootstrap)
	}
	b := &beside{agent: agent, sds: c.SDSSocket, bootstrap: c.Bootstrap}
	b.admin = strings.TrimSuffix(b.sds, filepath.Ext(b.sds)) + "-admin.sock"
	// The engine may be started in another folder.
	for _, path := range []*string{&b.agent, &b.sds, &b.admin} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return nil, err
		}
		if len(abs) > maxPipe {
			return nil, fmt.Errorf("the unix socket's path %s has %d bytes, the system takes %d: choose a shorter folder", abs, len(abs), maxPipe)
		}
		*path = abs
	}
	return b, nil
}

// write writes the bootstrap, whole at once. It holds no secret.
func (b *beside) write(c *Config, role string) error {
	data, err := xds.Bootstrap{
		NodeID: c.Name, NodeCluster: role, AgentPipe: b.agent, LeafPipe: b.sds, AdminPipe: b.admin,
	}.Marshal()
	if err != nil {
		return err
	}
	tmp := b.bootstrap + ".new"
	//nolint:gosec // Envoy may run as another user of the group
	if err := os.WriteFile(tmp, data, 0o640); err != nil {
		return fmt.Errorf("--bootstrap: %w", err)
	}
	return os.Rename(tmp, b.bootstrap)
}

// serveLeaf serves the key and SVID to the Envoy beside until ctx ends, and a
// new one as soon as there is one. The bootstrap is written when the socket is
// there, so whoever waits for the file can start Envoy.
func (p *Process) serveLeaf(ctx context.Context, w *self) error {
	l, err := listenOwner(ctx, p.beside.sds)
	if err != nil {
		return fmt.Errorf("--sds-socket: %w", err)
	}
	server := grpc.NewServer()
	w.leaf.Register(server)
	updated := w.source.Updated()
	if err := w.leaf.Update(); err != nil {
		return errors.Join(err, l.Close())
	}
	if err := p.beside.write(&p.config, w.subject.Role.String()); err != nil {
		return errors.Join(err, l.Close())
	}
	p.config.Log.Info("serving the SVID to an engine that others start", "sdsSocket", p.beside.sds, "bootstrap", p.beside.bootstrap)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	for {
		select {
		case <-ctx.Done():
			server.Stop()
			err := <-served // nil after Stop
			if gone := os.Remove(p.beside.sds); !errors.Is(gone, fs.ErrNotExist) {
				err = errors.Join(err, gone)
			}
			return err
		case err := <-served:
			return fmt.Errorf("--sds-socket %s: %w", p.beside.sds, err)
		case <-updated:
			updated = w.source.Updated()
			if err := w.leaf.Update(); err != nil {
				p.config.Log.Error("the new SVID cannot be served; the engine keeps the one before", "error", err)
			}
		}
	}
}

// engineReady says whether an Envoy has taken the present leaf.
func (w *self) engineReady(b *beside) error {
	switch n, all := w.leaf.InUse(); {
	case n == 0:
		return fmt.Errorf("no engine has asked for the SVID at %s yet: start Envoy with --config-path %s", b.sds, b.bootstrap)
	case !all:
		return errors.New("the engine has not taken the present SVID yet")
	}
	return nil
}

// listenOwner listens on a unix socket that only this user can connect to. One
// that a process left behind when it crashed is replaced.
func listenOwner(ctx context.Context, path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s exists and is no socket: move it away, or choose another path", path)
	default:
		dialer := net.Dialer{Timeout: time.Second}
		if c, err := dialer.DialContext(ctx, "unix", path); err == nil {
			return nil, errors.Join(fmt.Errorf("%s: another process listens there: each gateway and proxy needs a socket of its own", path), c.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	// In a folder that nobody else can enter until the mode is right: it is the
	// private key that the socket gives away.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".w")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bound := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(bound, 0o600)
	if err == nil {
		err = os.Rename(bound, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
