package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// Bounds of the listeners for proxies.
const (
	proxyMessage   = 4 << 20 // bytes of one message from a proxy
	proxyStreams   = 256     // open at once on one connection
	proxyHandshake = 10 * time.Second
)

// listening is one bound listener and its gRPC server.
type listening struct {
	name     string
	listener net.Listener
	server   *grpc.Server
}

// serve serves until ctx ends. Streams to proxies have no end of their own, so
// they are cut: proxies keep what they have and come back.
func (l listening) serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, l.server.Stop)
	defer stop()
	if err := l.server.Serve(l.listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// listen binds the sockets, the TCP listener and DNS.
func (a *Agent) listen(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			a.closeListeners()
		}
	}()
	for _, v := range a.driver.views {
		if v.socket.Path == "" {
			continue
		}
		l, err := listenUnix(ctx, v.socket.Path, v.socket.Mode)
		if err != nil {
			return err
		}
		a.addListener("socket "+v.socket.Path, l, socketCredentials{id: v.identity, view: v.name})
	}
	if at := a.config.XDSListen; at != "" {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", at)
		if err != nil {
			return fmt.Errorf("--xds-listen %s: %w", at, err)
		}
		a.xdsAddr = l.Addr()
		a.addListener("xds "+at, l, credentials.NewTLS(a.verifier.Server(identity.ServerConfig{
			SVID:      a.who.source,
			Authorize: identity.AllowCluster(a.who.Cluster),
		})))
	}
	if at := a.config.DNSListen; at != "" {
		if a.dnsUDP, a.dnsTCP, err = listenDNS(ctx, at); err != nil {
			return fmt.Errorf("--dns-listen %s: %w", at, err)
		}
	}
	return nil
}

func (a *Agent) addListener(name string, l net.Listener, creds credentials.TransportCredentials) {
	s := grpc.NewServer(
		grpc.Creds(creds),
		grpc.MaxRecvMsgSize(proxyMessage),
		grpc.MaxConcurrentStreams(proxyStreams),
		grpc.ConnectionTimeout(proxyHandshake),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	federationv1.RegisterLocalServer(s, localServer{agent: a})
	a.xds.Register(s, func(ctx context.Context) (xds.View, error) {
		c, err := a.callerOf(ctx)
		return c.view, err
	})
	a.listens = append(a.listens, listening{name: name, listener: l, server: s})
}

// closeListeners closes what was bound; sockets disappear with it.
func (a *Agent) closeListeners() {
	for _, l := range a.listens {
		_ = l.listener.Close()
	}
	if a.dnsUDP != nil {
		_ = a.dnsUDP.Close()
		_ = a.dnsTCP.Close()
	}
}

// caller is who is at the other end of a connection, and what it is configured
// by.
type caller struct {
	id   spiffeid.ID
	view xds.View
}

// callerOf is what a connection's credential stands for: that of the socket, or
// of a verified certificate. Nothing that a message says about its sender
// counts.
func (a *Agent) callerOf(ctx context.Context) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "the connection has no credential")
	}
	switch info := p.AuthInfo.(type) {
	case socketAuth:
		return caller{info.id, info.view}, nil
	case credentials.TLSInfo:
		subject, ok := a.verifier.PeerOf(info.State)
		if !ok {
			break
		}
		// Whom the handshake admitted may have been denied since.
		if err := a.verifier.Recheck(info.State); err != nil {
			return caller{}, status.Error(codes.PermissionDenied, err.Error())
		}
		for _, v := range a.driver.views {
			if v.identity == subject.ID {
				return caller{subject.ID, v.name}, nil
			}
		}
		return caller{}, status.Errorf(codes.PermissionDenied, "no proxy of this agent is configured with the identity %s: add it to sockets", subject.ID)
	}
	return caller{}, status.Error(codes.Unauthenticated, "the connection has no credential that stands for an identity")
}

// acks are how far the proxies' streams are: the revision that all of them have
// acknowledged, and each one's answer to applied.
func (a *Agent) acks(applied federation.Revision) (federation.Revision, []*federationv1.ProxyAck) {
	all := applied
	var list []*federationv1.ProxyAck
	for _, s := range a.xds.Streams() {
		acked := streamRevision(s, applied)
		all = lower(all, acked)
		list = append(list, &federationv1.ProxyAck{
			Name:     s.Node,
			Acked:    acked.Covers(applied) && len(s.Rejected) == 0,
			Revision: federationv1.EncodeRevision(acked),
			Nack:     rejections(s.Rejected),
			At:       timestamppb.New(a.clock.Now()),
		})
	}
	return all, list
}

// streamRevision is what a stream has acknowledged.
func streamRevision(s xds.StreamStatus, applied federation.Revision) federation.Revision {
	if s.InSync && s.Applied == (federation.Revision{}) {
		return applied
	}
	return s.Applied
}

// lower is the one of two revisions that includes less; of two incarnations,
// neither includes the other.
func lower(a, b federation.Revision) federation.Revision {
	switch {
	case a.Incarnation != b.Incarnation:
		return federation.Revision{}
	case b.Number < a.Number:
		return b
	}
	return a
}

// rejections is the text of what a proxy refused, or empty.
func rejections(list []xds.Rejection) string {
	text := ""
	for i, r := range list {
		if i > 0 {
			text += "; "
		}
		if i == 3 {
			return text + fmt.Sprintf("and %d more", len(list)-i)
		}
		text += r.Name.String() + ": " + r.Cause
	}
	return text
}

// proxyAck is what one attached proxy has acknowledged: its stream is the one
// of its view that bears its name, or all of the view's, where none does.
func proxyAck(streams []xds.StreamStatus, view xds.View, name string, applied federation.Revision) (federation.Revision, string) {
	of := func(named bool) []xds.StreamStatus {
		return slices.DeleteFunc(slices.Clone(streams), func(s xds.StreamStatus) bool {
			return s.View != view || named && s.Node != name
		})
	}
	mine := of(true)
	if len(mine) == 0 {
		mine = of(false)
	}
	if len(mine) == 0 {
		return federation.Revision{}, ""
	}
	rev, nack := applied, ""
	for _, s := range mine {
		rev = lower(rev, streamRevision(s, applied))
		if nack == "" {
			nack = rejections(s.Rejected)
		}
	}
	return rev, nack
}

// status is what the agent tells the controller of itself.
func (a *Agent) status() *federationv1.Status {
	var applied federation.Revision
	if force := a.inForce.Load(); force != nil {
		applied = force.catalog.Revision()
	}
	streams := a.xds.Streams()
	acked, _ := a.acks(applied)
	gateways, bundle := a.proxies.status(a.who.Cluster, func(x *proxy) (federation.Revision, string) {
		return proxyAck(streams, x.view, x.hello.GetName(), applied)
	})
	return &federationv1.Status{
		Applied:     federationv1.EncodeRevision(applied),
		Acked:       federationv1.EncodeRevision(acked),
		Gateways:    gateways,
		Denials:     a.mesh.hello().GetDenials(),
		BundleAcked: bundle,
	}
}

// proxiesChanged takes what the proxies report: probes into the world, the rest
// into the status.
func (a *Agent) proxiesChanged() {
	now := a.proxies.probes()
	a.mu.Lock()
	before := a.probed
	a.probed = now
	a.mesh.setProbes(before, now)
	a.mu.Unlock()
	a.link.statusChanged()
}

// refusals keeps what proxies refuse as findings until it is mended.
func (a *Agent) refusals() {
	var list []federation.Finding
	for _, s := range a.xds.Streams() {
		for _, r := range s.Rejected {
			name := s.Node
			if name == "" {
				name = string(s.View)
			}
			list = append(list, federation.NewFinding(federation.CodeProxyRefusedConfig,
				federation.Ref{Kind: "gateway", Name: string(a.who.Cluster) + "/" + name},
				"%s: %s", r.Name, r.Cause))
		}
	}
	a.findings.set("proxies", list)
}
