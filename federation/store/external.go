package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// probeTimeout bounds the look at one endpoint before it is used.
const probeTimeout = 3 * time.Second

type externalServers struct{ tls *tls.Config }

// findServers looks at every endpoint by hand: etcd's client would hide why it
// cannot connect behind its own retries. One good endpoint is enough.
func findServers(ctx context.Context, cfg *Config) (*externalServers, error) {
	secure := false
	urls := make([]*url.URL, len(cfg.Endpoints))
	for i, ep := range cfg.Endpoints {
		u, err := url.Parse(ep)
		if err != nil || u.Host == "" || u.Port() == "" || u.Path != "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("store: etcd endpoint %q: write it as https://HOST:PORT", ep)
		}
		if u.Scheme == "http" && !isLoopback(u.Hostname()) {
			return nil, fmt.Errorf("store: etcd endpoint %q: everything would travel in clear; use https", ep)
		}
		secure = secure || u.Scheme == "https"
		urls[i] = u
	}
	found := new(externalServers)
	if secure {
		tc, err := cfg.tlsConfig()
		if err != nil {
			return nil, err
		}
		found.tls = tc
	}
	var errs error
	for _, u := range urls {
		err := probe(ctx, u, found.tls)
		if err == nil {
			return found, nil
		}
		errs = errors.Join(errs, fmt.Errorf("store: etcd endpoint %s: %w", u, err))
	}
	return nil, errs
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// tlsConfig verifies etcd by the CA file alone, and shows the client
// certificate as it is on disk at each handshake.
func (c *Config) tlsConfig() (*tls.Config, error) {
	if c.TLS.CA == "" {
		return nil, errors.New("store: etcd over https needs a CA file, by which it is recognised")
	}
	pem, err := os.ReadFile(c.TLS.CA)
	if err != nil {
		return nil, fmt.Errorf("store: etcd CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("store: etcd CA: %s holds no certificate in PEM", c.TLS.CA)
	}
	tc := &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: c.TLS.ServerName,
		NextProtos: []string{"h2"}, Time: c.Clock.Now,
	}
	if c.TLS.Cert != "" {
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(c.TLS.Cert, c.TLS.Key)
			if err != nil {
				return nil, fmt.Errorf("store: etcd client certificate: %w", err)
			}
			return &cert, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		tc.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return tc, nil
}

// probe connects to u and exchanges the first bytes of HTTP/2, which every
// gRPC server sends, after the server has also judged our certificate.
func probe(ctx context.Context, u *url.URL, tc *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return fmt.Errorf("cannot connect: %w", err)
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if u.Scheme == "https" {
		tc := tc.Clone()
		if tc.ServerName == "" {
			tc.ServerName = u.Hostname()
		}
		secured := tls.Client(conn, tc)
		if err := secured.HandshakeContext(ctx); err != nil {
			var record tls.RecordHeaderError
			if errors.As(err, &record) || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
				return errors.New("no TLS is spoken there: is it http, or not etcd?")
			}
			return fmt.Errorf("TLS: %w", err)
		}
		conn = secured
	}
	// RFC 9113, 3.4: the client's preface, then an empty SETTINGS frame; the
	// server's first frame is SETTINGS (type 4) as well.
	header := make([]byte, 9)
	_, err = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
	if err == nil {
		_, err = io.ReadFull(conn, header)
	}
	if err != nil {
		var alert tls.AlertError
		var operation *net.OpError
		switch {
		case errors.As(err, &alert), errors.As(err, &operation) && operation.Op == "remote error":
			return fmt.Errorf("it refuses our client certificate, or wants one: %w", err)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
			return errors.New("it closed the connection at the first bytes: is it https, or not etcd?")
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errors.New("something listens there, but it does not answer as etcd does")
		}
		return fmt.Errorf("after connecting: %w", err)
	}
	if bytes.HasPrefix(header, []byte("HTTP/")) || header[3] != 4 {
		return errors.New("something listens there, but it does not speak gRPC: not etcd?")
	}
	return nil
}
