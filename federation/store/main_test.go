package store

import (
	"context"
	"flag"
	"log/slog"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/weftmesh/weft/federation"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func TestMain(m *testing.M) {
	// The model works on a real etcd, so fewer runs than rapid's 100 must do.
	if err := flag.Set("rapid.checks", "12"); err != nil {
		panic(err)
	}
	// Most tests wait for etcd's timers, not for a processor.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m,
		// Members of a three-member etcd leave idle connections to each other. The
		// store itself uses no net/http.
		goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreAnyFunction("net/http.(*conn).serve"),
		goleak.IgnoreAnyFunction("net/http.(*connReader).backgroundRead"),
	)
}

var testDomain = spiffeid.RequireTrustDomainFromString("mesh.test")

func federationTestDomain(name string) spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(name + ".test")
}

// testDir is a data directory with a path that is short enough for sockets.
func testDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "weft-store-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
}

func embeddedConfig(t testing.TB) Config {
	return Config{TrustDomain: testDomain, Dir: testDir(t), Logger: testLog(t), NoFsyncForTests: true}
}

// open opens a store that closes with the test.
func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func member(name string) *federationv1.Member {
	return &federationv1.Member{Cluster: name, Region: "eu", Zone: "eu-a", Grants: []string{"shop/*"}, Gateways: []*federationv1.Address{{Host: "10.0.0.1", Port: 15443}}}
}

func token(hash string) Token { return Token{Hash: hash, TTL: 15 * time.Minute, By: "ada"} }

func clusterID(name string) federation.ClusterID { return federation.ClusterID(name) }

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// repairs is how often verification had to mend the view.
func (s *Store) repairs() float64 { return testutil.ToFloat64(s.metrics.repairs) }
