package store

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// MaxSwaps is how many swaps one call takes.
const MaxSwaps = 40

// Swap replaces one record by another. Old nil means that there is none, New
// nil deletes it.
type Swap struct {
	Key      string
	Old, New *federationv1.Record
}

// Swap makes all of the swaps in one transaction, or none of them. It is for
// what operators decide, at any replica: policies of origin "controller" and
// drains (Term.Swap is for what a leader decides). ErrConflict where a stored
// record is not the Old of its swap, unless it is the New already: so a call
// after ErrUnknown finds the earlier one's success.
func (s *Store) Swap(ctx context.Context, swaps ...Swap) (federation.Revision, error) {
	for _, w := range swaps {
		if dirOf(w.Key) != dirDrain && !isControllerPolicy(w.Key) {
			return federation.Revision{}, fmt.Errorf("key %q is not an operator's to write: %w", w.Key, ErrForbidden)
		}
	}
	return s.swap(ctx, "swap", nil, swaps)
}

func isControllerPolicy(key string) bool {
	return dirOf(key) == dirPolicy && dirOf(key[len(dirPolicy):]) == federation.OriginController+"/"
}

// swap is Swap for a term, or for nobody in particular where that is nil.
func (s *Store) swap(ctx context.Context, name string, term *Term, swaps []Swap) (federation.Revision, error) {
	if len(swaps) > MaxSwaps {
		return federation.Revision{}, fmt.Errorf("%s: %d swaps at once, at most %d: %w", name, len(swaps), MaxSwaps, ErrForbidden)
	}
	keys := term.keys()
	for _, w := range swaps {
		if w.New != nil {
			if err := checkBody(w.Key, w.New); err != nil {
				return federation.Revision{}, err
			}
		}
		keys = append(keys, w.Key)
		for _, r := range []*federationv1.Record{w.Old, w.New} {
			if a := vipAddr(w.Key, r); a != "" {
				keys = append(keys, a)
			}
		}
	}
	var out federation.Revision
	err := retry(ctx, name, func() error {
		sn, err := s.read(ctx, keys...)
		if err != nil {
			return err
		}
		if err := term.check(sn); err != nil {
			return err
		}
		t := s.begin(name, sn)
		t.require(term.guards()...)
		for _, w := range swaps {
			if err := s.addSwap(t, sn, w); err != nil {
				return err
			}
		}
		if len(t.changes) == 0 && t.err == nil {
			out = sn.catalog()
			return nil
		}
		rev, err := s.commit(ctx, t)
		out = sn.at(rev)
		return err
	})
	return out, err
}

// addSwap adds one swap to t, or nothing where it is done already.
func (s *Store) addSwap(t *txn, sn *snapshot, w Swap) error {
	have, err := sn.record(w.Key)
	if err != nil {
		return err
	}
	if sameRecord(have, w.New) {
		return nil
	}
	if !sameRecord(have, w.Old) {
		return fmt.Errorf("%s: %w", w.Key, ErrConflict)
	}
	t.require(sn.compare(w.Key)...)
	before, after := vipAddr(w.Key, have), vipAddr(w.Key, w.New)
	if before != "" && before != after {
		t.delete(before)
	}
	if after != "" && before != after {
		if sn.entries[after].exists() {
			return fmt.Errorf("%s: the address is another service's: %w", after, ErrExists)
		}
		id := serviceOf(w.Key)
		t.require(guard{key: after})
		t.putState(s, after, &federationv1.State{Body: &federationv1.State_VipHolder{VipHolder: &federationv1.VipHolder{
			Namespace: id.Namespace, Name: id.Name,
		}}}, 0)
	}
	if w.New == nil {
		t.delete(w.Key)
		return nil
	}
	r := proto.CloneOf(w.New)
	r.Key = w.Key
	t.putRecord(r)
	return nil
}

// sameRecord compares bodies: keys are given otherwise, and the revision of
// the first acceptance is etcd's to say.
func sameRecord(a, b *federationv1.Record) bool {
	if a == nil || b == nil {
		return a == b
	}
	strip := func(r *federationv1.Record) *federationv1.Record {
		r = proto.CloneOf(r)
		r.Key = ""
		if p := r.GetPolicy(); p != nil {
			p.Accepted = 0
		}
		if e := r.GetExport(); e != nil {
			e.Accepted = 0
		}
		return r
	}
	return proto.Equal(strip(a), strip(b))
}

// PolicyOutcome is what PutPolicy or DeletePolicy did.
type PolicyOutcome struct {
	Before, After *federationv1.Policy // nil where there is none
	Revision      federation.Revision
	Changed       bool
}

// PutPolicy creates or replaces a policy of origin "controller", whatever it is
// at present. Before says what it was; after ErrUnknown, a second call may find
// its own first one there.
func (s *Store) PutPolicy(ctx context.Context, p *federationv1.Policy) (PolicyOutcome, error) {
	p = proto.CloneOf(p)
	p.Origin = federation.OriginController
	key := policyKey(p.GetOrigin(), p.GetNamespace(), p.GetName())
	return s.setPolicy(ctx, key, &federationv1.Record{Key: key, Body: &federationv1.Record_Policy{Policy: p}})
}

// DeletePolicy deletes a policy of origin "controller"; ErrNotFound where there
// is none, also after an earlier call with ErrUnknown that had succeeded.
func (s *Store) DeletePolicy(ctx context.Context, namespace, name string) (PolicyOutcome, error) {
	out, err := s.setPolicy(ctx, policyKey(federation.OriginController, namespace, name), nil)
	if err == nil && out.Before == nil {
		err = fmt.Errorf("policy %s/%s: %w", namespace, name, ErrNotFound)
	}
	return out, err
}

func (s *Store) setPolicy(ctx context.Context, key string, want *federationv1.Record) (PolicyOutcome, error) {
	var out PolicyOutcome
	if want != nil {
		if err := checkBody(key, want); err != nil {
			return out, err
		}
	}
	err := retry(ctx, "policy", func() error {
		sn, err := s.read(ctx, key)
		if err != nil {
			return err
		}
		have, err := sn.record(key)
		if err != nil {
			return err
		}
		out = PolicyOutcome{Before: have.GetPolicy(), After: proto.CloneOf(want.GetPolicy()), Revision: sn.catalog()}
		if out.After != nil {
			out.After.Accepted = sn.entries[key].created
		}
		if sameRecord(have, want) {
			return nil
		}
		t := s.begin("policy", sn)
		if err := s.addSwap(t, sn, Swap{Key: key, Old: have, New: want}); err != nil {
			return err
		}
		rev, err := s.commit(ctx, t)
		out.Revision, out.Changed = sn.at(rev), true
		if out.After != nil && have == nil {
			out.After.Accepted = rev
		}
		return err
	})
	return out, err
}
