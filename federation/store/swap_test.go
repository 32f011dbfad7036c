package store

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func policyRecord(name, target string, spill int32) *federationv1.Record {
	return &federationv1.Record{Key: "policy/controller/shop/" + name, Body: &federationv1.Record_Policy{Policy: &federationv1.Policy{
		Origin: "controller", Namespace: "shop", Name: name, TargetNamespace: "shop", TargetService: target, SpillBelowPerMille: spill,
	}}}
}

func drain(cluster string, remaining int32) *federationv1.Record {
	return &federationv1.Record{Key: "drain/" + cluster, Body: &federationv1.Record_Drain{Drain: &federationv1.Drain{RemainingPerMille: remaining}}}
}

func vip(cluster, name, addr string) *federationv1.Record {
	return &federationv1.Record{Key: "vip/" + cluster + "/shop/" + name, Body: &federationv1.Record_Vip{Vip: &federationv1.Vip{Address: addr}}}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	p := policyRecord("regional", "pay", 500).GetPolicy()
	first, err := s.PutPolicy(ctx, p)
	if err != nil || first.Before != nil || !first.Changed || first.After.GetAccepted() != first.Revision.Number {
		t.Fatalf("%+v, %v", first, err)
	}
	same, err := s.PutPolicy(ctx, p)
	if err != nil || same.Changed || same.Revision != first.Revision || cmp.Diff(first.After, same.Before, protocmp.Transform()) != "" {
		t.Errorf("the same again: %+v, %v", same, err)
	}
	changed, err := s.PutPolicy(ctx, policyRecord("regional", "pay", 700).GetPolicy())
	if err != nil || !changed.Changed || changed.Before.GetSpillBelowPerMille() != 500 || changed.After.GetAccepted() != first.Revision.Number {
		t.Errorf("changed: %+v, %v", changed, err)
	}
	if _, err := s.PutPolicy(ctx, &federationv1.Policy{Namespace: "shop", Name: "a/b"}); !errors.Is(err, ErrForbidden) {
		t.Errorf("a name with a slash got %v", err)
	}
	gone, err := s.DeletePolicy(ctx, "shop", "regional")
	if err != nil || !gone.Changed || gone.Before.GetSpillBelowPerMille() != 700 || gone.After != nil {
		t.Errorf("deleted: %+v, %v", gone, err)
	}
	if _, err := s.DeletePolicy(ctx, "shop", "regional"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestSwap(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	full, half := drain("eu-1", 1000), drain("eu-1", 500)
	rev, err := s.Swap(ctx, Swap{Key: "drain/eu-1", New: full})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.Swap(ctx, Swap{Key: "drain/eu-1", New: full}); err != nil || again != rev {
		t.Errorf("done already: %v at %v, want %v", err, again, rev)
	}
	if _, err := s.Swap(ctx, Swap{Key: "drain/eu-1", Old: half, New: drain("eu-1", 0)}); !errors.Is(err, ErrConflict) {
		t.Errorf("decided on another state: %v", err)
	}
	// All or none.
	_, err = s.Swap(ctx, Swap{Key: "drain/eu-2", New: drain("eu-2", 1000)}, Swap{Key: "drain/eu-1", Old: half})
	if !errors.Is(err, ErrConflict) || fresh(t, s)["drain/eu-2"] != nil {
		t.Errorf("one of two swaps was made: %v", err)
	}
	if _, err := s.Swap(ctx, Swap{Key: "drain/eu-1", Old: full}); err != nil || fresh(t, s)["drain/eu-1"] != nil {
		t.Errorf("deleting: %v", err)
	}
	for _, r := range []*federationv1.Record{vip("eu-1", "pay", "241.0.0.1"), export("eu-1", "pay", 80), memberRecord(member("eu-1"))} {
		if _, err := s.Swap(ctx, Swap{Key: r.GetKey(), New: r}); !errors.Is(err, ErrForbidden) {
			t.Errorf("%s: %v, want ErrForbidden", r.GetKey(), err)
		}
	}
	if _, err := s.Swap(ctx, Swap{Key: "drain/eu-1", New: policyRecord("p", "pay", 0)}); !errors.Is(err, ErrForbidden) {
		t.Errorf("a policy as a drain: %v", err)
	}
}

func TestVipBelongsToOneService(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	lead(t, s, "leader", func(term *Term) {
		a, b := vip("eu-1", "pay", "241.0.0.1"), vip("eu-1", "cart", "241.0.0.1")
		if _, err := term.Swap(ctx, Swap{Key: a.GetKey(), New: a}); err != nil {
			t.Fatal(err)
		}
		if _, err := term.Swap(ctx, Swap{Key: b.GetKey(), New: b}); !errors.Is(err, ErrExists) {
			t.Errorf("the address of another service: %v, want ErrExists", err)
		}
		elsewhere := vip("eu-2", "cart", "241.0.0.1")
		if _, err := term.Swap(ctx, Swap{Key: elsewhere.GetKey(), New: elsewhere}); err != nil {
			t.Errorf("the same address in another cluster: %v", err)
		}
		if _, err := term.Swap(ctx, Swap{Key: a.GetKey(), Old: a}); err != nil {
			t.Fatal(err)
		}
		if _, err := term.Swap(ctx, Swap{Key: b.GetKey(), New: b}); err != nil {
			t.Errorf("an address that is free again: %v", err)
		}
		moved := vip("eu-1", "cart", "241.0.0.2")
		if _, err := term.Swap(ctx, Swap{Key: b.GetKey(), Old: b, New: moved}); err != nil {
			t.Fatal(err)
		}
		if _, err := term.Swap(ctx, Swap{Key: a.GetKey(), New: a}); err != nil {
			t.Errorf("the address that the other service left: %v", err)
		}
	})
}
