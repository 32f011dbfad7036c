package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/weftmesh/weft/federation/clock"
)

// Defaults of Config.
const (
	DefaultQuotaBytes  = 4 << 30
	DefaultElectionTTL = 15 * time.Second
	DefaultPresenceTTL = 30 * time.Second
	DefaultVerifyEvery = 10 * time.Minute
	DefaultReuseAfter  = 25 * time.Hour
)

// Config says where the state is. Exactly one of Dir and Endpoints is set.
type Config struct {
	TrustDomain spiffeid.TrustDomain

	// Dir is the data directory of an etcd inside this process; it is made with
	// mode 0700. Its sockets lie in it, so its path has at most MaxDirPath bytes.
	Dir string
	// QuotaBytes is how large the embedded database may become. Default 4 GiB.
	QuotaBytes int64

	// Endpoints of an external etcd, "https://HOST:PORT"; plain http is taken for
	// loopback addresses only.
	Endpoints []string
	TLS       TLSFiles

	// ElectionTTL is how long a leader that has vanished stays in office,
	// PresenceTTL how long a vanished process's presence is believed; both are
	// etcd's leases, in time of the etcd server. Defaults 15 s and 30 s.
	ElectionTTL, PresenceTTL time.Duration
	// VerifyEvery is the time between two comparisons of the watched view with a
	// fresh list, on Clock. Default 10 min.
	VerifyEvery time.Duration
	// ReuseAfter is how long after a denial a cluster's name, or the quarantined
	// cluster, may enrol again: longer than the longest leaf lives. Default 25 h.
	ReuseAfter time.Duration

	Clock   clock.Clock           // nil is the machine's
	Logger  *slog.Logger          // nil discards
	Metrics prometheus.Registerer // nil keeps no metrics

	// NoFsyncForTests lets the embedded server answer before the disk has the
	// data. A crash of the machine then loses state: no program sets this.
	NoFsyncForTests bool

	dialOptions []grpc.DialOption // of tests, to stand between client and etcd
}

// TLSFiles are PEM files, read anew for every connection so that they can be
// rotated in place.
type TLSFiles struct {
	CA         string // who may be etcd; required with https
	Cert, Key  string // who we are; both or neither
	ServerName string // expected name, where it is not the endpoint's host
}

// MaxDirPath is how long the path of a data directory can be: the sockets in it
// must fit into sun_path.
const MaxDirPath = 107 - len("/client.sock")

func (c *Config) check() error {
	if c.TrustDomain.IsZero() {
		return errors.New("store: no trust domain given")
	}
	switch {
	case c.Dir == "" && len(c.Endpoints) == 0:
		return errors.New("store: give a data directory for the embedded etcd, or the endpoints of an external one")
	case c.Dir != "" && len(c.Endpoints) != 0:
		return errors.New("store: a data directory and endpoints are both given: the first is for an embedded etcd, the second for an external one")
	}
	if c.Dir != "" {
		abs, err := filepath.Abs(c.Dir)
		if err != nil {
			return fmt.Errorf("store: data directory: %w", err)
		}
		if len(abs) > MaxDirPath {
			return fmt.Errorf("store: data directory %s: its path has %d bytes, but at most %d leave room for a unix socket in it", abs, len(abs), MaxDirPath)
		}
		c.Dir = abs
		if c.TLS != (TLSFiles{}) {
			return errors.New("store: TLS files are given, but the embedded etcd is reached by a socket in its data directory")
		}
	} else if c.NoFsyncForTests {
		return errors.New("store: fsync cannot be switched off in an external etcd")
	}
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return errors.New("store: a client certificate needs its key, and the key its certificate")
	}
	if c.QuotaBytes == 0 {
		c.QuotaBytes = DefaultQuotaBytes
	}
	if c.QuotaBytes < 16<<20 {
		return fmt.Errorf("store: a quota of %d bytes is too little, give at least 16 MiB", c.QuotaBytes)
	}
	for d, def := range map[*time.Duration]time.Duration{
		&c.ElectionTTL: DefaultElectionTTL, &c.PresenceTTL: DefaultPresenceTTL,
		&c.VerifyEvery: DefaultVerifyEvery, &c.ReuseAfter: DefaultReuseAfter,
	} {
		if *d == 0 {
			*d = def
		}
		if *d < 0 {
			return errors.New("store: a duration is negative")
		}
	}
	if c.Clock == nil {
		c.Clock = clock.Real()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("component", "store")
	return nil
}

// makeDir makes the data directory, or takes an existing one away from
// everybody else.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("store: data directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory needs x
		return fmt.Errorf("store: data directory: %w", err)
	}
	return nil
}
