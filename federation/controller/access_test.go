package controller

import (
	"context"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// everyMethod is read from the descriptors: a new method is in it.
func everyMethod() map[string]bool {
	out := map[string]bool{} // full name -> client streams
	for _, d := range []grpc.ServiceDesc{
		federationv1.Enroll_ServiceDesc, federationv1.Issue_ServiceDesc,
		federationv1.Sync_ServiceDesc, federationv1.Admin_ServiceDesc,
	} {
		for _, m := range d.Methods {
			out["/"+d.ServiceName+"/"+m.MethodName] = false
		}
		for _, s := range d.Streams {
			out["/"+d.ServiceName+"/"+s.StreamName] = s.ClientStreams
		}
	}
	return out
}

func TestEveryMethodHasItsCallers(t *testing.T) {
	for method := range everyMethod() {
		if allowed(method) == 0 {
			t.Errorf("%s is open to nobody: say in allowed who may call it", method)
		}
	}
	if got := allowed("/weft.federation.v1.Admin/Nothing"); got != 0 {
		t.Errorf("an unknown method is open to %v", got)
	}
}

// Every method, called by everybody, with no content: what comes back is a
// refusal, or an answer of the method itself.
func TestWhoMayCallWhat(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	agentOf := m.join(c, "eu-1")
	leaf := func(id spiffeid.ID, err error) *credential {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		key := must(identity.NewKey())(t)
		region := must(c.trust.active(c.cfg.Region))(t)
		chain := must(region.authority.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, c.cfg.Lifetimes, time.Now()))(t)
		return &credential{svid: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle: c.source.Bundle()}
	}
	foreign := func() *credential {
		other := newTestMesh(t, clock.Real())
		other.td = m.td // the same name, other keys
		now := time.Now()
		lifetimes := identity.DefaultLifetimes()
		root := must(identity.NewRoot(m.td, lifetimes, now))(t)
		region := must(root.NewRegion("home", lifetimes, now))(t)
		id := must(identity.AgentID(m.td, "eu-1"))(t)
		key := must(identity.NewKey())(t)
		chain := must(region.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, lifetimes, now))(t)
		return &credential{svid: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle: c.source.Bundle()}
	}
	expired := func() *credential {
		id := must(identity.AgentID(m.td, "eu-1"))(t)
		key := must(identity.NewKey())(t)
		root := must(c.trust.active(placeRoot))(t)
		past := time.Now().Add(-48 * time.Hour)
		// A region's authority of the past would be refused by the root's own
		// start; a leaf of a minute that began with it is over by now.
		region := must(root.authority.NewRegion("home", c.cfg.Lifetimes, time.Now()))(t)
		chain := must(region.SignLeafFor(identity.Admitted{ID: id, Key: &key.PublicKey}, time.Nanosecond, c.cfg.Lifetimes, past))(t)
		return &credential{svid: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle: c.source.Bundle()}
	}
	callers := []struct {
		name string
		role role // what it is in the table; 0 is nobody
		cred *credential
	}{
		{"none", anyone, &credential{bundle: c.source.Bundle()}},
		{"agent", agent, agentOf},
		{"gateway", 0, leaf(identity.GatewayID(m.td, "eu-1"))},
		{"workload", 0, leaf(identity.WorkloadID(m.td, "eu-1", "shop", "payments"))},
		{"controller", controller, leaf(identity.ControllerID(m.td, "two"))},
		{"viewer", viewer, m.operator(c, "vera", viewer)},
		{"operator", operator, m.operator(c, "otto", operator)},
		{"admin", admin, m.operator(c, "ada", admin)},
		{"person without a role", 0, m.operator(c, "nobody", 0)},
		{"foreign", 0, foreign()},
		{"expired", 0, expired()},
	}
	for _, who := range callers {
		conn := m.dial(who.cred, c.Address())
		for method, streams := range everyMethod() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			err := invoke(ctx, conn, method, streams)
			cancel()
			code := status.Code(err)
			refused := code == codes.PermissionDenied || code == codes.Unauthenticated || code == codes.Unavailable
			if may := who.role&allowed(method) != 0; may == refused && !answeredByItself(method, err) {
				t.Errorf("%s calls %s: %v; allowed are %v", who.name, method, err, allowed(method))
			}
			if code == codes.Unimplemented {
				t.Errorf("%s is not implemented", method)
			}
		}
	}
}

// answeredByItself reports refusals that a method makes after the table has
// let the caller in.
func answeredByItself(method string, err error) bool {
	return (method == federationv1.Enroll_Enroll_FullMethodName || method == federationv1.Enroll_Renew_FullMethodName) &&
		status.Code(err) == codes.PermissionDenied && len(status.Convert(err).Message()) > 0 &&
		(status.Convert(err).Message()[:4] == "the ")
}

// invoke calls a method with an empty message and waits for its first answer.
func invoke(ctx context.Context, conn *grpc.ClientConn, method string, streams bool) error {
	if method != federationv1.Admin_Watch_FullMethodName && !streams {
		return conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: streams}, method)
	if err != nil {
		return err
	}
	if err := s.SendMsg(&emptypb.Empty{}); err != nil {
		return s.RecvMsg(&emptypb.Empty{})
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// A role counts as it is now, not as it was when the connection was made.
func TestARoleThatIsTakenAwayIsGoneAtOnce(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	client := federationv1.NewAdminClient(m.dial(m.operator(c, "vera", viewer), c.Address()))
	if _, err := client.GetStatus(timeout(t), &federationv1.GetStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := c.store.PutOperator(timeout(t), "vera", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := client.GetStatus(timeout(t), &federationv1.GetStatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without her role: %v", err)
	}
}

func TestACredentialIsRenewed(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	key := must(identity.NewKey())(t)
	vera := m.operator(c, "vera", viewer)
	resp, err := federationv1.NewAdminClient(m.dial(vera, c.Address())).RenewCredential(timeout(t), &federationv1.RenewCredentialRequest{Csr: must(identity.NewCSR(key))(t)})
	if err != nil {
		t.Fatal(err)
	}
	again := &credential{svid: svidOf(t, resp.GetChain(), key), bundle: vera.bundle}
	if again.svid.ID != vera.svid.ID {
		t.Errorf("renewed as %v", again.svid.ID)
	}
	if _, err := federationv1.NewAdminClient(m.dial(again, c.Address())).GetStatus(timeout(t), &federationv1.GetStatusRequest{}); err != nil {
		t.Errorf("with the new one: %v", err)
	}
}
