package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap/zapcore"
)

// testEtcd is an external etcd: real members that serve on loopback addresses
// of their own, and can be stopped and started again.
type testEtcd struct {
	t       testing.TB
	configs []*embed.Config
	members []*embed.Etcd
	urls    []string
	tls     TLSFiles
}

// loopback is an address of 127/8 that no other test is likely to use, so that
// a server can come back on it.
func loopback() string {
	return fmt.Sprintf("127.%d.%d.%d", 1+mathrand.N(254), mathrand.N(256), 1+mathrand.N(254))
}

// newEtcd makes and starts an etcd of size members.
func newEtcd(t testing.TB, size int, edit ...func(*embed.Config)) *testEtcd {
	t.Helper()
	e := &testEtcd{t: t, members: make([]*embed.Etcd, size)}
	var initial []string
	for i := range size {
		host := loopback()
		client, peer := url.URL{Scheme: "http", Host: host + ":2379"}, url.URL{Scheme: "http", Host: host + ":2380"}
		cfg := embed.NewConfig()
		cfg.Name = fmt.Sprintf("m%d", i)
		cfg.Dir = filepath.Join(testDir(t), "etcd")
		cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
		cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
		cfg.InitialClusterToken = rand.Text()
		cfg.EnableGRPCGateway = false
		cfg.UnsafeNoFsync = true
		if size > 1 {
			// Slow enough for a busy machine: a lost leader makes tests wait.
			cfg.TickMs, cfg.ElectionMs = 50, 1000
		}
		cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(slog.New(slog.DiscardHandler), zapcore.ErrorLevel))
		for _, f := range edit {
			f(cfg)
		}
		e.configs = append(e.configs, cfg)
		initial = append(initial, cfg.Name+"="+peer.String())
		e.urls = append(e.urls, cfg.ListenClientUrls[0].String())
	}
	for _, cfg := range e.configs {
		cfg.InitialCluster = strings.Join(initial, ",")
		cfg.InitialClusterToken = e.configs[0].InitialClusterToken
	}
	e.start()
	t.Cleanup(e.stop)
	return e
}

// newTLSEtcd is one member that serves TLS and asks for a client certificate.
func newTLSEtcd(t testing.TB) *testEtcd {
	t.Helper()
	dir := testDir(t)
	ca := newTestCA(t, dir, "ca")
	var host string
	e := newEtcd(t, 1, func(cfg *embed.Config) {
		cfg.ListenClientUrls[0].Scheme = "https"
		cfg.AdvertiseClientUrls[0].Scheme = "https"
		host = cfg.ListenClientUrls[0].Hostname()
		server := ca.issue(t, dir, "server", host)
		cfg.ClientTLSInfo = transport.TLSInfo{CertFile: server.Cert, KeyFile: server.Key, TrustedCAFile: ca.file, ClientCertAuth: true}
	})
	e.tls = ca.issue(t, dir, "client", "")
	return e
}

func (e *testEtcd) start() {
	e.t.Helper()
	var wg sync.WaitGroup
	for i := range e.configs {
		wg.Go(func() { e.startMember(i) })
	}
	wg.Wait()
}

func (e *testEtcd) startMember(i int) {
	m, err := embed.StartEtcd(e.configs[i])
	if err != nil {
		e.t.Errorf("start etcd: %v", err)
		return
	}
	e.members[i] = m
	select {
	case <-m.Server.ReadyNotify():
	case <-time.After(time.Minute):
		e.t.Error("etcd was not ready in time")
	}
}

func (e *testEtcd) stopMember(i int) {
	if e.members[i] != nil {
		e.members[i].Close()
		e.members[i] = nil
	}
}

func (e *testEtcd) stop() {
	for i, m := range e.members {
		if m != nil && len(e.members) > 1 {
			// Else each leader tries to hand over to a member that stops as well.
			m.Server.HardStop()
		}
		e.stopMember(i)
	}
}

// config is that of a store which uses e.
func (e *testEtcd) config() Config {
	return Config{TrustDomain: testDomain, Endpoints: e.urls, TLS: e.tls, Logger: testLog(e.t)}
}

// raw is a client that goes past the store.
func raw(t testing.TB, s *Store) *clientv3.Client {
	t.Helper()
	cc := clientv3.Config{Endpoints: s.client.Endpoints(), Logger: zapLogger(slog.New(slog.DiscardHandler), zapcore.ErrorLevel)}
	if len(s.cfg.Endpoints) > 0 && s.cfg.TLS.CA != "" {
		tc, err := s.cfg.tlsConfig()
		if err != nil {
			t.Fatal(err)
		}
		cc.TLS = tc
	}
	c, err := clientv3.New(cc)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// forEachEtcd runs a test against every kind of etcd.
func forEachEtcd(t *testing.T, test func(*testing.T, *Store)) {
	t.Run("embedded", func(t *testing.T) { test(t, open(t, embeddedConfig(t))) })
	t.Run("external, TLS", func(t *testing.T) { test(t, open(t, newTLSEtcd(t).config())) })
	t.Run("external, three members", func(t *testing.T) { test(t, open(t, newEtcd(t, 3).config())) })
}

// eventually waits for a state.
func eventually(t testing.TB, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come to that")
		}
	}
}

type testCA struct {
	file string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newTestCA(t testing.TB, dir, name string) *testCA {
	t.Helper()
	ca := &testCA{file: filepath.Join(dir, name+".pem")}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca.key = newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writePEM(t, ca.file, "CERTIFICATE", der)
	return ca
}

// issue writes a certificate for a server at host, or for a client.
func (ca *testCA) issue(t testing.TB, dir, name, host string) TLSFiles {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if host != "" {
		template.IPAddresses = []net.IP{net.ParseIP(host)}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	f := TLSFiles{CA: ca.file, Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
	writePEM(t, f.Cert, "CERTIFICATE", der)
	writePEM(t, f.Key, "PRIVATE KEY", pkcs8)
	return f
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func writePEM(t testing.TB, file, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// etcdRevision is the store's revision as etcd counts it.
func etcdRevision(t testing.TB, s *Store) int64 {
	t.Helper()
	sn, _, err := s.readOnce(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return sn.revision
}
