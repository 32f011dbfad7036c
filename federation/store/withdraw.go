package store

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Deregistered is what Deregister did.
type Deregistered struct {
	Revision federation.Revision // of the tombstone: from it on nothing of the cluster is in use
	Removed  int                 // exports that were withdrawn by this call
}

// Deregister ends a cluster: one transaction makes its record a tombstone,
// denies its identities and ends its session, and with it every use of what it
// offers. Then its exports, readiness, policies, findings and addresses are
// deleted, at most 120 keys at a time. A crash in between leaves keys of a
// tombstone that nobody uses; SweepDeregistered, which every new leader calls,
// or another call, deletes them. Deregistering a tombstone only sweeps.
func (s *Store) Deregister(ctx context.Context, c federation.ClusterID, reason string) (Deregistered, error) {
	var out Deregistered
	err := retry(ctx, "deregister", func() error {
		rev, err := s.deny(ctx, "deregister", c, reason, federationv1.MemberState_MEMBER_STATE_DEREGISTERED)
		out.Revision = rev
		return err
	})
	if err != nil {
		return Deregistered{}, err
	}
	out.Removed, err = s.sweep(ctx, c)
	return out, err
}

// Quarantine denies a cluster's identities and ends its session. Its exports
// stay, unused. It is lifted by a new enrolment, after Config.ReuseAfter.
// Quarantining a quarantined cluster changes nothing.
func (s *Store) Quarantine(ctx context.Context, c federation.ClusterID, reason string) (federation.Revision, error) {
	var out federation.Revision
	err := retry(ctx, "quarantine", func() error {
		rev, err := s.deny(ctx, "quarantine", c, reason, federationv1.MemberState_MEMBER_STATE_QUARANTINED)
		out = rev
		return err
	})
	return out, err
}

// deny moves c into a state without a session and with a denial.
func (s *Store) deny(ctx context.Context, name string, c federation.ClusterID, reason string, state federationv1.MemberState) (federation.Revision, error) {
	sn, err := s.read(ctx, clusterKey(c))
	if err != nil {
		return federation.Revision{}, err
	}
	m, err := sn.member(c)
	if err != nil {
		return federation.Revision{}, err
	}
	deregistered := federationv1.MemberState_MEMBER_STATE_DEREGISTERED
	switch {
	case m.GetState() == state:
		return sn.catalog(), nil
	case m.GetState() == deregistered:
		return federation.Revision{}, fmt.Errorf("cluster %q is deregistered: %w", c, ErrNotFound)
	}
	m.State = state
	t := s.begin(name, sn)
	t.require(sn.compare(clusterKey(c))...)
	t.putRecord(memberRecord(m))
	t.putRecord(denialRecord(&federationv1.Denial{
		Cluster: string(c), Generation: m.GetGeneration(), Reason: reason, IssuedBefore: timestamppb.New(s.clock.Now()),
	}))
	t.delete(sessionKey(c), reportKey(c), enrolmentKey(c), presenceKey(c), livenessKey(c))
	if state == deregistered {
		t.delete(drainKey(c))
	}
	rev, err := s.commit(ctx, t)
	return sn.at(rev), err
}

func denialRecord(d *federationv1.Denial) *federationv1.Record {
	return &federationv1.Record{
		Key:  denyKey(federation.ClusterID(d.GetCluster()), d.GetGeneration()),
		Body: &federationv1.Record_Denial{Denial: d},
	}
}

// Deny stores denials that agents know and the store has lost by a restore. A
// denial that is there already keeps the later of the two times.
func (s *Store) Deny(ctx context.Context, denials ...*federationv1.Denial) (federation.Revision, error) {
	var out federation.Revision
	for len(denials) > 0 {
		part := denials[:min(len(denials), maxOps)]
		denials = denials[len(part):]
		err := retry(ctx, "deny", func() error {
			keys := make([]string, 0, len(part))
			byKey := make(map[string]*federationv1.Denial, len(part))
			for _, d := range part {
				k := denialRecord(d).GetKey()
				if have, ok := byKey[k]; !ok {
					keys = append(keys, k)
				} else if !have.GetIssuedBefore().AsTime().Before(d.GetIssuedBefore().AsTime()) {
					continue
				}
				byKey[k] = d
			}
			sn, err := s.read(ctx, keys...)
			if err != nil {
				return err
			}
			out = sn.catalog()
			t := s.begin("deny", sn)
			for _, k := range keys {
				have, err := sn.record(k)
				if err != nil {
					return err
				}
				if have != nil && !have.GetDenial().GetIssuedBefore().AsTime().Before(byKey[k].GetIssuedBefore().AsTime()) {
					continue
				}
				t.require(sn.compare(k)...)
				t.putRecord(denialRecord(proto.CloneOf(byKey[k])))
			}
			if len(t.changes) == 0 && t.err == nil {
				return nil
			}
			rev, err := s.commit(ctx, t)
			out = sn.at(rev)
			return err
		})
		if err != nil {
			return federation.Revision{}, err
		}
	}
	return out, nil
}

// SweepDeregistered deletes what deregistered clusters have left behind, and
// returns how many exports that were. Every new leader calls it once.
func (s *Store) SweepDeregistered(ctx context.Context) (int, error) {
	kvs, _, err := s.list(ctx, dirCluster, 0)
	if err != nil {
		return 0, err
	}
	removed := 0
	for key, e := range kvs {
		r, err := decodeRecord(key, e.value, e.created)
		if err != nil || r.GetMember().GetState() != federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
			continue // a bad value is the watch's to report
		}
		n, err := s.sweep(ctx, federation.ClusterID(r.GetMember().GetCluster()))
		removed += n
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// sweep deletes what is left of a deregistered c, and counts its exports. Each
// of its transactions compares the tombstone, so that a new registration of the
// name loses nothing; deleting twice is harmless.
func (s *Store) sweep(ctx context.Context, c federation.ClusterID) (int, error) {
	exports := 0
	for _, dir := range memberDirs(c) {
		for {
			keys, err := s.someKeys(ctx, dir)
			if err != nil || len(keys) == 0 {
				if err != nil {
					return exports, err
				}
				break
			}
			if err := retry(ctx, "sweep", func() error { return s.sweepKeys(ctx, c, keys) }); err != nil {
				return exports, fmt.Errorf("sweep cluster %q: %w", c, err)
			}
			if dir == dirExport+string(c)+"/" {
				exports += len(keys)
			}
		}
	}
	return exports, nil
}

func (s *Store) sweepKeys(ctx context.Context, c federation.ClusterID, keys []string) error {
	sn, err := s.read(ctx, clusterKey(c))
	if err != nil {
		return err
	}
	m, err := sn.member(c)
	if err != nil {
		return err
	}
	if m.GetState() != federationv1.MemberState_MEMBER_STATE_DEREGISTERED {
		return fmt.Errorf("it is registered again: %w", ErrConflict)
	}
	t := s.begin("sweep", sn)
	t.require(sn.compare(clusterKey(c))...)
	t.delete(keys...)
	if !t.catalogChanging() {
		t.putState(s, keyHead, &federationv1.State{}, 0)
	}
	_, err = s.commit(ctx, t)
	return err
}

// someKeys lists up to maxOps keys below dir.
func (s *Store) someKeys(ctx context.Context, dir string) (_ []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	defer s.metrics.request("list", s.clock.Now(), &err)
	resp, err := s.client.Get(ctx, s.prefix+dir, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(maxOps))
	if err != nil {
		return nil, s.explain("list "+dir, err)
	}
	keys := make([]string, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		keys[i] = string(kv.Key[len(s.prefix):])
	}
	return keys, nil
}
