package tunnel_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/e2e/envoytest"
	"github.com/weftmesh/weft/gateway/tunnel"
)

// envoy runs an Envoy with the given bootstrap until the test's end, and waits
// until it is live. ADMIN in it is replaced by a pipe.
func envoy(t *testing.T, bootstrap string) {
	t.Helper()
	binary := envoytest.Binary(t)
	dir := t.TempDir()
	admin := filepath.Join(dir, "admin.sock")
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(bootstrap, "ADMIN", admin)), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-c", file, "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		log.Close()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("envoy: %s", b)
		}
	})
	transport := &http.Transport{Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", admin) }, DisableKeepAlives: true}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		resp, err := (&http.Client{Transport: transport}).Get("http://admin/ready")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatal("envoy does not become live")
		}
	}
}

// pemFiles is a self-signed certificate for localhost, in files and parsed.
func pemFiles(t *testing.T) (certFile, keyFile string, cert tls.Certificate, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	return certFile, keyFile, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// backend echoes, after a greeting, and passes the end on.
func backend(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.WriteString(c, "hello\n")
				io.Copy(c, struct{ io.Reader }{c})
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l
}

type halfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// exchange greets, sends a few megabytes in pieces of many sizes, ends its
// direction and expects all of it back.
func exchange(c halfCloser) error {
	greeting := make([]byte, 6)
	if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "hello\n" {
		return fmt.Errorf("greeting %q: %w", greeting, err)
	}
	piece := strings.Repeat("the weft holds the warp together ", 10_000)
	total := 0
	sent := make(chan error, 1)
	for i := range 40 {
		total += len(piece) / (1 + i)
	}
	go func() {
		for i := range 40 {
			if _, err := io.WriteString(c, piece[:len(piece)/(1+i)]); err != nil {
				sent <- err
				return
			}
		}
		sent <- c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || len(got) != total {
		return fmt.Errorf("%d of %d bytes came back: %w", len(got), total, err)
	}
	for at, i := 0, 0; i < 40; i++ {
		n := len(piece) / (1 + i)
		if string(got[at:at+n]) != piece[:n] {
			return fmt.Errorf("piece %d came back different", i)
		}
		at += n
	}
	return <-sent
}

// TestEnvoyAsTheFarSide: this client, Envoy's server.
func TestEnvoyAsTheFarSide(t *testing.T) {
	certFile, keyFile, _, roots := pemFiles(t)
	port, to := freePort(t), backend(t)
	dead := freePort(t)
	envoy(t, fmt.Sprintf(`
admin: {address: {pipe: {path: ADMIN}}}
static_resources:
  listeners:
  - name: east-west
    address: {socket_address: {address: 127.0.0.1, port_value: %d}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [weft/1]
            tls_certificates: [{certificate_chain: {filename: %s}, private_key: {filename: %s}}]
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          codec_type: HTTP2
          http2_protocol_options: {max_concurrent_streams: 100, initial_stream_window_size: 1048576, initial_connection_window_size: 67108864}
          upgrade_configs: [{upgrade_type: CONNECT}]
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
          route_config:
            virtual_hosts:
            - name: x
              domains: ["*"]
              routes:
              - {match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {exact: "live:1"}}]}, route: {cluster: live, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}
              - {match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {exact: "dead:1"}}]}, route: {cluster: dead, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}}
  clusters:
  - {name: live, type: STATIC, load_assignment: {cluster_name: live, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]}}
  - {name: dead, type: STATIC, load_assignment: {cluster_name: dead, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]}}
`, port, certFile, keyFile, to.Addr().(*net.TCPAddr).Port, dead))
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	tc := tls.Client(tunnel.NewWire(c), &tls.Config{RootCAs: roots, ServerName: "localhost", NextProtos: []string{tunnel.ALPN}})
	if err := tc.Handshake(); err != nil {
		t.Fatal(err)
	}
	client := tunnel.Client(tc, tunnel.Config{MaxStreams: 200})
	defer client.Close()
	<-client.Settled()
	if got := client.Room(); got != 100 {
		t.Errorf("room for %d streams, Envoy allows 100", got)
	}
	if _, err := client.Ping(t.Context()); err != nil {
		t.Errorf("ping: %v", err)
	}
	var refusal *tunnel.Refusal
	if _, _, err := client.Open(t.Context(), tunnel.Request{Authority: "dead:1"}); !errors.As(err, &refusal) || refusal.Status != 503 {
		t.Errorf("a dead backend: %v", err)
	}
	if _, _, err := client.Open(t.Context(), tunnel.Request{Authority: "other:1"}); !errors.As(err, &refusal) || refusal.Status != 404 {
		t.Errorf("an unknown authority: %v", err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			s, _, err := client.Open(t.Context(), tunnel.Request{Authority: "live:1", Header: tunnel.Header{{Name: "weft-source", Value: "a"}}})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			if err := exchange(s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := client.Stats().Active; n != 0 {
		t.Errorf("%d streams left", n)
	}
}

// TestEnvoyAsTheSource: Envoy's client, this server. A stream is refused at
// first: Envoy must try again.
func TestEnvoyAsTheSource(t *testing.T) {
	certFile, _, cert, _ := pemFiles(t)
	to, port := backend(t), freePort(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{tunnel.ALPN}, MinVersion: tls.VersionTLS13}
	var mu sync.Mutex
	var servers []*tunnel.Tunnel
	refused := false
	handler := func(in *tunnel.Incoming) {
		mu.Lock()
		first := !refused
		refused = true
		mu.Unlock()
		if first {
			in.Refuse(503, tunnel.Header{{Name: "weft-reason", Value: "not yet"}})
			return
		}
		if in.Authority != "payments:80" || in.Header.Get("weft-source") != "a" {
			t.Errorf("asked for %s, %v", in.Authority, in.Header)
		}
		conn, err := net.Dial("tcp", to.Addr().String())
		if err != nil {
			in.Refuse(503, nil)
			return
		}
		defer conn.Close()
		s, err := in.Accept(nil)
		if err != nil {
			return
		}
		var up sync.WaitGroup
		up.Go(func() { s.WriteTo(conn); conn.(*net.TCPConn).CloseWrite() })
		s.ReadFrom(conn)
		s.CloseWrite()
		up.Wait()
	}
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			tc := tls.Server(tunnel.NewWire(c), config)
			if err := tc.Handshake(); err != nil {
				c.Close()
				continue
			}
			mu.Lock()
			servers = append(servers, tunnel.Serve(tc, tunnel.Config{MaxStreams: 20}, handler))
			mu.Unlock()
		}
	})
	defer func() {
		l.Close()
		accepting.Wait()
		for _, s := range servers {
			s.Close()
		}
	}()
	envoy(t, fmt.Sprintf(`
admin: {address: {pipe: {path: ADMIN}}}
static_resources:
  listeners:
  - name: imp
    address: {socket_address: {address: 127.0.0.1, port_value: %d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: x
          cluster: out
          max_connect_attempts: 5
          backoff_options: {base_interval: 0.005s, max_interval: 0.01s}
          tunneling_config: {hostname: "payments:80", headers_to_add: [{header: {key: weft-source, value: a}}]}
  clusters:
  - name: out
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {max_concurrent_streams: 20, initial_stream_window_size: 1048576, initial_connection_window_size: 67108864, connection_keepalive: {interval: 1s, timeout: 3s}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          tls_params: {tls_maximum_protocol_version: TLSv1_3}
          alpn_protocols: [weft/1]
          validation_context: {trusted_ca: {filename: %s}}
    load_assignment: {cluster_name: out, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]}
`, port, certFile, l.Addr().(*net.TCPAddr).Port))
	ask := func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		return exchange(c.(*net.TCPConn))
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := ask(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()

	// A graceful end: what is open goes on, what is new gets another tunnel.
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	greeting := make([]byte, 6)
	if _, err := io.ReadFull(c, greeting); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	before := len(servers)
	for _, s := range servers {
		s.Drain()
	}
	mu.Unlock()
	for range 20 {
		if err := ask(); err != nil {
			t.Errorf("after GOAWAY: %v", err)
		}
	}
	mu.Lock()
	if len(servers) == before {
		t.Error("no new tunnel after GOAWAY")
	}
	mu.Unlock()
	io.WriteString(c, "still there")
	c.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "still there" || err != nil {
		t.Errorf("the old connection: %q, %v", b, err)
	}
}
