package controller

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

const (
	defaultTokenTTL = 15 * time.Minute
	minTokenTTL     = 10 * time.Second
	maxTokenTTL     = 24 * time.Hour
	maxDrainOver    = 24 * time.Hour
)

// adminServer is what people use.
type adminServer struct {
	federationv1.UnimplementedAdminServer
	c *Controller
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func parseCluster(s string) (federation.ClusterID, error) {
	c, err := federation.ParseClusterID(s)
	if err != nil {
		return "", invalid("%v", err)
	}
	return c, nil
}

// RegisterCluster stores a registration and makes its first join token.
func (s *adminServer) RegisterCluster(ctx context.Context, req *federationv1.RegisterClusterRequest) (*federationv1.RegisterClusterResponse, error) {
	c := s.c
	m := proto.CloneOf(req.GetMember())
	if m == nil {
		return nil, invalid("no registration given")
	}
	// The store decides on both.
	m.State, m.Generation = federationv1.MemberState_MEMBER_STATE_PENDING, 0
	if m.GetRegion() == "" {
		m.Region = c.cfg.Region
	}
	member, err := m.Decode()
	if err != nil {
		return nil, invalid("%v", err)
	}
	token, tok, err := s.newToken(ctx, member.Cluster, req.GetTokenTtl())
	if err != nil {
		return nil, err
	}
	stored, rev, err := c.store.Register(ctx, federationv1.EncodeMember(member), tok)
	if err != nil {
		if errors.Is(err, store.ErrExists) {
			return nil, status.Errorf(codes.AlreadyExists, "cluster %q is registered already: 'weft cluster token %s' makes a new join token, 'weft cluster deregister %s' ends it", member.Cluster, member.Cluster, member.Cluster)
		}
		return nil, c.storeError(err)
	}
	c.log.InfoContext(ctx, "registered a cluster", "cluster", string(member.Cluster), "by", callerOf(ctx).name(), "revision", rev.Number)
	return &federationv1.RegisterClusterResponse{Cluster: s.cluster(stored, c.state.current()), Token: token}, nil
}

// newToken makes a join token: what is shown once, and what is stored.
func (s *adminServer) newToken(ctx context.Context, cluster federation.ClusterID, ttl *durationpb.Duration) (*federationv1.JoinToken, store.Token, error) {
	life := defaultTokenTTL
	if ttl != nil {
		if life = ttl.AsDuration(); life < minTokenTTL || life > maxTokenTTL {
			return nil, store.Token{}, invalid("a join token lives from %v to %v, not %v", minTokenTTL, maxTokenTTL, life)
		}
	}
	token, err := identity.NewJoinToken(cluster)
	if err != nil {
		return nil, store.Token{}, invalid("%v", err)
	}
	pin, err := s.c.trust.pin()
	if err != nil {
		return nil, store.Token{}, s.c.storeError(err)
	}
	shown := &federationv1.JoinToken{
		Token: token.Reveal(), CaHash: pin.String(), Controllers: s.c.addresses(ctx),
		Expires: timestamppb.New(s.c.cfg.Clock.Now().Add(life)),
	}
	return shown, store.Token{Hash: token.Hash(), TTL: life, By: callerOf(ctx).name()}, nil
}

// CreateToken makes one more join token.
func (s *adminServer) CreateToken(ctx context.Context, req *federationv1.CreateTokenRequest) (*federationv1.CreateTokenResponse, error) {
	cluster, err := parseCluster(req.GetCluster())
	if err != nil {
		return nil, err
	}
	token, tok, err := s.newToken(ctx, cluster, req.GetTtl())
	if err != nil {
		return nil, err
	}
	if err := s.c.store.CreateToken(ctx, cluster, tok); err != nil {
		return nil, s.c.storeError(err)
	}
	s.c.log.InfoContext(ctx, "made a join token", "cluster", string(cluster), "by", callerOf(ctx).name())
	return &federationv1.CreateTokenResponse{Token: token}, nil
}

// SetGrants adds and removes grants.
func (s *adminServer) SetGrants(ctx context.Context, req *federationv1.SetGrantsRequest) (*federationv1.SetGrantsResponse, error) {
	c := s.c
	cluster, err := parseCluster(req.GetCluster())
	if err != nil {
		return nil, err
	}
	for _, g := range slices.Concat(req.GetAdd(), req.GetRemove()) {
		if _, err := federation.ParseGrant(g); err != nil {
			return nil, invalid("%v", err)
		}
	}
	stored, _, err := c.store.UpdateMember(ctx, cluster, func(m *federationv1.Member) error {
		for _, g := range req.GetRemove() {
			if !slices.Contains(m.GetGrants(), g) {
				return status.Errorf(codes.NotFound, "cluster %q has no grant %q; it has %q", cluster, g, m.GetGrants())
			}
		}
		m.Grants = slices.DeleteFunc(m.Grants, func(g string) bool { return slices.Contains(req.GetRemove(), g) })
		m.Grants = append(m.Grants, req.GetAdd()...)
		slices.Sort(m.Grants)
		m.Grants = slices.Compact(m.Grants)
		if _, err := m.Decode(); err != nil {
			return invalid("%v", err)
		}
		return nil
	})
	if err != nil {
		return nil, c.storeError(err)
	}
	c.log.InfoContext(ctx, "changed grants", "cluster", string(cluster), "added", req.GetAdd(), "removed", req.GetRemove(), "by", callerOf(ctx).name())
	return &federationv1.SetGrantsResponse{Cluster: s.cluster(stored, c.state.current())}, nil
}

// DeregisterCluster withdraws a cluster's exports and denies its identity.
func (s *adminServer) DeregisterCluster(ctx context.Context, req *federationv1.DeregisterClusterRequest) (*federationv1.DeregisterClusterResponse, error) {
	cluster, err := parseCluster(req.GetCluster())
	if err != nil {
		return nil, err
	}
	out, err := s.c.store.Deregister(ctx, cluster, "deregistered by "+callerOf(ctx).name())
	if err != nil {
		return nil, s.c.storeError(err)
	}
	// The denial is in force here when the call returns.
	if err := s.c.state.reached(ctx, out.Revision); err != nil {
		return nil, err
	}
	s.c.log.InfoContext(ctx, "deregistered a cluster", "cluster", string(cluster), "exports", out.Removed, "by", callerOf(ctx).name())
	return &federationv1.DeregisterClusterResponse{
		Revision: federationv1.EncodeRevision(out.Revision), ExportsWithdrawn: int32(min(out.Removed, 1<<30)),
	}, nil
}

// ApplyPolicy creates or changes an operators' policy, or says what that would
// change.
func (s *adminServer) ApplyPolicy(ctx context.Context, req *federationv1.ApplyPolicyRequest) (*federationv1.ApplyPolicyResponse, error) {
	c := s.c
	m := proto.CloneOf(req.GetPolicy())
	if m == nil {
		return nil, invalid("no policy given")
	}
	m.Origin, m.Accepted = federation.OriginController, 0
	policy, err := m.Decode()
	if err != nil {
		return nil, invalid("%v", err)
	}
	now := c.state.current()
	before, had := now.Catalog.Policy(policy.ID)
	if had {
		policy.Accepted = before.Accepted
	}
	after := now.Catalog.Apply(now.Catalog.Revision(), federation.PutPolicy{Policy: policy})
	resp := &federationv1.ApplyPolicyResponse{Outcome: "created"}
	ref := federation.Ref{Kind: "policy", Name: policy.ID.Origin + "/" + policy.ID.String()}
	for _, f := range after.Findings() {
		if f.Subject == ref {
			resp.Findings = append(resp.Findings, federationv1.EncodeFinding(f))
			if f.Code == federation.CodePolicyInvalid {
				return nil, invalid("%s", f.Message)
			}
		}
	}
	if had {
		resp.Outcome, resp.Before = "changed", federationv1.EncodePolicy(*before)
	}
	if len(federation.Diff(now.Catalog, after)) == 0 {
		resp.Outcome = "unchanged"
	}
	resp.Changes, resp.MoreChanges = planChanges(now.Catalog, after, now.World)
	resp.Policy, resp.Revision = federationv1.EncodePolicy(policy), federationv1.EncodeRevision(now.Catalog.Revision())
	if req.GetDryRun() {
		return resp, nil
	}
	out, err := c.store.PutPolicy(ctx, federationv1.EncodePolicy(policy))
	if err != nil {
		return nil, c.storeError(err)
	}
	resp.Before, resp.Policy, resp.Revision = out.Before, out.After, federationv1.EncodeRevision(out.Revision)
	switch {
	case !out.Changed:
		resp.Outcome = "unchanged"
	case out.Before == nil:
		resp.Outcome = "created"
	default:
		resp.Outcome = "changed"
	}
	c.log.InfoContext(ctx, "applied a policy", "policy", policy.ID.String(), "outcome", resp.Outcome, "by", callerOf(ctx).name(), "revision", out.Revision.Number)
	return resp, nil
}

// DeletePolicy takes an operators' policy out of force.
func (s *adminServer) DeletePolicy(ctx context.Context, req *federationv1.DeletePolicyRequest) (*federationv1.DeletePolicyResponse, error) {
	c := s.c
	id := federation.PolicyID{Origin: federation.OriginController, Namespace: req.GetNamespace(), Name: req.GetName()}
	if req.GetDryRun() {
		now := c.state.current()
		p, ok := now.Catalog.Policy(id)
		if !ok {
			return nil, status.Errorf(codes.NotFound, "there is no policy %s", id)
		}
		return &federationv1.DeletePolicyResponse{Policy: federationv1.EncodePolicy(*p), Revision: federationv1.EncodeRevision(now.Catalog.Revision())}, nil
	}
	out, err := c.store.DeletePolicy(ctx, req.GetNamespace(), req.GetName())
	if err != nil {
		return nil, c.storeError(err)
	}
	c.log.InfoContext(ctx, "deleted a policy", "policy", id.String(), "by", callerOf(ctx).name(), "revision", out.Revision.Number)
	return &federationv1.DeletePolicyResponse{Policy: out.Before, Revision: federationv1.EncodeRevision(out.Revision)}, nil
}

// Drain takes traffic away from a cluster, over time.
func (s *adminServer) Drain(ctx context.Context, req *federationv1.DrainRequest) (*federationv1.DrainResponse, error) {
	c := s.c
	cluster, err := parseCluster(req.GetCluster())
	if err != nil {
		return nil, err
	}
	now := c.state.current()
	if m, ok := now.Catalog.Member(cluster); !ok || m.State == federation.MemberDeregistered {
		return nil, status.Errorf(codes.NotFound, "there is no cluster %q", cluster)
	}
	over, after := req.GetOver().AsDuration(), req.GetCloseExistingAfter().AsDuration()
	if over < 0 || over > maxDrainOver || after < 0 || after > maxDrainOver {
		return nil, invalid("a drain takes from 0 s to %v", maxDrainOver)
	}
	resp := &federationv1.DrainResponse{Stranded: stranded(now.Catalog, now.World, cluster)}
	if len(resp.Stranded) > 0 && !req.GetForce() {
		one := resp.Stranded[0]
		return nil, status.Errorf(codes.FailedPrecondition,
			"draining %s leaves %d callers of services nowhere to go (first: %s/%s from %s): make another cluster serve them, or drain all the same with --force",
			cluster, len(resp.Stranded), one.Namespace, one.Name, one.CallerCluster)
	}
	d := federation.Drain{
		Over: over, Started: c.cfg.Clock.Now().Truncate(time.Millisecond),
		CloseExistingAfter: after, By: callerOf(ctx).name(),
	}
	rev, err := c.decideDrain(ctx, cluster, func(old *federation.Drain) (*federation.Drain, error) {
		d.Remaining = federation.All
		if old != nil {
			d.Remaining = old.Remaining
		}
		if over == 0 {
			d.Remaining = 0
		}
		return &d, nil
	})
	if err != nil {
		return nil, err
	}
	c.log.InfoContext(ctx, "draining a cluster", "cluster", string(cluster), "over", over, "by", d.By, "revision", rev.Number)
	resp.Drain, resp.Revision = federationv1.EncodeDrain(d), federationv1.EncodeRevision(rev)
	return resp, nil
}

// drainAttempts is how often a drain is decided on against a leader that moves
// it on at the same time.
const drainAttempts = 20

// decideDrain replaces a cluster's drain by what decide makes of it: nil is
// none, before and after. It is called again where the leader was faster.
func (c *Controller) decideDrain(ctx context.Context, cluster federation.ClusterID, decide func(*federation.Drain) (*federation.Drain, error)) (federation.Revision, error) {
	key := federationv1.DrainKey(cluster)
	for attempt := 1; ; attempt++ {
		changed := c.state.next()
		w := store.Swap{Key: key.String()}
		var old *federation.Drain
		if f, ok := c.state.fact(key); ok {
			d := f.Body.(federation.Drain)
			old, w.Old = &d, f.Record()
		}
		d, err := decide(old)
		if err != nil {
			return federation.Revision{}, err
		}
		if d != nil {
			w.New = federationv1.DrainRecord(cluster, *d)
		}
		rev, err := c.store.Swap(ctx, w)
		if !errors.Is(err, store.ErrConflict) || attempt == drainAttempts {
			if err != nil {
				return rev, c.storeError(err)
			}
			return rev, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return rev, ctx.Err()
		}
	}
}

// Undrain gives a cluster its share back, over time.
func (s *adminServer) Undrain(ctx context.Context, req *federationv1.UndrainRequest) (*federationv1.UndrainResponse, error) {
	c := s.c
	cluster, err := parseCluster(req.GetCluster())
	if err != nil {
		return nil, err
	}
	over := req.GetOver().AsDuration()
	if over < 0 || over > maxDrainOver {
		return nil, invalid("undraining takes from 0 s to %v", maxDrainOver)
	}
	rev, err := c.decideDrain(ctx, cluster, func(old *federation.Drain) (*federation.Drain, error) {
		if old == nil {
			return nil, status.Errorf(codes.NotFound, "cluster %q is not being drained", cluster)
		}
		if over == 0 {
			return nil, nil
		}
		return &federation.Drain{
			Remaining: old.Remaining, Over: over, Undo: true,
			Started: c.cfg.Clock.Now().Truncate(time.Millisecond), By: callerOf(ctx).name(),
		}, nil
	})
	if err != nil {
		return nil, err
	}
	c.log.InfoContext(ctx, "undraining a cluster", "cluster", string(cluster), "over", over, "by", callerOf(ctx).name(), "revision", rev.Number)
	return &federationv1.UndrainResponse{Revision: federationv1.EncodeRevision(rev)}, nil
}

// RenewCredential gives a person a new certificate for the same name.
func (s *adminServer) RenewCredential(ctx context.Context, req *federationv1.RenewCredentialRequest) (*federationv1.RenewCredentialResponse, error) {
	c, who := s.c, callerOf(ctx).who
	admitted, err := identity.AdmitOperator(c.cfg.TrustDomain, who.Name, req.GetCsr())
	if err != nil {
		return nil, invalid("%v", err)
	}
	chain, err := c.trust.sign(ctx, admitted, 0, who.String())
	if err != nil {
		return nil, c.storeError(err)
	}
	return &federationv1.RenewCredentialResponse{Chain: chainMessage(admitted.ID, chain)}, nil
}
