package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Token is a join token to be made: the store sees its hash only.
type Token struct {
	Hash string        // of the token, in hexadecimal
	TTL  time.Duration // its life, in time of the etcd server
	By   string        // operator who wants it
}

// Register makes a cluster's registration, in state pending, and its first join
// token. m's state and generation are set by the store: 1, or one more than
// that of a deregistered cluster of the same name, whose remains are cleared
// first, and which must have been denied for Config.ReuseAfter (ErrTooSoon).
// ErrExists where the name is registered.
//
// After ErrUnknown, Register with the same token finds its own success.
func (s *Store) Register(ctx context.Context, m *federationv1.Member, tok Token) (*federationv1.Member, federation.Revision, error) {
	c := federation.ClusterID(m.GetCluster())
	m = proto.CloneOf(m)
	lease, err := s.grantToken(ctx, tok)
	if err != nil {
		return nil, federation.Revision{}, err
	}
	var out federation.Revision
	used := false
	err = retry(ctx, "register", func() error {
		sn, err := s.read(ctx, clusterKey(c), enrolmentKey(c), tokenKey(tok.Hash))
		if err != nil {
			return err
		}
		m.State, m.Generation = federationv1.MemberState_MEMBER_STATE_PENDING, 1
		if sn.entries[clusterKey(c)].exists() {
			old, err := sn.member(c)
			if err != nil {
				return err
			}
			if st, err := sn.state(tokenKey(tok.Hash)); err != nil {
				return err
			} else if st.GetToken().GetCluster() == string(c) && st.GetToken().GetGeneration() == old.GetGeneration() {
				m, out = old, sn.catalog()
				return nil
			}
			if old.GetState() != federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
				return fmt.Errorf("cluster %q: %w", c, ErrExists)
			}
			if err := s.checkReuse(ctx, c, old.GetGeneration()); err != nil {
				return err
			}
			if _, err := s.sweep(ctx, c); err != nil {
				return err
			}
			m.Generation = old.GetGeneration() + 1
		}
		t := s.begin("register", sn)
		t.require(sn.compare(clusterKey(c), tokenKey(tok.Hash))...)
		t.putRecord(memberRecord(m))
		s.putToken(t, m, tok, lease)
		rev, err := s.commit(ctx, t)
		out, used = sn.at(rev), err == nil || errors.Is(err, ErrUnknown)
		return err
	})
	if !used {
		s.revoke(lease)
	}
	if err != nil {
		return nil, federation.Revision{}, err
	}
	return m, out, nil
}

func memberRecord(m *federationv1.Member) *federationv1.Record {
	return &federationv1.Record{
		Key: clusterKey(federation.ClusterID(m.GetCluster())), Body: &federationv1.Record_Member{Member: m},
	}
}

// grantToken makes the lease that is a token's life.
func (s *Store) grantToken(ctx context.Context, tok Token) (clientv3.LeaseID, error) {
	if !checkPart(tok.Hash) || tok.TTL < time.Second {
		return 0, fmt.Errorf("join token: it needs a hash, and a life of a second or more: %w", ErrForbidden)
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	resp, err := s.client.Grant(ctx, int64(tok.TTL/time.Second))
	if err != nil {
		return 0, s.explain("join token", err)
	}
	return resp.ID, nil
}

// revoke gives back a lease that nothing hangs on. Its failure costs nothing:
// the lease expires.
func (s *Store) revoke(lease clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	if _, err := s.client.Revoke(ctx, lease); err != nil {
		s.log.Debug("a lease is left to expire", "error", err)
	}
}

func (s *Store) putToken(t *txn, m *federationv1.Member, tok Token, lease clientv3.LeaseID) {
	now := s.clock.Now()
	t.putState(s, tokenKey(tok.Hash), &federationv1.State{Body: &federationv1.State_Token{Token: &federationv1.TokenState{
		Cluster: m.GetCluster(), Generation: m.GetGeneration(), CreatedBy: tok.By,
		Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(tok.TTL)),
	}}}, lease)
}

// CreateToken makes one more join token for a registered cluster: pending,
// active (its agent has lost its key), or quarantined for Config.ReuseAfter.
// ErrExists where the token's hash is known; after ErrUnknown that means that
// the first call had succeeded.
func (s *Store) CreateToken(ctx context.Context, c federation.ClusterID, tok Token) error {
	lease, err := s.grantToken(ctx, tok)
	if err != nil {
		return err
	}
	err = retry(ctx, "create token", func() error {
		sn, err := s.read(ctx, clusterKey(c), tokenKey(tok.Hash))
		if err != nil {
			return err
		}
		m, err := sn.member(c)
		if err != nil {
			return err
		}
		if err := s.checkEnrollable(ctx, m); err != nil {
			return err
		}
		t := s.begin("create_token", sn)
		t.require(sn.compare(clusterKey(c))...)
		t.require(guard{key: tokenKey(tok.Hash)})
		s.putToken(t, m, tok, lease)
		if sn.entries[tokenKey(tok.Hash)].exists() {
			return fmt.Errorf("join token of cluster %q: %w", c, ErrExists)
		}
		_, err = s.commit(ctx, t)
		return err
	})
	if err != nil && !errors.Is(err, ErrUnknown) {
		s.revoke(lease)
	}
	return err
}

// checkEnrollable says why m cannot enrol now.
func (s *Store) checkEnrollable(ctx context.Context, m *federationv1.Member) error {
	c := federation.ClusterID(m.GetCluster())
	switch m.GetState() {
	case federationv1.MemberState_MEMBER_STATE_PENDING, federationv1.MemberState_MEMBER_STATE_ACTIVE:
		return nil
	case federationv1.MemberState_MEMBER_STATE_QUARANTINED:
		return s.checkReuse(ctx, c, m.GetGeneration())
	default:
		return fmt.Errorf("cluster %q is deregistered: %w", c, ErrNotFound)
	}
}

// checkReuse says why generation g of c cannot have a successor yet: identities
// that were issued to it may be valid still.
func (s *Store) checkReuse(ctx context.Context, c federation.ClusterID, g int64) error {
	sn, err := s.read(ctx, denyKey(c, g))
	if err != nil {
		return err
	}
	r, err := sn.record(denyKey(c, g))
	if err != nil || r == nil {
		return err
	}
	free := r.GetDenial().GetIssuedBefore().AsTime().Add(s.cfg.ReuseAfter)
	if s.clock.Now().Before(free) {
		return fmt.Errorf("cluster %q: identities of its generation %d may be valid until %s, take another name or wait: %w",
			c, g, free.UTC().Format(time.RFC3339), ErrTooSoon)
	}
	return nil
}

// Enrolled is what Enrol found or made.
type Enrolled struct {
	Member   *federationv1.Member
	Revision federation.Revision
	Again    bool // the same key had redeemed the token before
}

// Enrol redeems a join token for one public key (DER): the cluster becomes
// active and the key its own. A first enrolment keeps the generation of the
// registration; a later one (lost key, lifted quarantine) counts it up and ends
// the session, so that the old key's holder writes nothing more.
//
// ErrToken in every case in which the token is of no use to this key. The same
// key may redeem it again, while the token lives and the key is the cluster's:
// so a call after ErrUnknown finds the earlier one's success.
func (s *Store) Enrol(ctx context.Context, hash string, publicKey []byte) (Enrolled, error) {
	if len(publicKey) == 0 || !checkPart(hash) {
		return Enrolled{}, fmt.Errorf("enrol: %w", ErrToken)
	}
	var out Enrolled
	err := retry(ctx, "enrol", func() error {
		sn, err := s.read(ctx, tokenKey(hash))
		if err != nil {
			return err
		}
		st, err := sn.state(tokenKey(hash))
		if err != nil {
			return err
		}
		c := federation.ClusterID(st.GetToken().GetCluster())
		if c == "" {
			return ErrToken
		}
		if sn, err = s.read(ctx, tokenKey(hash), clusterKey(c), enrolmentKey(c)); err != nil {
			return err
		}
		out, err = s.enrol(ctx, sn, c, hash, publicKey)
		return err
	})
	if err != nil {
		return Enrolled{}, fmt.Errorf("enrol: %w", err)
	}
	return out, nil
}

// enrol decides on one snapshot of token, cluster and enrolment.
func (s *Store) enrol(ctx context.Context, sn *snapshot, c federation.ClusterID, hash string, publicKey []byte) (Enrolled, error) {
	none := Enrolled{}
	st, err := sn.state(tokenKey(hash))
	if err != nil {
		return none, err
	}
	tok := st.GetToken()
	if !sn.entries[clusterKey(c)].exists() || tok == nil {
		return none, ErrToken
	}
	m, err := sn.member(c)
	if err != nil {
		return none, err
	}
	st, err = sn.state(enrolmentKey(c))
	if err != nil {
		return none, err
	}
	enrolment := st.GetEnrolment()
	if used := tok.GetPublicKey(); len(used) != 0 {
		if !bytes.Equal(used, publicKey) || !bytes.Equal(enrolment.GetPublicKey(), publicKey) ||
			m.GetState() != federationv1.MemberState_MEMBER_STATE_ACTIVE || enrolment.GetGeneration() != m.GetGeneration() {
			return none, ErrToken
		}
		return Enrolled{Member: m, Revision: sn.catalog(), Again: true}, nil
	}
	if tok.GetGeneration() != m.GetGeneration() || s.checkEnrollable(ctx, m) != nil {
		return none, ErrToken
	}
	t := s.begin("enrol", sn)
	t.require(sn.compare(tokenKey(hash), clusterKey(c), enrolmentKey(c))...)
	if m.GetState() != federationv1.MemberState_MEMBER_STATE_PENDING {
		m.Generation++
		t.delete(sessionKey(c), reportKey(c))
	}
	m.State = federationv1.MemberState_MEMBER_STATE_ACTIVE
	t.putRecord(memberRecord(m))
	tok.PublicKey = publicKey
	t.putStateKeeping(s, tokenKey(hash), &federationv1.State{Body: &federationv1.State_Token{Token: tok}})
	t.putState(s, enrolmentKey(c), &federationv1.State{Body: &federationv1.State_Enrolment{Enrolment: &federationv1.Enrolment{
		Generation: m.GetGeneration(), PublicKey: publicKey, Enrolled: timestamppb.New(s.clock.Now()), Token: hash,
	}}}, 0)
	rev, err := s.commit(ctx, t)
	if err != nil {
		return none, err
	}
	return Enrolled{Member: m, Revision: sn.at(rev)}, nil
}

// Enrolment is the enrolled key of c; ErrNotFound before the first enrolment.
func (s *Store) Enrolment(ctx context.Context, c federation.ClusterID) (*federationv1.Enrolment, error) {
	sn, err := s.read(ctx, enrolmentKey(c))
	if err != nil {
		return nil, err
	}
	st, err := sn.state(enrolmentKey(c))
	if err == nil && st == nil {
		err = fmt.Errorf("enrolled key of cluster %q: %w", c, ErrNotFound)
	}
	return st.GetEnrolment(), err
}

// Member reads one registration, or the tombstone of a deregistered cluster.
func (s *Store) Member(ctx context.Context, c federation.ClusterID) (*federationv1.Member, error) {
	sn, err := s.read(ctx, clusterKey(c))
	if err != nil {
		return nil, err
	}
	return sn.member(c)
}

// UpdateMember changes a registration: grants, gateways, region and the like.
// edit gets a copy, possibly several times, and must change neither name,
// generation nor state. Nothing is written where it changes nothing, so a call
// after ErrUnknown is safe.
func (s *Store) UpdateMember(ctx context.Context, c federation.ClusterID, edit func(*federationv1.Member) error) (*federationv1.Member, federation.Revision, error) {
	var m *federationv1.Member
	var out federation.Revision
	err := retry(ctx, "update member", func() error {
		sn, err := s.read(ctx, clusterKey(c))
		if err != nil {
			return err
		}
		old, err := sn.member(c)
		if err != nil {
			return err
		}
		if old.GetState() == federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
			return fmt.Errorf("cluster %q is deregistered: %w", c, ErrNotFound)
		}
		m = proto.CloneOf(old)
		if err := edit(m); err != nil {
			return err
		}
		if m.GetCluster() != old.GetCluster() || m.GetGeneration() != old.GetGeneration() || m.GetState() != old.GetState() {
			return fmt.Errorf("cluster %q: name, generation and state are not edited: %w", c, ErrForbidden)
		}
		out = sn.catalog()
		if proto.Equal(m, old) {
			return nil
		}
		t := s.begin("update_member", sn)
		t.require(sn.compare(clusterKey(c))...)
		t.putRecord(memberRecord(m))
		rev, err := s.commit(ctx, t)
		out = sn.at(rev)
		return err
	})
	if err != nil {
		return nil, federation.Revision{}, err
	}
	return m, out, nil
}

// AdoptMember notes a cluster that holds a valid SVID and has no record, which
// only a restore explains: it becomes pending, with its generation. An existing
// record, tombstones included, is left alone.
func (s *Store) AdoptMember(ctx context.Context, m *federationv1.Member) (*federationv1.Member, error) {
	c := federation.ClusterID(m.GetCluster())
	m = proto.CloneOf(m)
	m.State = federationv1.MemberState_MEMBER_STATE_PENDING
	out := m
	err := retry(ctx, "adopt member", func() error {
		sn, err := s.read(ctx, clusterKey(c))
		if err != nil {
			return err
		}
		if sn.entries[clusterKey(c)].exists() {
			out, err = sn.member(c)
			return err
		}
		out = m
		t := s.begin("adopt_member", sn)
		t.require(sn.compare(clusterKey(c))...)
		t.putRecord(memberRecord(m))
		_, err = s.commit(ctx, t)
		return err
	})
	return out, err
}
