package controller

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

const (
	whyTimeout  = 3 * time.Second
	callTimeout = 15 * time.Second // where the request sets none
	maxCall     = 60 * time.Second
)

// errNoAgent says that nobody here can answer for a cluster.
var errNoAgent = errors.New("its agent is not connected")

// Why explains where the traffic of one cluster goes. The cluster's agent
// answers, whichever controller it is connected to; where it cannot, the
// controller predicts.
func (s *adminServer) Why(ctx context.Context, req *federationv1.WhyRequest) (*federationv1.WhyResponse, error) {
	c := s.c
	from, caller, svc, err := s.parseWhy(req)
	if err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, whyTimeout)
	defer cancel()
	answer, err := c.askAgent(short, from, &federationv1.Question{Question: &federationv1.Question_Why{Why: req}},
		callerOf(ctx).role != controller, func(ctx context.Context, peer federationv1.AdminClient) (*federationv1.Answer, error) {
			resp, err := peer.Why(ctx, req)
			return &federationv1.Answer{Answer: &federationv1.Answer_Why{Why: resp}}, err
		})
	if err == nil && answer.GetWhy() != nil {
		return answer.GetWhy(), nil
	}
	if callerOf(ctx).role == controller {
		// The one that asked predicts for itself.
		return nil, status.Errorf(codes.FailedPrecondition, "cluster %s: %v", from, err)
	}
	now := c.state.current()
	var plan federation.Plan
	if port := req.GetPort(); port != 0 {
		plan = now.Catalog.PlanPort(svc, uint16(port), caller, now.World)
	} else {
		plan = now.Catalog.Plan(svc, caller, now.World)
	}
	resp := &federationv1.WhyResponse{
		Plan: federationv1.EncodePlan(plan), Predicted: true, World: now.World.Digest(),
		PredictedBecause: fmt.Sprintf("cluster %s has not answered: %s", from, plainText(err)),
	}
	if p := c.store.Presences()[from]; p != nil {
		resp.Acked = p.GetStatus().GetAcked()
	}
	return resp, nil
}

func (s *adminServer) parseWhy(req *federationv1.WhyRequest) (federation.ClusterID, federation.Caller, federation.ServiceID, error) {
	from, svc, member, err := s.parseTarget(req.GetFrom(), req.GetNamespace(), req.GetName(), req.GetPort())
	if err != nil {
		return "", federation.Caller{}, svc, err
	}
	caller := federation.Caller{Cluster: from, Zone: member.Zone}
	if req.GetCaller() != "" {
		if caller.ID, err = spiffeid.FromString(req.GetCaller()); err != nil {
			return "", caller, svc, invalid("the caller's identity cannot be read: %v", err)
		}
	}
	return from, caller, svc, nil
}

func (s *adminServer) parseTarget(cluster, namespace, name string, port uint32) (federation.ClusterID, federation.ServiceID, *federation.Member, error) {
	svc, err := federation.ParseServiceID(namespace + "/" + name)
	if err != nil {
		return "", svc, nil, invalid("%v", err)
	}
	from, err := parseCluster(cluster)
	if err != nil {
		return "", svc, nil, err
	}
	if port > 65535 {
		return "", svc, nil, invalid("there is no port %d", port)
	}
	m, ok := s.c.state.current().Catalog.Member(from)
	if !ok {
		return "", svc, nil, status.Errorf(codes.NotFound, "there is no cluster %q: 'weft get clusters' lists them", from)
	}
	return from, svc, m, nil
}

// Call makes an agent send a real request through its mesh.
func (s *adminServer) Call(ctx context.Context, req *federationv1.CallRequest) (*federationv1.CallResponse, error) {
	from, _, _, err := s.parseTarget(req.GetFrom(), req.GetNamespace(), req.GetName(), req.GetPort())
	if err != nil {
		return nil, err
	}
	timeout := callTimeout
	if req.GetTimeout() != nil {
		if timeout = req.GetTimeout().AsDuration(); timeout <= 0 || timeout > maxCall {
			return nil, invalid("a call's timeout is more than 0 and at most %v", maxCall)
		}
	}
	// The agent keeps to the timeout; its answer needs a little longer.
	ctx2, cancel := context.WithTimeout(ctx, timeout+2*time.Second)
	defer cancel()
	answer, err := s.c.askAgent(ctx2, from, &federationv1.Question{Question: &federationv1.Question_Call{Call: req}},
		callerOf(ctx).role != controller, func(ctx context.Context, peer federationv1.AdminClient) (*federationv1.Answer, error) {
			resp, err := peer.Call(ctx, req)
			return &federationv1.Answer{Answer: &federationv1.Answer_Call{Call: resp}}, err
		})
	if err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "cluster %s has not made the call: %s", from, plainText(err))
	}
	if answer.GetCall() == nil {
		return nil, status.Errorf(codes.Unimplemented, "the agent of cluster %s answered something else: is it of an older version?", from)
	}
	return answer.GetCall(), nil
}

// plainText is an error without gRPC's wrapping, for an answer that passes it
// on.
func plainText(err error) string {
	if err == nil {
		return "its answer is of another kind"
	}
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	return err.Error()
}

// askAgent puts a question to a cluster's agent, over its session here, or,
// where relayed may be asked, at the controller that holds it.
func (c *Controller) askAgent(ctx context.Context, cluster federation.ClusterID, q *federationv1.Question, relay bool,
	elsewhere func(context.Context, federationv1.AdminClient) (*federationv1.Answer, error),
) (*federationv1.Answer, error) {
	if a := c.sessions.of(cluster); a != nil {
		return a.ask(ctx, q)
	}
	p := c.store.Presences()[cluster]
	if p == nil || p.GetController() == c.cfg.Name || !relay {
		return nil, errNoAgent
	}
	for _, other := range c.store.Controllers() {
		if other.GetName() != p.GetController() {
			continue
		}
		client, err := c.relays.to(other.GetName(), other.GetAddress())
		if err != nil {
			return nil, err
		}
		return elsewhere(ctx, client)
	}
	return nil, fmt.Errorf("%w: the controller %s that it was connected to is gone", errNoAgent, p.GetController())
}

// relays are connections to the other controllers, made when they are needed.
type relays struct {
	c *Controller

	mu     sync.Mutex
	by     map[string]*relay
	closed bool
}

type relay struct {
	address string
	conn    *grpc.ClientConn
}

func newRelays(c *Controller) *relays { return &relays{c: c, by: map[string]*relay{}} }

// to is a client of the controller of that name.
func (r *relays) to(name, address string) (federationv1.AdminClient, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, errStopping()
	}
	if old := r.by[name]; old != nil {
		if old.address == address {
			return federationv1.NewAdminClient(old.conn), nil
		}
		_ = old.conn.Close() // it has moved
	}
	id, err := identity.ControllerID(r.c.cfg.TrustDomain, name)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(
		r.c.verifier.Client(identity.ClientConfig{SVID: r.c.source, Authorize: identity.AllowID(id), NextProtos: []string{"h2"}}))))
	if err != nil {
		return nil, fmt.Errorf("connect to controller %s at %s: %w", name, address, err)
	}
	r.by[name] = &relay{address: address, conn: conn}
	return federationv1.NewAdminClient(conn), nil
}

func (r *relays) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for name, one := range r.by {
		_ = one.conn.Close()
		delete(r.by, name)
	}
}
