package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit func(*Config)
		want string
	}{
		"nothing":         {func(c *Config) { *c = Config{TrustDomain: testDomain} }, "give a data directory"},
		"both":            {func(c *Config) { c.Endpoints = []string{"https://127.0.0.1:1"} }, "both given"},
		"no trust domain": {func(c *Config) { *c = Config{Dir: c.Dir} }, "no trust domain"},
		"long path":       {func(c *Config) { c.Dir = "/tmp/" + strings.Repeat("x", 120) }, "unix socket"},
		"TLS of embedded": {func(c *Config) { c.TLS.CA = "x" }, "socket in its data directory"},
		"cert without key": {func(c *Config) {
			c.Dir, c.NoFsyncForTests, c.Endpoints, c.TLS.Cert = "", false, []string{"https://127.0.0.1:1"}, "x"
		}, "needs its key"},
		"tiny quota":       {func(c *Config) { c.QuotaBytes = 1 }, "at least 16 MiB"},
		"negative time":    {func(c *Config) { c.ElectionTTL = -1 }, "negative"},
		"fsync of another": {func(c *Config) { c.Dir, c.Endpoints = "", []string{"http://127.0.0.1:1"} }, "external etcd"},
	} {
		cfg := embeddedConfig(t)
		c.edit(&cfg)
		if s, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
			if s != nil {
				s.Close()
			}
		}
	}
}

func TestDataDirectoryIsOurs(t *testing.T) {
	t.Parallel()
	cfg := embeddedConfig(t)
	if err := os.Chmod(cfg.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	s := open(t, cfg)
	if st, err := os.Stat(cfg.Dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the data directory's mode is %v, %v", st.Mode(), err)
	}
	began := time.Now()
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), cfg.Dir) {
		t.Errorf("a second store in one directory: %v", err)
	}
	if time.Since(began) > 5*time.Second {
		t.Error("it was told too late")
	}
	if _, err := s.Member(timeout(t), "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("the first store, afterwards: %v", err)
	}
	s.Close()
	if s, err := Open(t.Context(), cfg); err != nil {
		t.Errorf("after the first has closed: %v", err)
	} else {
		s.Close()
	}
}

// TestSecondProcess runs this test binary again as another process, which
// tries the directory that this one holds.
func TestSecondProcess(t *testing.T) {
	if dir := os.Getenv("STORE_TEST_DIR"); dir != "" {
		_, err := Open(t.Context(), Config{TrustDomain: testDomain, Dir: dir, NoFsyncForTests: true})
		t.Fatal(err)
	}
	t.Parallel()
	cfg := embeddedConfig(t)
	open(t, cfg)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(timeout(t), self, "-test.run=^TestSecondProcess$", "-test.v")
	cmd.Env = append(os.Environ(), "STORE_TEST_DIR="+cfg.Dir)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), ErrLocked.Error()) {
		t.Errorf("the other process: %v\n%s", err, out)
	}
}

func TestReopenKeepsTheIncarnation(t *testing.T) {
	t.Parallel()
	cfg := embeddedConfig(t)
	reg := prometheus.NewRegistry()
	cfg.Metrics = reg
	s := open(t, cfg)
	_, rev, err := s.Register(timeout(t), member("eu-1"), token("aa"))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := s.Member(timeout(t), "eu-1"); err == nil {
		t.Error("a closed store answers")
	}
	s = open(t, cfg) // registers its metrics again
	sn, err := s.read(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	if sn.catalog() != rev {
		t.Errorf("the catalog is at %v, it was at %v", sn.catalog(), rev)
	}
	st, err := s.Status(timeout(t))
	if err != nil || !st.Embedded || st.Leader == "" || st.Version == "" || st.SizeBytes == 0 || st.QuotaBytes != DefaultQuotaBytes || len(st.Alarms) != 0 || st.Recovering {
		t.Errorf("%+v, %v", st, err)
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v, %v", problems, err)
	}
}

func TestServerDies(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	select {
	case err := <-s.Err():
		t.Fatalf("it died at once: %v", err)
	default:
	}
	// The store's own look at the status must be over: a server that is stopped
	// under it panics.
	eventually(t, func() bool { return testutil.ToFloat64(s.metrics.size) > 0 })
	go s.server.etcd.Server.Stop()
	select {
	case err := <-s.Err():
		if err == nil {
			t.Error("no reason given")
		}
	case <-timeout(t).Done():
		t.Error("nobody was told")
	}
}

func TestWrongEndpoints(t *testing.T) {
	t.Parallel()
	secure, plain := newTLSEtcd(t), newEtcd(t, 1)
	dir := testDir(t)
	otherCA := newTestCA(t, dir, "other")
	stranger := otherCA.issue(t, dir, "stranger", "")
	notEtcd := httptest.NewServer(http.NotFoundHandler())
	defer notEtcd.Close()
	notEtcdTLS := httptest.NewTLSServer(http.NotFoundHandler())
	defer notEtcdTLS.Close()
	silent := listen(t, func(c net.Conn) { io.Copy(io.Discard, c) })
	refused := listen(t, nil)
	closing := listen(t, func(net.Conn) {})
	garbage := filepath.Join(dir, "garbage.pem")
	if err := os.WriteFile(garbage, []byte("not a certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	https := func(url string) string { return strings.Replace(url, "http:", "https:", 1) }
	for name, c := range map[string]struct {
		endpoint string
		tls      TLSFiles
		want     string
	}{
		"no scheme":            {"127.0.0.1:2379", TLSFiles{}, "https://HOST:PORT"},
		"no port":              {"https://127.0.0.1", TLSFiles{}, "https://HOST:PORT"},
		"clear text":           {"http://192.0.2.1:2379", TLSFiles{}, "in clear"},
		"nobody listens":       {"http://" + refused, TLSFiles{}, "refused"},
		"silence":              {"http://" + silent, TLSFiles{}, "does not answer as etcd does"},
		"closes":               {"http://" + closing, TLSFiles{}, "at the first bytes"},
		"a web server":         {notEtcd.URL, TLSFiles{}, "does not speak gRPC"},
		"http to https":        {"http://" + strings.TrimPrefix(secure.urls[0], "https://"), TLSFiles{}, "is it https, or not etcd?"},
		"https to http":        {https(plain.urls[0]), secure.tls, "no TLS is spoken there"},
		"no CA":                {secure.urls[0], TLSFiles{}, "needs a CA file"},
		"missing CA":           {secure.urls[0], TLSFiles{CA: dir + "/missing"}, "no such file"},
		"garbage CA":           {secure.urls[0], TLSFiles{CA: garbage}, "no certificate"},
		"wrong CA":             {secure.urls[0], TLSFiles{CA: otherCA.file, Cert: secure.tls.Cert, Key: secure.tls.Key}, "unknown authority"},
		"no client cert":       {secure.urls[0], TLSFiles{CA: secure.tls.CA}, "client certificate"},
		"a stranger's cert":    {secure.urls[0], TLSFiles{CA: secure.tls.CA, Cert: stranger.Cert, Key: stranger.Key}, "client certificate"},
		"cert and foreign key": {secure.urls[0], TLSFiles{CA: secure.tls.CA, Cert: secure.tls.Cert, Key: stranger.Key}, "does not match"},
		"wrong name":           {secure.urls[0], TLSFiles{CA: secure.tls.CA, Cert: secure.tls.Cert, Key: secure.tls.Key, ServerName: "etcd.example"}, "etcd.example"},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			s, err := Open(t.Context(), Config{TrustDomain: testDomain, Endpoints: []string{c.endpoint}, TLS: c.tls, Logger: testLog(t)})
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	// One good endpoint is enough.
	cfg := plain.config()
	cfg.Endpoints = append([]string{"http://" + refused}, cfg.Endpoints...)
	if _, err := open(t, cfg).Member(timeout(t), "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("with one good endpoint: %v", err)
	}
}

// listen accepts connections for serve, or refuses them where that is nil.
func listen(t *testing.T, serve func(net.Conn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if serve == nil {
		l.Close()
		return l.Addr().String()
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	return l.Addr().String()
}

func TestOpenIsCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s, err := Open(ctx, embeddedConfig(t)); err == nil {
		s.Close()
		t.Error("it opened under a context that has ended")
	}
}

func TestNewerStoreIsRefused(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	s := open(t, e.config())
	sn, err := s.read(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	sn.meta.FeatureLevel = featureLevel + 1
	v, err := encodeState(keyMeta, metaState(sn.meta))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw(t, s).Put(timeout(t), s.prefix+keyMeta, string(v)); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(t.Context(), e.config()); err == nil || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("a store of a newer program: %v", err)
		if s != nil {
			s.Close()
		}
	}
}

func TestOutOfSpace(t *testing.T) {
	t.Parallel()
	cfg := embeddedConfig(t)
	cfg.QuotaBytes = 16 << 20
	s := open(t, cfg)
	ctx := timeout(t)
	var err error
	for i := 0; err == nil && i < 200; i++ {
		p := policyRecord(fmt.Sprintf("p%d", i), "pay", 1).GetPolicy()
		p.Order = []*federationv1.Step{{Regions: []string{strings.Repeat("x", 200<<10)}}}
		_, err = s.PutPolicy(ctx, p)
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("beyond the quota: %v, want ErrFull", err)
	}
	if _, err := s.Member(ctx, "eu-1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("reading goes on: %v", err)
	}
	if st, err := s.Status(ctx); err != nil || len(st.Alarms) == 0 {
		t.Errorf("the alarm is shown: %+v, %v", st, err)
	}
}
