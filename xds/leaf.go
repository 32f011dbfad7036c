package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// LeafServer is the SDS server of the process that holds a private key, for the
// Envoy beside it. It serves one secret, SecretLeaf, to whoever can open its
// socket: register it only with a server on a unix socket in a directory that
// nobody else can enter.
type LeafServer struct {
	server *Server
	source x509svid.Source
}

const leafView View = "leaf"

// NewLeafServer serves what source has, once Update was called.
func NewLeafServer(source x509svid.Source, c clock.Clock, log *slog.Logger) *LeafServer {
	return &LeafServer{source: source, server: NewServer(ServerConfig{Clock: c, Logger: log})}
}

// Register adds SDS to a gRPC server.
func (l *LeafServer) Register(r grpc.ServiceRegistrar) {
	l.server.Register(r, func(context.Context) (View, error) { return leafView, nil })
}

// Update serves the leaf that the source has now; call it when that changes. On
// an error the last good leaf is served on.
func (l *LeafServer) Update() error {
	svid, err := l.source.GetX509SVID()
	if err != nil {
		return fmt.Errorf("leaf for SDS: %w", err)
	}
	r, err := leafSecret(svid)
	if err != nil {
		return err
	}
	l.server.Set(leafView, federation.Revision{}, Delta{Changed: []*Resource{r}})
	return nil
}

// InUse reports whether every Envoy that is connected has taken the present
// leaf, and how many there are.
func (l *LeafServer) InUse() (streams int, all bool) {
	all = true
	for _, s := range l.server.Streams() {
		streams++
		all = all && s.InSync
	}
	return streams, all
}

func leafSecret(svid *x509svid.SVID) (*Resource, error) {
	if len(svid.Certificates) == 0 {
		return nil, errors.New("leaf for SDS: no certificate")
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		return nil, fmt.Errorf("leaf for SDS of %s: %w", svid.ID, err)
	}
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	e := new(encoder)
	r, err := e.resource(TypeSecret, SecretLeaf, &tlsv3.Secret{
		Name: SecretLeaf,
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(chain), PrivateKey: inline(key),
		}},
	})
	if err != nil {
		// The schema's complaints may quote the value.
		return nil, fmt.Errorf("leaf for SDS of %s cannot be encoded", svid.ID)
	}
	// Versions are logged: this one comes from what is public.
	r.Version = contentVersion(chain)
	return r, nil
}
