package xds

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// View names what one kind of proxy is sent. Every proxy that its credential
// gives the same View gets the same resources.
type View string

// Identify says which view a stream is for, from the credential in its context
// alone: the peer's certificate, or the socket that it came by.
type Identify func(context.Context) (View, error)

// ServerConfig is what a Server needs and whom it tells.
type ServerConfig struct {
	Clock  clock.Clock
	Logger *slog.Logger
	// OnAck, if set, hears of each response that a proxy took, and OnNack of
	// each resource that it refused. They are called from the streams'
	// goroutines and must not wait: the stream does.
	OnAck  func(Ack)
	OnNack func(Nack)
}

// Ack is a response that a proxy took.
type Ack struct {
	View    View
	Node    string // as the proxy calls itself; no identity
	Type    Type
	Names   []string
	Applied federation.Revision // everything that changed up to here is in use
}

// Nack is a resource that a proxy refused; its last good version stays in use.
type Nack struct {
	View View
	Node string
	Rejection
}

// Rejection is why a version of a resource is not in use.
type Rejection struct {
	Name    Name // empty if the proxy did not say which
	Version string
	Cause   string // in the proxy's words
	Since   time.Time
}

// StreamStatus is one proxy's state.
type StreamStatus struct {
	View     View
	Node     string // as the proxy calls itself; no identity
	Agent    string // its software and version
	Peer     string // network address
	Protocol string // "delta" or "whole"
	Since    time.Time
	// Applied: everything that changed up to this revision was acked. It is
	// the view's when InSync.
	Applied  federation.Revision
	InSync   bool
	Rejected []Rejection
}

// Server serves views to proxies by ADS, and secrets by SDS. It pushes a change
// as soon as it is set, each stream one response of a type at a time: what
// changes again before a proxy took the last response is sent once.
//
// A view is served from its first Set on. Until then its streams wait, and
// proxies keep what they have: a restarted agent withdraws nothing.
type Server struct {
	cfg ServerConfig

	mu    sync.Mutex
	views map[View]*view
}

// NewServer has no views yet.
func NewServer(cfg ServerConfig) *Server {
	if cfg.OnAck == nil {
		cfg.OnAck = func(Ack) {}
	}
	if cfg.OnNack == nil {
		cfg.OnNack = func(Nack) {}
	}
	return &Server{cfg: cfg, views: make(map[View]*view)}
}

// Register adds ADS and SDS to a gRPC server whose streams identify knows. One
// Server may be registered with many, each with an identify of its own.
func (s *Server) Register(r grpc.ServiceRegistrar, identify Identify) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, &adsService{server: s, identify: identify})
	secretv3.RegisterSecretDiscoveryServiceServer(r, &sdsService{server: s, identify: identify})
}

// Set changes a view. The first Set of a view must be all of it: a proxy that
// reconnects is told to remove what it does not hold.
func (s *Server) Set(v View, rev federation.Revision, d Delta) {
	s.view(v).set(rev, d)
}

// Drop ends a view and its streams.
func (s *Server) Drop(key View) {
	s.mu.Lock()
	v := s.views[key]
	delete(s.views, key)
	s.mu.Unlock()
	if v == nil {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropped = true
	for st := range v.streams {
		st.wake()
	}
}

// Streams is the state of every stream, by view, then by time of connection.
func (s *Server) Streams() []StreamStatus {
	s.mu.Lock()
	views := make([]*view, 0, len(s.views))
	for _, v := range s.views {
		views = append(views, v)
	}
	s.mu.Unlock()
	var all []StreamStatus
	for _, v := range views {
		v.mu.Lock()
		for st := range v.streams {
			all = append(all, st.status())
		}
		v.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b StreamStatus) int {
		if c := strings.Compare(string(a.View), string(b.View)); c != 0 {
			return c
		}
		return a.Since.Compare(b.Since)
	})
	return all
}

func (s *Server) view(key View) *view {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.views[key]
	if v == nil {
		v = newView(key)
		s.views[key] = v
	}
	return v
}

// serve runs one stream until it ends. only limits it to one type of resource.
func (s *Server) serve(ctx context.Context, identify Identify, protocol protocol, only *Type) error {
	key, err := identify(ctx)
	if err != nil {
		if _, ok := status.FromError(err); ok {
			return err
		}
		return status.Error(codes.PermissionDenied, err.Error())
	}
	st := newStream(ctx, s, s.view(key), protocol, only)
	err = st.run(ctx)
	if ctx.Err() != nil || errors.Is(err, context.Canceled) {
		s.cfg.Logger.DebugContext(ctx, "xds stream ended", "view", key, "node", st.node)
		return status.FromContextError(ctx.Err()).Err()
	}
	return err
}

type adsService struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	server   *Server
	identify Identify
}

func (a *adsService) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return a.server.serve(g.Context(), a.identify, deltaProtocol{g}, nil)
}

func (a *adsService) StreamAggregatedResources(g discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return a.server.serve(g.Context(), a.identify, wholeProtocol{g}, nil)
}

type sdsService struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	server   *Server
	identify Identify
}

func (a *sdsService) DeltaSecrets(g secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	only := TypeSecret
	return a.server.serve(g.Context(), a.identify, deltaProtocol{g}, &only)
}

func (a *sdsService) StreamSecrets(g secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	only := TypeSecret
	return a.server.serve(g.Context(), a.identify, wholeProtocol{g}, &only)
}
