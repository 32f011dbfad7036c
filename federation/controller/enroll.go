package controller

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// enrollServer lets clusters in: by a join token, or by an expired SVID.
type enrollServer struct {
	federationv1.UnimplementedEnrollServer
	c *Controller
}

// tokenRefused is the one answer to a token that is of no use, whatever the
// reason: it tells a guesser nothing.
func tokenRefused() error {
	return status.Error(codes.PermissionDenied,
		"the join token is not valid: unknown, used or expired; make a new one with 'weft cluster token CLUSTER'")
}

// Enroll redeems a join token for the CSR's key.
func (s *enrollServer) Enroll(ctx context.Context, req *federationv1.EnrollRequest) (*federationv1.EnrollResponse, error) {
	c := s.c
	if err := c.limits.enroll(callerOf(ctx).addr, c.cfg.Clock.Now()); err != nil {
		c.metrics.enrolled("limited")
		return nil, err
	}
	resp, err := s.enroll(ctx, req)
	outcome := "enrolled"
	if err != nil {
		outcome = "refused"
		c.log.WarnContext(ctx, "refused an enrolment", "from", callerOf(ctx).addr, "error", err)
	} else {
		c.log.InfoContext(ctx, "enrolled a cluster", "cluster", resp.GetCluster(), "from", callerOf(ctx).addr, "agent", req.GetAgentVersion())
	}
	c.metrics.enrolled(outcome)
	return resp, err
}

func (s *enrollServer) enroll(ctx context.Context, req *federationv1.EnrollRequest) (*federationv1.EnrollResponse, error) {
	c := s.c
	token, err := identity.ParseJoinToken(req.GetToken())
	if err != nil {
		return nil, tokenRefused()
	}
	asker := identity.TokenAsks(token.Cluster())
	who, err := identity.Admit(c.cfg.TrustDomain, asker, spiffeid.ID{}, req.GetCsr())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "%v", err)
	}
	der, err := x509.MarshalPKIXPublicKey(who.Key)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the CSR's key cannot be encoded: %v", err)
	}
	enrolled, err := c.store.Enrol(ctx, token.Hash(), der)
	if err != nil {
		return nil, c.storeError(err)
	}
	member := enrolled.Member
	if member.GetCluster() != string(token.Cluster()) {
		return nil, tokenRefused()
	}
	chain, err := c.trust.sign(ctx, who, member.GetGeneration(), asker.String())
	if err != nil {
		return nil, c.storeError(err)
	}
	bundle, err := c.bundle()
	if err != nil {
		return nil, err
	}
	return &federationv1.EnrollResponse{
		TrustDomain: c.cfg.TrustDomain.Name(), Cluster: member.GetCluster(),
		Chain: chainMessage(who.ID, chain), Bundle: bundle, Member: member,
		Controllers: c.addresses(ctx),
	}, nil
}

// Renew signs for an agent whose SVID has expired, by proof of its key.
func (s *enrollServer) Renew(ctx context.Context, req *federationv1.RenewRequest) (*federationv1.RenewResponse, error) {
	c := s.c
	if err := c.limits.enroll(callerOf(ctx).addr, c.cfg.Clock.Now()); err != nil {
		return nil, err
	}
	peer, err := c.verifier.VerifyProof(identity.RenewalProof{Chain: req.GetChain(), Signature: req.GetSignature()}, req.GetCsr())
	if err == nil && string(peer.Cluster) != req.GetCluster() {
		err = errors.New("the proof is of another cluster than the request")
	}
	if err != nil {
		c.log.WarnContext(ctx, "refused a renewal", "from", callerOf(ctx).addr, "error", err)
		return nil, status.Errorf(codes.PermissionDenied, "the proof is refused: %v; enrol again with a new token: 'weft cluster token CLUSTER'", err)
	}
	chain, bundle, err := c.issue(ctx, peer, peer.ID, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &federationv1.RenewResponse{Chain: chain, Bundle: bundle}, nil
}

// issueServer signs for agents.
type issueServer struct {
	federationv1.UnimplementedIssueServer
	c *Controller
}

// Issue signs an identity under the calling agent's cluster.
func (s *issueServer) Issue(ctx context.Context, req *federationv1.IssueRequest) (*federationv1.IssueResponse, error) {
	c, who := s.c, callerOf(ctx).who
	if err := c.limits.issue(string(who.Cluster), c.cfg.Clock.Now()); err != nil {
		return nil, err
	}
	var want spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if want, err = spiffeid.FromString(req.GetSpiffeId()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "the wanted identity cannot be read: %v", err)
		}
	}
	chain, bundle, err := c.issue(ctx, who, want, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &federationv1.IssueResponse{Chain: chain, Bundle: bundle}, nil
}

// issue signs want for a verified agent.
func (c *Controller) issue(ctx context.Context, agent identity.Peer, want spiffeid.ID, csr []byte) (*federationv1.Chain, *federationv1.Bundle, error) {
	who, err := identity.Admit(c.cfg.TrustDomain, identity.PeerAsks(agent), want, csr)
	if err != nil {
		code := codes.PermissionDenied
		if refusal := (*identity.Refusal)(nil); errors.As(err, &refusal) && (refusal.Reason == identity.RefusedCSR || refusal.Reason == identity.RefusedKey) {
			code = codes.InvalidArgument
		}
		return nil, nil, status.Error(code, err.Error())
	}
	member, err := c.store.Member(ctx, agent.Cluster)
	if err != nil {
		return nil, nil, c.storeError(err)
	}
	if err := c.checkIdentity(ctx, agent, member); err != nil {
		return nil, nil, err
	}
	chain, err := c.trust.sign(ctx, who, member.GetGeneration(), agent.String())
	if err != nil {
		return nil, nil, c.storeError(err)
	}
	bundle, err := c.bundle()
	return chainMessage(who.ID, chain), bundle, err
}

// checkIdentity says why an agent does not speak for its cluster: the cluster is
// not active, or has enrolled anew since the agent's identity was issued, so
// that a lost key is of no use to its finder.
func (c *Controller) checkIdentity(ctx context.Context, agent identity.Peer, m *federationv1.Member) error {
	if err := checkStanding(m); err != nil {
		return err
	}
	issued, err := c.store.Issued(ctx, agent.Serial)
	if errors.Is(err, store.ErrNotFound) {
		return nil // of before a backup that the store was restored from
	}
	if err != nil {
		return c.storeError(err)
	}
	if issued.GetGeneration() != m.GetGeneration() {
		return status.Errorf(codes.PermissionDenied,
			"cluster %q has enrolled anew since this identity was issued, with another key: enrol with a join token", m.GetCluster())
	}
	return nil
}

// checkStanding says why a cluster gets nothing at present.
func checkStanding(m *federationv1.Member) error {
	state := m.GetState()
	if state == federationv1.MemberState_MEMBER_STATE_ACTIVE {
		return nil
	}
	name := map[federationv1.MemberState]string{
		federationv1.MemberState_MEMBER_STATE_PENDING:      "pending: enrol it with a join token",
		federationv1.MemberState_MEMBER_STATE_QUARANTINED:  "quarantined: an operator must lift that with a new join token",
		federationv1.MemberState_MEMBER_STATE_DEREGISTERED: "deregistered: register it again under another name",
	}[state]
	return status.Errorf(codes.PermissionDenied, "cluster %q is %s", m.GetCluster(), name)
}

func chainMessage(id spiffeid.ID, chain []*x509.Certificate) *federationv1.Chain {
	return &federationv1.Chain{SpiffeId: id.String(), Certificates: identity.RawChain(chain)}
}

// storeError puts an error of the store into a status: what a caller can do
// about it follows from its code.
func (c *Controller) storeError(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codes.Internal
	switch {
	case errors.Is(err, store.ErrToken):
		return tokenRefused()
	case errors.Is(err, store.ErrNotFound):
		code = codes.NotFound
	case errors.Is(err, store.ErrExists):
		code = codes.AlreadyExists
	case errors.Is(err, store.ErrConflict):
		code = codes.Aborted
	case errors.Is(err, store.ErrStale), errors.Is(err, store.ErrTooSoon):
		code = codes.FailedPrecondition
	case errors.Is(err, store.ErrForbidden), errors.Is(err, store.ErrTooLarge):
		code = codes.InvalidArgument
	case errors.Is(err, store.ErrFull):
		code = codes.ResourceExhausted
	case errors.Is(err, store.ErrUnknown), errors.Is(err, store.ErrClosed), errors.Is(err, context.DeadlineExceeded):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	return status.Error(code, err.Error())
}

// Rates: a controller signs thousands of leaves a second, so these keep one
// source from taking all of it, and no more.
const (
	enrollPerSecond = 50
	enrollBurst     = 300
	issuePerSecond  = 500
	issueBurst      = 5000
	limitersKept    = 10_000
	limiterForgets  = time.Minute
)
