package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"github.com/weftmesh/weft/xds"
)

// unixPathLimit is what fits into Linux's sockaddr_un, without its final zero.
const unixPathLimit = 107

// listenUnix binds a unix socket with the given permissions. What a crashed
// process left at the path is replaced; a socket that somebody still serves,
// or a file that is no socket, is an error. There is no moment at which the
// socket exists with wider permissions.
func listenUnix(ctx context.Context, path string, mode fs.FileMode) (net.Listener, error) {
	if err := checkSocketFree(ctx, path); err != nil {
		return nil, err
	}
	// It is bound under a short name beside its own and renamed when ready.
	tmp, err := os.MkdirTemp(filepath.Dir(path), ".w")
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	defer os.RemoveAll(tmp)
	bound := filepath.Join(tmp, "s")
	if n := max(len(bound), len(path)); n > unixPathLimit {
		return nil, fmt.Errorf("socket %s: the path needs %d bytes, the system's limit is %d: choose a shorter folder", path, n, unixPathLimit)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // it would unlink the first name
	err = os.Chmod(bound, mode)
	var own fs.FileInfo
	if err == nil {
		own, err = os.Lstat(bound)
	}
	if err == nil {
		err = os.Rename(bound, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), l.Close())
	}
	return &unixListener{UnixListener: l, path: path, own: own}, nil
}

// checkSocketFree reports why nothing may be bound at path.
func checkSocketFree(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: a file that is no socket is in its place: move it away or choose another path", path)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("socket %s: another process serves it: stop that one or choose another path", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket %s: cannot tell whether it is in use: %w", path, err)
	}
	return nil
}

// unixListener removes its socket on Close, unless another one has been put in
// its place.
type unixListener struct {
	*net.UnixListener
	path  string
	own   fs.FileInfo
	close sync.Once
}

func (l *unixListener) Close() error {
	l.close.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.own) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// socketCredentials gives every connection of a unix socket the identity that
// the agent's configuration gives the socket: who may open the file is its
// permissions' decision.
type socketCredentials struct {
	id   spiffeid.ID
	view xds.View
}

// socketAuth is the AuthInfo of a connection over a unix socket.
type socketAuth struct {
	credentials.CommonAuthInfo
	id   spiffeid.ID
	view xds.View
}

func (socketAuth) AuthType() string { return "unix" }

func (c socketCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	level := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return conn, socketAuth{CommonAuthInfo: level, id: c.id, view: c.view}, nil
}

func (c socketCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("socket credentials are for servers")
}

func (c socketCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (c socketCredentials) Clone() credentials.TransportCredentials { return c }

func (c socketCredentials) OverrideServerName(string) error { return nil }

// lockDir makes dir this process's own until the result is closed, so that two
// agents never write one state. The lock ends with the process.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("state folder %s: another agent uses it: give each agent its own --state-dir", dir)
		}
		return nil, fmt.Errorf("state folder %s: %w", dir, err)
	}
	return f, nil
}
