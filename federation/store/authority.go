package store

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Authority is one stored signing authority. The store does not look inside.
type Authority struct {
	Region, Slot string
	Sealed       []byte
	Revision     int64 // of its last change; what a signature is compared with
}

// String leaves the sealed part out.
func (a Authority) String() string {
	return fmt.Sprintf("authority %s/%s at %d (%d sealed bytes)", a.Region, a.Slot, a.Revision, len(a.Sealed))
}

// GoString is String.
func (a Authority) GoString() string { return a.String() }

// Authorities lists all of them by region and slot.
func (s *Store) Authorities(ctx context.Context) ([]Authority, error) {
	kvs, _, err := s.list(ctx, dirAuthority, 0)
	if err != nil {
		return nil, err
	}
	var out []Authority
	for _, k := range slices.Sorted(maps.Keys(kvs)) {
		st, err := decodeState(k, kvs[k].value)
		if err != nil {
			return nil, err
		}
		region, slot, _ := strings.Cut(strings.TrimPrefix(k, dirAuthority), "/")
		out = append(out, Authority{Region: region, Slot: slot, Sealed: st.GetAuthority().GetSealed(), Revision: kvs[k].modified})
	}
	return out, nil
}

// AuthorityWrite puts one authority where it is at revision At (0: absent); nil
// Sealed deletes it.
type AuthorityWrite struct {
	Region, Slot string
	Sealed       []byte
	At           int64
}

// CreateAuthorities makes the first authorities of a mesh, together with the
// bundle that publishes them (nil: none), in one transaction. ErrExists where
// any of them is there already, with other content: another controller was
// faster, whose authorities count. Changes after that are a leader's.
func (s *Store) CreateAuthorities(ctx context.Context, bundle *federationv1.Bundle, writes ...AuthorityWrite) (federation.Revision, error) {
	var swaps []Swap
	if bundle != nil {
		swaps = append(swaps, Swap{Key: keyBundle, New: &federationv1.Record{Key: keyBundle, Body: &federationv1.Record_Bundle{Bundle: bundle}}})
	}
	for _, w := range writes {
		if w.At != 0 || w.Sealed == nil {
			return federation.Revision{}, fmt.Errorf("authority %s/%s: only a leader changes authorities: %w", w.Region, w.Slot, ErrForbidden)
		}
	}
	return s.putAuthorities(ctx, "create_authorities", nil, swaps, writes)
}

func (s *Store) putAuthorities(ctx context.Context, name string, term *Term, swaps []Swap, writes []AuthorityWrite) (federation.Revision, error) {
	keys := term.keys()
	for _, w := range swaps {
		keys = append(keys, w.Key)
	}
	for _, w := range writes {
		if !checkPart(w.Region) || !checkPart(w.Slot) {
			return federation.Revision{}, fmt.Errorf("authority %q/%q: needs a region and a slot: %w", w.Region, w.Slot, ErrForbidden)
		}
		keys = append(keys, authorityKey(w.Region, w.Slot))
	}
	if len(keys) > maxOps {
		return federation.Revision{}, fmt.Errorf("%s: too many at once: %w", name, ErrForbidden)
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
		for _, w := range writes {
			if err := s.addAuthority(t, sn, w); err != nil {
				return err
			}
		}
		out = sn.catalog()
		if len(t.changes) == 0 && t.err == nil {
			return nil
		}
		if !t.catalogChanging() {
			// A witness, should all of the changes be deletes.
			t.putState(s, keyHead, &federationv1.State{}, 0)
		}
		rev, err := s.commit(ctx, t)
		out = sn.at(rev)
		return err
	})
	return out, err
}

func (s *Store) addAuthority(t *txn, sn *snapshot, w AuthorityWrite) error {
	key := authorityKey(w.Region, w.Slot)
	st, err := sn.state(key)
	if err != nil {
		return err
	}
	if bytes.Equal(st.GetAuthority().GetSealed(), w.Sealed) {
		return nil
	}
	if sn.entries[key].modified != w.At {
		if w.At == 0 {
			return fmt.Errorf("%s: %w", key, ErrExists)
		}
		return fmt.Errorf("%s: %w", key, ErrConflict)
	}
	t.require(sn.compare(key)...)
	if w.Sealed == nil {
		t.delete(key)
		return nil
	}
	t.putState(s, key, &federationv1.State{Body: &federationv1.State_Authority{Authority: &federationv1.SealedAuthority{Sealed: w.Sealed}}}, 0)
	return nil
}

// Journal notes an identity that is about to be signed, or has been; its chain
// leaves only after Journal has returned nil. It compares the authority, which
// must be as it was at revision authorityAt, and the cluster (where the
// identity lies under one), which must be active and of the same generation:
// else ErrStale. A serial is noted once; noting the very same again, as after
// ErrUnknown, is no error.
func (s *Store) Journal(ctx context.Context, iss *federationv1.Issuance, authorityAt int64) error {
	if !checkPart(iss.GetSerial()) || authorityAt == 0 {
		return fmt.Errorf("journal: a serial number and the authority's revision are needed: %w", ErrForbidden)
	}
	key, authority := issuedKey(iss.GetSerial()), authorityKey(iss.GetRegion(), iss.GetSlot())
	c := federation.ClusterID(iss.GetCluster())
	keys := []string{key, authority}
	if c != "" {
		keys = append(keys, clusterKey(c))
	}
	return retry(ctx, "journal", func() error {
		sn, err := s.read(ctx, keys...)
		if err != nil {
			return err
		}
		st, err := sn.state(key)
		if err != nil {
			return err
		}
		if st != nil {
			if proto.Equal(st.GetIssuance(), iss) {
				return nil
			}
			return fmt.Errorf("serial number %s: %w", iss.GetSerial(), ErrExists)
		}
		if sn.entries[authority].modified != authorityAt {
			return fmt.Errorf("%s was replaced: %w", authority, ErrStale)
		}
		if c != "" {
			m, err := sn.member(c)
			if err != nil {
				return err
			}
			if err := checkActive(m, iss.GetGeneration()); err != nil {
				return err
			}
		}
		t := s.begin("journal", sn)
		t.require(sn.compare(keys...)...)
		t.putState(s, key, &federationv1.State{Body: &federationv1.State_Issuance{Issuance: proto.CloneOf(iss)}}, 0)
		_, err = s.commit(ctx, t)
		return err
	})
}

// Issued is the journal's entry of a serial number; ErrNotFound where there is
// none (any more).
func (s *Store) Issued(ctx context.Context, serial string) (*federationv1.Issuance, error) {
	if !checkPart(serial) {
		return nil, fmt.Errorf("serial number %q: %w", serial, ErrNotFound)
	}
	sn, err := s.read(ctx, issuedKey(serial))
	if err != nil {
		return nil, err
	}
	st, err := sn.state(issuedKey(serial))
	if err == nil && st == nil {
		err = fmt.Errorf("serial number %s: %w", serial, ErrNotFound)
	}
	return st.GetIssuance(), err
}

// EachIssued calls f with every journaled identity, by serial number, at one
// revision, until f returns false.
func (s *Store) EachIssued(ctx context.Context, f func(*federationv1.Issuance) bool) error {
	from, end := s.prefix+dirIssued, clientv3.GetPrefixRangeEnd(s.prefix+dirIssued)
	for rev := int64(0); ; {
		resp, err := s.page(ctx, from, end, rev)
		if err != nil {
			return err
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, kv := range resp.Kvs {
			st, err := decodeState(strings.TrimPrefix(string(kv.Key), s.prefix), kv.Value)
			if err != nil {
				return err
			}
			if !f(st.GetIssuance()) {
				return nil
			}
		}
		if !resp.More {
			return nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// PruneIssued deletes journal entries of identities that expired before then,
// and returns how many. Stopping in between is harmless.
func (t *Term) PruneIssued(ctx context.Context, before time.Time) (int, error) {
	s := t.store
	var expired []string
	err := s.EachIssued(ctx, func(iss *federationv1.Issuance) bool {
		if iss.GetNotAfter().AsTime().Before(before) {
			expired = append(expired, issuedKey(iss.GetSerial()))
		}
		return true
	})
	pruned := 0
	for part := range slices.Chunk(expired, maxOps) {
		err := retry(ctx, "prune issued", func() error {
			sn, err := s.read(ctx, t.keys()...)
			if err != nil {
				return err
			}
			if err := t.check(sn); err != nil {
				return err
			}
			tx := s.begin("prune_issued", sn)
			tx.require(t.guards()...)
			tx.delete(part...)
			tx.putState(s, keyHead, &federationv1.State{}, 0)
			_, err = s.commit(ctx, tx)
			return err
		})
		if err != nil {
			return pruned, err
		}
		pruned += len(part)
	}
	return pruned, err
}

// PutOperator gives a person a role, whatever it was before; an empty role
// takes the person away. Doing it twice is harmless.
func (s *Store) PutOperator(ctx context.Context, name, role string) error {
	if !checkPart(name) {
		return fmt.Errorf("operator %q: not a name: %w", name, ErrForbidden)
	}
	return retry(ctx, "put operator", func() error {
		sn, err := s.read(ctx, operatorKey(name))
		if err != nil {
			return err
		}
		st, err := sn.state(operatorKey(name))
		if err != nil || st.GetOperator().GetRole() == role {
			return err
		}
		t := s.begin("put_operator", sn)
		t.require(sn.compare(operatorKey(name))...)
		if role == "" {
			t.delete(operatorKey(name))
			t.putState(s, keyHead, &federationv1.State{}, 0)
		} else {
			t.putState(s, operatorKey(name), &federationv1.State{Body: &federationv1.State_Operator{
				Operator: &federationv1.OperatorState{Name: name, Role: role},
			}}, 0)
		}
		_, err = s.commit(ctx, t)
		return err
	})
}

// Operators maps names to roles.
func (s *Store) Operators(ctx context.Context) (map[string]string, error) {
	kvs, _, err := s.list(ctx, dirOperator, 0)
	if err != nil {
		return nil, err
	}
	out := make(map[string]string, len(kvs))
	for k, e := range kvs {
		st, err := decodeState(k, e.value)
		if err != nil {
			return nil, err
		}
		out[strings.TrimPrefix(k, dirOperator)] = st.GetOperator().GetRole()
	}
	return out, nil
}

// OperatorRole is the role of one person; ErrNotFound where there is none.
func (s *Store) OperatorRole(ctx context.Context, name string) (string, error) {
	if !checkPart(name) {
		return "", fmt.Errorf("operator %q: %w", name, ErrNotFound)
	}
	sn, err := s.read(ctx, operatorKey(name))
	if err != nil {
		return "", err
	}
	st, err := sn.state(operatorKey(name))
	if err == nil && st == nil {
		err = fmt.Errorf("operator %q: %w", name, ErrNotFound)
	}
	return st.GetOperator().GetRole(), err
}
