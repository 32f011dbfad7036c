package controller

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// However many redeem one token at once, one key has it; that key may again.
func TestATokenWorksForOneKey(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	token := m.register(c, "eu-1")
	const many = 200
	keys := make([]*ecdsa.PrivateKey, many)
	for i := range keys {
		keys[i] = must(identity.NewKey())(t)
	}
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		winners []*ecdsa.PrivateKey
		refused = map[string]int{}
	)
	for _, key := range keys {
		wg.Go(func() {
			_, _, err := m.enroll(c.Address(), token, key)
			for status.Code(err) == codes.Unavailable { // the answer was lost: the same key may ask again
				_, _, err = m.enroll(c.Address(), token, key)
			}
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, key)
			} else {
				refused[err.Error()]++
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 {
		t.Fatalf("%d of %d have enrolled; refusals: %v", len(winners), many, refused)
	}
	if len(refused) != 1 {
		t.Errorf("the others were told different things: %v", refused)
	}
	if _, _, err := m.enroll(c.Address(), token, winners[0]); err != nil {
		t.Errorf("the same key again: %v", err)
	}

	used := func() error {
		_, _, err := m.enroll(c.Address(), token, must(identity.NewKey())(t))
		return err
	}()
	unknown := func() error {
		made := must(identity.NewJoinToken("eu-1"))(t)
		_, _, err := m.enroll(c.Address(), &federationv1.JoinToken{Token: made.Reveal(), CaHash: token.GetCaHash()}, keys[0])
		return err
	}()
	garbage := func() error {
		_, _, err := m.enroll(c.Address(), &federationv1.JoinToken{Token: "let me in", CaHash: token.GetCaHash()}, keys[0])
		return err
	}()
	if used == nil || unknown == nil || garbage == nil || used.Error() != unknown.Error() || used.Error() != garbage.Error() {
		t.Errorf("a used, an unknown and a mistyped token must look the same:\n%v\n%v\n%v", used, unknown, garbage)
	}
}

func TestATokensLifeHasBounds(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	m.register(c, "eu-1")
	for ttl, want := range map[time.Duration]codes.Code{
		time.Second: codes.InvalidArgument, time.Minute: codes.OK, 25 * time.Hour: codes.InvalidArgument,
	} {
		_, err := m.adminClient(c).CreateToken(timeout(t), &federationv1.CreateTokenRequest{Cluster: "eu-1", Ttl: durationpb.New(ttl)})
		if status.Code(err) != want {
			t.Errorf("a token for %v: %v, want %v", ttl, err, want)
		}
	}
}

func TestAWrongPinIsNoticed(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	token := m.register(c, "eu-1")
	token.CaHash = "sha256:" + strings.Repeat("ab", 32)
	_, _, err := m.enroll(c.Address(), token, must(identity.NewKey())(t))
	if err == nil || !strings.Contains(err.Error(), "pin") && !strings.Contains(err.Error(), "hash") {
		t.Errorf("with a wrong CA hash: %v", err)
	}
}

// What an agent may not say comes back as findings; the rest is taken.
func TestAMemberSpeaksForItselfOnly(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1, eu2 := m.join(c, "eu-1"), m.join(c, "eu-2")
	a, b := m.mustConnect(eu1, c.Address(), nil), m.mustConnect(eu2, c.Address(), nil)
	b.reportFull(offer("eu-2", "payments", 2)...)

	outside := testExport("eu-1", "vault")
	outside.Service.Namespace = "bank"
	elsewhere := testExport("eu-1", "elsewhere")
	elsewhere.Gateways = []federation.Address{{Host: "203.0.113.9", Port: 15443}}
	result := a.reportFull(append(offer("eu-1", "payments", 1),
		federationv1.ExportRecord(testExport("eu-2", "payments")),
		federationv1.ExportRecord(outside), federationv1.ExportRecord(elsewhere),
		federationv1.MemberRecord(federation.Member{Cluster: "eu-1", State: federation.MemberActive, Grants: []federation.Grant{{Namespace: "*", Name: "*"}}}),
		&federationv1.Record{Key: "export/eu-1/shop/../x"},
	)...)
	codes := map[string]int{}
	for _, f := range result.GetRefused() {
		codes[f.GetCode()]++
		if f.GetFix() == "" || f.GetMessage() == "" {
			t.Errorf("a finding that helps nobody: %v", f)
		}
	}
	want := map[federation.Code]int{
		federation.CodeClaimsOtherCluster: 2, federation.CodeOutsideGrant: 1,
		federation.CodeGatewayOutsideRegistration: 1, federation.CodeRecordRefused: 1,
	}
	for code, n := range want {
		if codes[string(code)] != n {
			t.Errorf("%d findings %s, want %d; all: %v", codes[string(code)], code, n, codes)
		}
	}
	b.until("what was good is taken", func() bool { return b.have["export/eu-1/shop/payments"] != nil })
	result = a.report(&federationv1.Report{Deletes: []string{"export/eu-2/shop/payments", "cluster/eu-2", "head"}})
	if len(result.GetRefused()) != 3 {
		t.Errorf("deletes of another's: %v", result.GetRefused())
	}
	if b.hold("export/eu-2/shop/payments") == nil || b.hold("cluster/eu-2") == nil {
		t.Error("eu-1 has taken something of eu-2 away")
	}
	// The last good version of a record stays when a bad one follows.
	bad := testExport("eu-1", "payments")
	bad.Gateways = elsewhere.Gateways
	if r := a.reportFull(federationv1.ExportRecord(bad)); len(r.GetRefused()) != 1 {
		t.Errorf("refused: %v", r.GetRefused())
	}
	if got := b.hold("export/eu-1/shop/payments").GetExport().GetGateways(); len(got) != 1 || got[0].GetHost() != "192.0.2.1" {
		t.Errorf("the export's gateways are %v", got)
	}
}

// An agent gets SVIDs under its own cluster only.
func TestAnAgentIsSignedItsOwnOnly(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1 := m.join(c, "eu-1")
	m.join(c, "eu-2")
	client := federationv1.NewIssueClient(m.dial(eu1, c.Address()))
	key := must(identity.NewKey())(t)
	csr := must(identity.NewCSR(key))(t)
	for path, want := range map[string]codes.Code{
		"":                                codes.OK,
		"/cluster/eu-1/agent":             codes.OK,
		"/cluster/eu-1/gateway":           codes.OK,
		"/cluster/eu-1/ns/shop/sa/till":   codes.OK,
		"/cluster/eu-2/agent":             codes.PermissionDenied,
		"/cluster/eu-2/gateway":           codes.PermissionDenied,
		"/cluster/eu-2/ns/shop/sa/till":   codes.PermissionDenied,
		"/controller/two":                 codes.PermissionDenied,
		"/operator/admin":                 codes.PermissionDenied,
		"/cluster/eu-1/ns/shop/sa/till/x": codes.PermissionDenied,
	} {
		id := ""
		if path != "" {
			id = "spiffe://" + m.td.Name() + path
		}
		resp, err := client.Issue(timeout(t), &federationv1.IssueRequest{Csr: csr, SpiffeId: id})
		if status.Code(err) != want {
			t.Errorf("%q: %v, want %v", path, err, want)
		}
		if err == nil && path != "" && resp.GetChain().GetSpiffeId() != id {
			t.Errorf("%q: signed %v", path, resp.GetChain().GetSpiffeId())
		}
	}
	if _, err := client.Issue(timeout(t), &federationv1.IssueRequest{Csr: []byte("no CSR")}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("garbage: %v", err)
	}
}

// A deregistered cluster is nobody, on connections that are open as well.
func TestADeregisteredAgentIsRefused(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1, eu2 := m.join(c, "eu-1"), m.join(c, "eu-2")
	a, b := m.mustConnect(eu1, c.Address(), nil), m.mustConnect(eu2, c.Address(), nil)
	a.reportFull(offer("eu-1", "payments", 2)...)
	b.until("the export", func() bool { return b.have["export/eu-1/shop/payments"] != nil })
	issue := federationv1.NewIssueClient(m.dial(eu1, c.Address()))
	csr := must(identity.NewCSR(must(identity.NewKey())(t)))(t)
	if _, err := issue.Issue(timeout(t), &federationv1.IssueRequest{Csr: csr}); err != nil {
		t.Fatal(err)
	}

	resp, err := m.adminClient(c).DeregisterCluster(timeout(t), &federationv1.DeregisterClusterRequest{Cluster: "eu-1"})
	if err != nil || resp.GetExportsWithdrawn() != 1 {
		t.Fatalf("deregister: %v, %v", resp, err)
	}
	if err := a.ended(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("its stream ended with %v", err)
	}
	if _, err := issue.Issue(timeout(t), &federationv1.IssueRequest{Csr: csr}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a signature over the open connection: %v", err)
	}
	if _, err := m.connect(eu1, c.Address(), nil); err == nil {
		t.Error("the old agent has a stream again")
	}
	b.until("its exports are gone, and everybody knows it is denied", func() bool {
		return b.have["export/eu-1/shop/payments"] == nil && b.have["deny/eu-1/1"] != nil
	})
	if _, err := m.adminClient(c).RegisterCluster(timeout(t), &federationv1.RegisterClusterRequest{Member: member("eu-1")}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the name again at once: %v", err)
	}
}

// When a cluster enrols anew because its key was lost, whoever found the key is
// nobody, though its certificate is valid still.
func TestALostKeyIsOfNoUse(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	old := m.join(c, "eu-1")
	stream := m.mustConnect(old, c.Address(), nil)
	token := must(m.adminClient(c).CreateToken(timeout(t), &federationv1.CreateTokenRequest{Cluster: "eu-1"}))(t)
	fresh, _, err := m.enroll(c.Address(), token.GetToken(), mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	stream.ended()
	if _, err := m.connect(old, c.Address(), nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stream with the old key: %v", err)
	}
	csr := must(identity.NewCSR(mustKey(t)))(t)
	if _, err := federationv1.NewIssueClient(m.dial(old, c.Address())).Issue(timeout(t), &federationv1.IssueRequest{Csr: csr}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a signature with the old key: %v", err)
	}
	m.mustConnect(fresh, c.Address(), nil)
}

// An agent whose SVID has expired renews by its key.
func TestAnExpiredAgentRenews(t *testing.T) {
	t.Parallel()
	clk := clock.Scaled(40, 0)
	m := newTestMesh(t, clk)
	cfg := m.config("one")
	cfg.Lifetimes = shortLifetimes()
	c := m.startWith(cfg)
	token := m.register(c, "eu-1")
	src := must(identity.NewSource(identity.SourceConfig{
		ID: must(identity.AgentID(m.td, "eu-1"))(t), Clock: clk, Log: slog.New(slog.DiscardHandler),
	}))(t)
	err := src.Enrol(timeout(t), identity.IssuerFunc(func(_ context.Context, csr []byte) (identity.Issued, error) {
		resp, err := m.redeem(c.Address(), token, csr)
		if err != nil {
			return identity.Issued{}, err
		}
		chain, err := identity.ParseRawChain(resp.GetChain().GetCertificates())
		return identity.Issued{Chain: chain, Bundle: bundleOf(t, m.td, resp.GetBundle())}, err
	}))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the SVID expires", func() bool {
		_, err := src.GetX509SVID()
		return errors.Is(err, identity.ErrExpired)
	})
	conn := m.dial(&credential{bundle: c.source.Bundle()}, c.Address())
	key := must(identity.NewKey())(t)
	csr := must(identity.NewCSR(key))(t)
	proof := must(src.Prove(csr))(t)
	resp, err := federationv1.NewEnrollClient(conn).Renew(timeout(t), &federationv1.RenewRequest{Cluster: "eu-1", Csr: csr, Chain: proof.Chain, Signature: proof.Signature})
	if err != nil {
		t.Fatal(err)
	}
	if svid := svidOf(t, resp.GetChain(), key); svid.ID != src.ID() || !clk.Now().Before(svid.Certificates[0].NotAfter) {
		t.Errorf("renewed: %v until %v", svid.ID, svid.Certificates[0].NotAfter)
	}
	other := must(identity.NewCSR(must(identity.NewKey())(t)))(t)
	if _, err := federationv1.NewEnrollClient(conn).Renew(timeout(t), &federationv1.RenewRequest{Cluster: "eu-1", Csr: other, Chain: proof.Chain, Signature: proof.Signature}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("the proof for another key: %v", err)
	}
	if _, err := m.adminClient(c).DeregisterCluster(timeout(t), &federationv1.DeregisterClusterRequest{Cluster: "eu-1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := federationv1.NewEnrollClient(conn).Renew(timeout(t), &federationv1.RenewRequest{Cluster: "eu-1", Csr: csr, Chain: proof.Chain, Signature: proof.Signature}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a denied one: %v", err)
	}
}
