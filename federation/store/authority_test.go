package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func issuance(serial, cluster string, generation int64) *federationv1.Issuance {
	return &federationv1.Issuance{
		Serial: serial, SpiffeId: "spiffe://mesh.test/cluster/" + cluster + "/agent", Cluster: cluster, Generation: generation,
		Region: "eu", Slot: "a", NotAfter: timestamppb.New(time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)),
	}
}

func TestAuthorities(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	bundle := &federationv1.Bundle{TrustDomain: "mesh.test", Sequence: 1, Roots: [][]byte{{1}}}
	root, region := AuthorityWrite{Region: "root", Slot: "a", Sealed: []byte("sealed root")}, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("sealed eu")}
	rev, err := s.CreateAuthorities(ctx, bundle, root, region)
	if err != nil || rev.Number == 0 {
		t.Fatalf("%v, %v", rev, err)
	}
	if again, err := s.CreateAuthorities(ctx, bundle, root, region); err != nil || again != rev {
		t.Errorf("the same again: %v at %v, want %v", err, again, rev)
	}
	mine := AuthorityWrite{Region: "root", Slot: "a", Sealed: []byte("mine")}
	if _, err := s.CreateAuthorities(ctx, nil, mine, AuthorityWrite{Region: "us", Slot: "a", Sealed: []byte("x")}); !errors.Is(err, ErrExists) {
		t.Errorf("another controller's: %v, want ErrExists", err)
	}
	list, err := s.Authorities(ctx)
	if err != nil || len(list) != 2 || list[0].Region != "eu" || string(list[1].Sealed) != "sealed root" {
		t.Fatalf("%v, %v", list, err)
	}
	if text := fmt.Sprintf("%v %+v %#v", list, list[0], list[0]); strings.Contains(text, "sealed eu") || strings.Contains(text, fmt.Sprint([]byte("sealed eu"))) {
		t.Errorf("an authority prints its sealed part: %s", text)
	}
	lead(t, s, "leader", func(term *Term) {
		next := &federationv1.Bundle{TrustDomain: "mesh.test", Sequence: 2, Roots: [][]byte{{1}, {2}}}
		publish := &Swap{Key: keyBundle, Old: &federationv1.Record{Body: &federationv1.Record_Bundle{Bundle: bundle}}, New: &federationv1.Record{Body: &federationv1.Record_Bundle{Bundle: next}}}
		old := list[0]
		if _, err := term.PutAuthorities(ctx, publish, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("new"), At: old.Revision - 1}); !errors.Is(err, ErrConflict) {
			t.Errorf("decided on another revision: %v", err)
		}
		if fresh(t, s)[keyBundle].GetBundle().GetSequence() != 1 {
			t.Error("half of the transaction was made")
		}
		if _, err := term.PutAuthorities(ctx, publish, AuthorityWrite{Region: "eu", Slot: "a", At: old.Revision}, AuthorityWrite{Region: "eu", Slot: "b", Sealed: []byte("b")}); err != nil {
			t.Fatal(err)
		}
	})
	list, err = s.Authorities(ctx)
	if err != nil || len(list) != 2 || list[0].Slot != "b" || fresh(t, s)[keyBundle].GetBundle().GetSequence() != 2 {
		t.Errorf("after the rotation: %v, %v", list, err)
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	if _, err := s.CreateAuthorities(ctx, nil, AuthorityWrite{Region: "eu", Slot: "a", Sealed: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	list, err := s.Authorities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	at := list[0].Revision
	iss := issuance("01", "eu-1", 1)
	if _, err := s.Issued(ctx, iss.GetSerial()); !errors.Is(err, ErrNotFound) {
		t.Errorf("before it is noted: %v", err)
	}
	if err := s.Journal(ctx, iss, at); err != nil {
		t.Fatal(err)
	}
	if err := s.Journal(ctx, iss, at); err != nil {
		t.Errorf("the very same again: %v", err)
	}
	other := issuance("01", "eu-1", 1)
	other.PublicKeyHash = []byte("another key")
	if got, err := s.Issued(ctx, iss.GetSerial()); err != nil || got.GetGeneration() != iss.GetGeneration() {
		t.Errorf("once it is noted: %v, %v", got, err)
	}
	if err := s.Journal(ctx, other, at); !errors.Is(err, ErrExists) {
		t.Errorf("the same serial number for another key: %v", err)
	}
	if err := s.Journal(ctx, issuance("02", "eu-1", 2), at); !errors.Is(err, ErrStale) {
		t.Errorf("another generation: %v", err)
	}
	if err := s.Journal(ctx, issuance("03", "nobody", 1), at); !errors.Is(err, ErrNotFound) {
		t.Errorf("an unknown cluster: %v", err)
	}
	if err := s.Journal(ctx, issuance("04", "eu-1", 1), at+1); !errors.Is(err, ErrStale) {
		t.Errorf("a replaced authority: %v", err)
	}
	own := issuance("05", "", 0)
	own.SpiffeId = "spiffe://mesh.test/controller/a"
	if err := s.Journal(ctx, own, at); err != nil {
		t.Errorf("a controller's own: %v", err)
	}
	if _, err := s.Quarantine(ctx, "eu-1", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Journal(ctx, issuance("06", "eu-1", 1), at); !errors.Is(err, ErrStale) {
		t.Errorf("a quarantined cluster: %v", err)
	}
	var serials []string
	each := func() []string {
		serials = nil
		if err := s.EachIssued(ctx, func(i *federationv1.Issuance) bool { serials = append(serials, i.GetSerial()); return true }); err != nil {
			t.Fatal(err)
		}
		return serials
	}
	if d := cmp.Diff([]string{"01", "05"}, each()); d != "" {
		t.Error(d)
	}
	own = issuance("07", "", 0)
	own.NotAfter = timestamppb.New(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	if err := s.Journal(ctx, own, at); err != nil {
		t.Fatal(err)
	}
	lead(t, s, "leader", func(term *Term) {
		if n, err := term.PruneIssued(ctx, time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)); n != 2 || err != nil {
			t.Errorf("pruned %d, %v", n, err)
		}
	})
	if d := cmp.Diff([]string{"07"}, each()); d != "" {
		t.Error(d)
	}
}

func TestOperators(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	for range 2 {
		if err := s.PutOperator(ctx, "ada", "admin"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutOperator(ctx, "bob", "viewer"); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Operators(ctx); err != nil || cmp.Diff(map[string]string{"ada": "admin", "bob": "viewer"}, all) != "" {
		t.Errorf("%v, %v", all, err)
	}
	for range 2 {
		if err := s.PutOperator(ctx, "bob", ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.OperatorRole(ctx, "bob"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a person who was taken away: %v", err)
	}
	if role, err := s.OperatorRole(ctx, "ada"); role != "admin" || err != nil {
		t.Errorf("%q, %v", role, err)
	}
	for _, name := range []string{"", "a/b", "../ada"} {
		if err := s.PutOperator(ctx, name, "admin"); !errors.Is(err, ErrForbidden) {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := s.OperatorRole(ctx, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestPresence(t *testing.T) {
	t.Parallel()
	cfg := newEtcd(t, 1).config()
	cfg.PresenceTTL = time.Second
	a, b := open(t, cfg), open(t, cfg)
	a.SetController(&federationv1.ControllerState{Name: "a", Address: "10.0.0.1:7443"})
	b.SetController(&federationv1.ControllerState{Name: "b"})
	a.SetPresence(&federationv1.Presence{Cluster: "eu-1", Controller: "a"})
	eventually(t, func() bool { return len(b.Controllers()) == 2 && b.Presences()["eu-1"].GetController() == "a" })
	// The agent moves; the old controller's farewell comes late.
	b.SetPresence(&federationv1.Presence{Cluster: "eu-1", Controller: "b"})
	eventually(t, func() bool { return a.Presences()["eu-1"].GetController() == "b" })
	a.ClearPresence("eu-1")
	a.SetPresence(&federationv1.Presence{Cluster: "eu-2", Controller: "a"})
	eventually(t, func() bool { return b.Presences()["eu-2"] != nil })
	if got := b.Presences()["eu-1"].GetController(); got != "b" {
		t.Errorf("the late farewell took the new presence away: %q", got)
	}
	// The lease is lost, as after a pause: everything is shown again.
	client := raw(t, b)
	created := func(name string) int64 {
		resp, err := client.Get(t.Context(), b.prefix+controllerKey(name))
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Kvs) == 0 {
			return 0
		}
		return resp.Kvs[0].CreateRevision
	}
	before := max(created("a"), created("b"))
	leases, err := client.Leases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases.Leases {
		if _, err := client.Revoke(context.Background(), l.ID); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return created("a") > before && created("b") > before })
	eventually(t, func() bool {
		return len(b.Controllers()) == 2 && b.Presences()["eu-2"] != nil && a.Presences()["eu-1"] != nil
	})
	a.Close()
	eventually(t, func() bool { return len(b.Controllers()) == 1 && b.Presences()["eu-2"] == nil })
}
