package controller

import (
	"context"
	"crypto/tls"
	"net"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// role is what a caller may be, as a set: a method is open to the callers whose
// role is in its set.
type role uint8

const (
	// anyone is a caller without a certificate: a token or an enrolled key in
	// the request is the credential.
	anyone role = 1 << iota
	agent
	controller
	viewer
	operator
	admin
)

// People, by what they may do at least.
const (
	mayRead    = viewer | operator | admin
	mayOperate = operator | admin
)

func (r role) String() string {
	var names []string
	for i, name := range []string{"anyone", "agent", "controller", "viewer", "operator", "admin"} {
		if r&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "nobody"
	}
	return strings.Join(names, ", ")
}

// parseRole reads an operator's role as it is stored.
func parseRole(s string) (role, bool) {
	switch s {
	case "viewer":
		return viewer, true
	case "operator":
		return operator, true
	case "admin":
		return admin, true
	}
	return 0, false
}

// allowed says who may call a method; a method that is not listed is open to
// nobody. A controller asks another one what only the other's agent knows.
func allowed(method string) role {
	switch method {
	case federationv1.Enroll_Enroll_FullMethodName,
		federationv1.Enroll_Renew_FullMethodName:
		return anyone | agent
	case federationv1.Issue_Issue_FullMethodName,
		federationv1.Sync_Sync_FullMethodName:
		return agent
	case federationv1.Admin_List_FullMethodName,
		federationv1.Admin_Watch_FullMethodName,
		federationv1.Admin_GetStatus_FullMethodName,
		federationv1.Admin_GetTrust_FullMethodName,
		federationv1.Admin_RenewCredential_FullMethodName:
		return mayRead
	case federationv1.Admin_Why_FullMethodName:
		return mayRead | controller
	case federationv1.Admin_Call_FullMethodName:
		return mayOperate | controller
	case federationv1.Admin_ApplyPolicy_FullMethodName,
		federationv1.Admin_DeletePolicy_FullMethodName,
		federationv1.Admin_Drain_FullMethodName,
		federationv1.Admin_Undrain_FullMethodName:
		return mayOperate
	case federationv1.Admin_RegisterCluster_FullMethodName,
		federationv1.Admin_CreateToken_FullMethodName,
		federationv1.Admin_SetGrants_FullMethodName,
		federationv1.Admin_DeregisterCluster_FullMethodName:
		return admin
	}
	return 0
}

// caller is who makes a request.
type caller struct {
	role  role
	who   identity.Peer // zero for anyone
	state tls.ConnectionState
	addr  string // where from, without the port
}

// name is the caller in logs and in what is stored.
func (c caller) name() string {
	if c.role == anyone {
		return "unidentified caller"
	}
	return c.who.String()
}

// cluster is the one that an agent speaks for.
func (c caller) cluster() federation.ClusterID { return c.who.Cluster }

type callerKey struct{}

// callerOf is the caller that the interceptors have let in.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// gate decides about every call before its handler runs.
type gate struct {
	verifier *identity.Verifier
	// roleOf is a person's role by name, or a status that refuses.
	roleOf func(ctx context.Context, name string) (role, error)
}

// admit says who calls, or refuses.
func (g *gate) admit(ctx context.Context, method string) (context.Context, error) {
	c, err := g.identify(ctx)
	if err != nil {
		return nil, err
	}
	open := allowed(method)
	if open&c.role == 0 {
		if c.role == anyone {
			return nil, status.Errorf(codes.Unauthenticated,
				"%s needs a client certificate and none was shown: use an enrolled agent's, or a person's from 'weft' contexts", method)
		}
		return nil, status.Errorf(codes.PermissionDenied,
			"%s may not call %s: it is open to %v; ask an admin of the mesh", c.name(), method, open)
	}
	return context.WithValue(ctx, callerKey{}, c), nil
}

func (g *gate) identify(ctx context.Context) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "the connection has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "the connection has no TLS")
	}
	c := caller{role: anyone, state: info.State, addr: hostOf(p.Addr.String())}
	if len(info.State.PeerCertificates) == 0 {
		return c, nil
	}
	// The handshake has verified it; a denial may have come since.
	if err := g.verifier.Recheck(info.State); err != nil {
		return caller{}, status.Errorf(codes.PermissionDenied, "the connection's certificate is refused now: %v", err)
	}
	who, ok := g.verifier.PeerOf(info.State)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "the connection's certificate was not verified here")
	}
	c.who = who
	switch who.Role {
	case identity.RoleAgent:
		c.role = agent
	case identity.RoleController:
		c.role = controller
	case identity.RoleOperator:
		var err error
		if c.role, err = g.roleOf(ctx, who.Name); err != nil {
			return caller{}, err
		}
	default:
		c.role = 0
	}
	return c, nil
}

func (g *gate) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := g.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (g *gate) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := g.admit(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return handler(srv, admittedStream{ServerStream: ss, ctx: ctx})
}

// admittedStream is a stream whose context knows its caller.
type admittedStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s admittedStream) Context() context.Context { return s.ctx }

// hostOf is an address without its port.
func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return host
}
