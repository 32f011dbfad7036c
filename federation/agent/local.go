package agent

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// localServer is the Local service of one listener.
type localServer struct {
	federationv1.UnimplementedLocalServer
	agent *Agent
}

// Identify says whom the caller's credential stands for.
func (s localServer) Identify(ctx context.Context, _ *federationv1.IdentifyRequest) (*federationv1.IdentifyResponse, error) {
	who, err := s.agent.callerOf(ctx)
	if err != nil {
		return nil, err
	}
	answer := &federationv1.IdentifyResponse{SpiffeId: who.id.String()}
	catalog, _ := s.agent.mesh.present()
	if m, ok := catalog.Member(s.agent.who.Cluster); ok {
		answer.Region = m.Region
	}
	return answer, nil
}

// Issue has the controller sign the caller's key for the caller's identity.
func (s localServer) Issue(ctx context.Context, r *federationv1.LocalIssueRequest) (*federationv1.LocalIssueResponse, error) {
	who, err := s.agent.callerOf(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := s.agent.link.connection()
	if err != nil {
		return nil, status.Errorf(codes.Unavailable,
			"%v: a new SVID for %s has to wait; one that the process holds already stays good until its end", err, who.id)
	}
	answer, err := federationv1.NewIssueClient(conn).Issue(ctx, &federationv1.IssueRequest{Csr: r.GetCsr(), SpiffeId: who.id.String()})
	if err != nil {
		return nil, err // a status of the controller's: its code and text say it best
	}
	return &federationv1.LocalIssueResponse{Chain: answer.GetChain(), Bundle: answer.GetBundle()}, nil
}

// Attach takes what a proxy sees, and tells it whom to believe.
func (s localServer) Attach(stream grpc.BidiStreamingServer[federationv1.AttachRequest, federationv1.AttachResponse]) error {
	who, err := s.agent.callerOf(stream.Context())
	if err != nil {
		return err
	}
	err = s.agent.proxies.attach(who, stream)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// believed is whom a proxy is told to believe.
func (a *Agent) believed() *federationv1.BundleUpdate {
	bundle, denials, members := a.mesh.believed()
	u := &federationv1.BundleUpdate{Members: members}
	if len(bundle.Roots) > 0 {
		u.Bundle = federationv1.EncodeBundle(bundle)
	} else if own := a.who.source.Bundle(); own != nil { // no record of it came yet
		u.Bundle = &federationv1.Bundle{TrustDomain: own.TrustDomain().Name(), Sequence: own.Sequence()}
		for _, root := range own.Roots() {
			u.Bundle.Roots = append(u.Bundle.Roots, root.Raw)
		}
	}
	for _, d := range denials {
		u.Denials = append(u.Denials, federationv1.EncodeDenial(d))
	}
	return u
}

// takeTrust puts a change of trust into force in the agent itself.
func (a *Agent) takeTrust() {
	bundle, denials, _ := a.mesh.believed()
	if len(bundle.Roots) > 0 {
		b, err := newBundle(a.who.source.ID().TrustDomain(), bundle)
		if err == nil {
			err = a.who.source.SetBundle(b)
		}
		if err != nil && !errors.Is(err, identity.ErrOldBundle) {
			a.log.Error("the controller's trust bundle cannot be used: the one before stays in force", "error", err)
		}
	}
	list := make([]identity.Denial, len(denials))
	for i, d := range denials {
		list[i] = identity.Denial{Cluster: d.Cluster, Generation: d.Generation}
	}
	a.denials.Replace(list)
	a.proxies.trustChanged()
}
