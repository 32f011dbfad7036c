package store

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// join registers and enrols a cluster.
func join(t testing.TB, s *Store, name string) *federationv1.Member {
	t.Helper()
	if _, _, err := s.Register(timeout(t), member(name), token("token-"+name)); err != nil {
		t.Fatal(err)
	}
	e, err := s.Enrol(timeout(t), "token-"+name, []byte("key of "+name))
	if err != nil {
		t.Fatal(err)
	}
	return e.Member
}

func TestRegisterAndEnrol(t *testing.T) {
	t.Parallel()
	forEachEtcd(t, func(t *testing.T, s *Store) {
		ctx := timeout(t)
		m, registered, err := s.Register(ctx, member("eu-1"), token("aa"))
		if err != nil {
			t.Fatal(err)
		}
		want := member("eu-1")
		want.State, want.Generation = federationv1.MemberState_MEMBER_STATE_PENDING, 1
		if d := cmp.Diff(want, m, protocmp.Transform()); d != "" {
			t.Error(d)
		}
		if _, _, err := s.Register(ctx, member("eu-1"), token("bb")); !errors.Is(err, ErrExists) {
			t.Errorf("a second registration got %v, want ErrExists", err)
		}
		if _, again, err := s.Register(ctx, member("eu-1"), token("aa")); err != nil || again != registered {
			t.Errorf("the same registration got %v at %v, want no error at %v", err, again, registered)
		}
		if _, err := s.OpenSession(ctx, SessionRequest{Cluster: "eu-1", Controller: "c", Instance: "i"}); !errors.Is(err, ErrStale) {
			t.Errorf("a session before the enrolment got %v, want ErrStale", err)
		}
		if _, err := s.Enrolment(ctx, "eu-1"); !errors.Is(err, ErrNotFound) {
			t.Errorf("the key before the enrolment got %v, want ErrNotFound", err)
		}
		first, err := s.Enrol(ctx, "aa", []byte("key 1"))
		if err != nil || first.Again || first.Member.GetState() != federationv1.MemberState_MEMBER_STATE_ACTIVE {
			t.Fatalf("enrol: %+v, %v", first, err)
		}
		if !first.Revision.Covers(registered) || first.Revision == registered {
			t.Errorf("enrolled at %v, registered at %v", first.Revision, registered)
		}
		again, err := s.Enrol(ctx, "aa", []byte("key 1"))
		if err != nil || !again.Again || again.Revision != first.Revision {
			t.Errorf("the same key again: %+v, %v", again, err)
		}
		_, used := s.Enrol(ctx, "aa", []byte("key 2"))
		_, unknown := s.Enrol(ctx, "zz", []byte("key 2"))
		if !errors.Is(used, ErrToken) || used.Error() != unknown.Error() {
			t.Errorf("a used token says %q, an unknown one %q: they must look the same", used, unknown)
		}
	})
}

func TestTokenExpires(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	if _, _, err := s.Register(ctx, member("eu-1"), Token{Hash: "aa", TTL: time.Second}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		sn, err := s.read(ctx, tokenKey("aa"))
		return err == nil && !sn.entries[tokenKey("aa")].exists()
	})
	_, expired := s.Enrol(ctx, "aa", []byte("key"))
	_, unknown := s.Enrol(ctx, "zz", []byte("key"))
	if !errors.Is(expired, ErrToken) || expired.Error() != unknown.Error() {
		t.Errorf("an expired token says %q, an unknown one %q: they must look the same", expired, unknown)
	}
	if err := s.CreateToken(ctx, "eu-1", token("bb")); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Enrol(ctx, "bb", []byte("key")); err != nil || e.Member.GetGeneration() != 1 {
		t.Errorf("another token: %+v, %v", e, err)
	}
}

func TestOneTokenForOneKeyUnderConcurrency(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	if _, _, err := s.Register(ctx, member("eu-1"), token("aa")); err != nil {
		t.Fatal(err)
	}
	const uses = 200
	won := make([]bool, uses)
	var wg sync.WaitGroup
	for i := range uses {
		wg.Go(func() {
			_, err := s.Enrol(ctx, "aa", fmt.Appendf(nil, "key %d", i))
			won[i] = err == nil
			if err != nil && !errors.Is(err, ErrToken) {
				t.Errorf("key %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	winner := -1
	for i, w := range won {
		if w && winner >= 0 {
			t.Fatalf("keys %d and %d both redeemed the token", winner, i)
		} else if w {
			winner = i
		}
	}
	if winner < 0 {
		t.Fatal("no key redeemed the token")
	}
	e, err := s.Enrolment(ctx, "eu-1")
	if err != nil || string(e.GetPublicKey()) != fmt.Sprintf("key %d", winner) {
		t.Errorf("the enrolled key is %q, %v; key %d won", e.GetPublicKey(), err, winner)
	}
}

func TestUpdateMember(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	join(t, s, "eu-1")
	m, rev, err := s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error {
		m.Grants = append(m.Grants, "pay/*")
		return nil
	})
	if err != nil || len(m.GetGrants()) != 2 {
		t.Fatalf("%v, %v", m, err)
	}
	if _, same, err := s.UpdateMember(ctx, "eu-1", func(*federationv1.Member) error { return nil }); err != nil || same != rev {
		t.Errorf("changing nothing: %v at %v, want %v", err, same, rev)
	}
	_, _, err = s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error { m.Generation++; return nil })
	if !errors.Is(err, ErrForbidden) {
		t.Errorf("editing the generation got %v", err)
	}
	if _, _, err := s.UpdateMember(ctx, "nobody", func(*federationv1.Member) error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("an unknown cluster got %v", err)
	}
	// Changes by several replicas at once are all kept.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			_, _, err := s.UpdateMember(ctx, "eu-1", func(m *federationv1.Member) error {
				m.Grants = append(m.Grants, fmt.Sprintf("ns-%d/*", i))
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if m, err := s.Member(ctx, "eu-1"); err != nil || len(m.GetGrants()) != 22 {
		t.Errorf("grants after concurrent changes: %v, %v", m.GetGrants(), err)
	}
}

func TestAdoptMember(t *testing.T) {
	t.Parallel()
	s := open(t, embeddedConfig(t))
	ctx := timeout(t)
	lost := member("eu-9")
	lost.Generation, lost.State = 3, federationv1.MemberState_MEMBER_STATE_ACTIVE
	m, err := s.AdoptMember(ctx, lost)
	if err != nil || m.GetState() != federationv1.MemberState_MEMBER_STATE_PENDING || m.GetGeneration() != 3 {
		t.Errorf("%v, %v", m, err)
	}
	join(t, s, "eu-1")
	if m, err := s.AdoptMember(ctx, member("eu-1")); err != nil || m.GetState() != federationv1.MemberState_MEMBER_STATE_ACTIVE {
		t.Errorf("a known member was changed: %v, %v", m, err)
	}
}
