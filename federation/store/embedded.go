package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

const (
	readyTimeout = 60 * time.Second
	// progressEvery is how often etcd tells an idle watch how far it is.
	progressEvery = 5 * time.Second
	// defragAbove is how many megabytes a start must be able to free before it
	// rewrites the database.
	defragAbove = 100
)

// server is the embedded etcd: one member, reached by a unix socket in its
// data directory, so that only processes of the same user can. It is not a
// quorum: what it acknowledged is on disk, but while it is down there is no
// store. Several controllers share an external etcd instead.
type server struct {
	etcd     *embed.Etcd
	lock     *os.File
	endpoint string
	// level of the log lines that are passed on: errors while it starts (it warns
	// of what we chose), warnings while it runs, nothing while it stops (each
	// listener's end is an error to it).
	level zap.AtomicLevel
}

// startServer takes the data directory for this process, starts etcd on it and
// waits until it serves.
func startServer(ctx context.Context, cfg *Config) (_ *server, err error) {
	if err := makeDir(cfg.Dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	sv := &server{lock: lock, level: zap.NewAtomicLevelAt(zapcore.ErrorLevel)}
	defer func() {
		if err != nil {
			sv.stop()
		}
	}()
	client := url.URL{Scheme: "unix", Path: filepath.Join(cfg.Dir, "client.sock")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(cfg.Dir, "peer.sock")}
	sv.endpoint = client.String()

	ec := embed.NewConfig()
	ec.Name = "weft"
	ec.Dir = filepath.Join(cfg.Dir, "etcd")
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	// Counts on the first start only: every data directory gets an etcd cluster
	// id of its own, by which a restore elsewhere is noticed.
	ec.InitialClusterToken = rand.Text()
	ec.EnableGRPCGateway = false
	ec.CORS, ec.HostWhitelist = nil, nil
	ec.AutoCompactionMode, ec.AutoCompactionRetention = embed.CompactorModePeriodic, "1h"
	ec.QuotaBackendBytes = cfg.QuotaBytes
	ec.WatchProgressNotifyInterval = progressEvery
	ec.BootstrapDefragThresholdMegabytes = defragAbove
	ec.UnsafeNoFsync = cfg.NoFsyncForTests
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(cfg.Logger, sv.level))
	// etcd's corruption checks compare members with each other: one has nobody
	// to compare with.

	if cfg.NoFsyncForTests {
		cfg.Logger.WarnContext(ctx, "fsync is off: a crash of the machine loses state")
	}
	if sv.etcd, err = embed.StartEtcd(ec); err != nil {
		return nil, fmt.Errorf("store: start etcd in %s: %w", cfg.Dir, err)
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	select {
	case <-sv.etcd.Server.ReadyNotify():
		sv.level.SetLevel(zapcore.WarnLevel)
		return sv, nil
	case <-sv.etcd.Server.StopNotify():
		return nil, fmt.Errorf("store: etcd in %s stopped while it started", cfg.Dir)
	case err := <-sv.etcd.Err():
		return nil, fmt.Errorf("store: etcd in %s: %w", cfg.Dir, err)
	case <-ctx.Done():
		return nil, fmt.Errorf("store: etcd in %s was not ready in time: %w", cfg.Dir, ctx.Err())
	}
}

// lockDir keeps other processes out of dir. etcd would wait for its own lock
// without a word. The kernel drops the lock when the process ends, however.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("store: %s: %w (process %s)", dir, ErrLocked, holder[:n])
		}
		return nil, fmt.Errorf("store: lock %s: %w", path, err)
	}
	// For people and the message above; nothing is decided by it.
	if err := f.Truncate(0); err == nil {
		fmt.Fprintf(f, "%d", os.Getpid())
	}
	return f, nil
}

// watch reports the server's unexpected end.
func (sv *server) watch(ctx context.Context, fail func(error)) {
	select {
	case <-ctx.Done():
	case err := <-sv.etcd.Err():
		fail(fmt.Errorf("store: embedded etcd: %w", err))
	case <-sv.etcd.Server.StopNotify():
		if ctx.Err() == nil {
			fail(errors.New("store: embedded etcd has stopped"))
		}
	}
}

func (sv *server) stopped() bool {
	select {
	case <-sv.etcd.Server.StopNotify():
		return true
	default:
		return false
	}
}

// stop is graceful, and safe on a server that did not start.
func (sv *server) stop() {
	sv.level.SetLevel(zapcore.FatalLevel)
	if sv.etcd != nil {
		sv.etcd.Close()
		<-sv.etcd.Server.StopNotify()
	}
	sv.lock.Close()
}
