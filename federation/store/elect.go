package store

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// Term is one stay in office. Its writes compare the election's key, so that
// they fail with ErrNotLeader from the moment at which another process can
// lead, whatever this one believes.
type Term struct {
	store   *Store
	key     string // below the store's prefix
	created int64
}

// Elect campaigns in the election name, and runs lead while this process is the
// leader; candidate is what others see as the leader's name. lead's context
// ends when the term does: when the lease is lost, or ctx ends. When lead
// returns earlier, it resigns. Elect campaigns again after each term, and
// returns only when ctx has ended, or the store was closed, and lead has
// returned.
func (s *Store) Elect(ctx context.Context, name, candidate string, lead func(context.Context, *Term) error) error {
	if !checkPart(name) || !checkPart(candidate) {
		return fmt.Errorf("election %q: it and the candidate need names: %w", name, ErrForbidden)
	}
	log := s.log.With("election", name)
	gauge := s.metrics.leader.WithLabelValues(name)
	gauge.Set(0)
	for {
		err := s.term(ctx, name, candidate, func(ctx context.Context, t *Term) error {
			gauge.Set(1)
			defer gauge.Set(0)
			log.InfoContext(ctx, "leads", "term", t.created)
			return lead(ctx, t)
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		select {
		case <-s.closed:
			return ErrClosed
		default:
		}
		log.WarnContext(ctx, "leads no more", "error", err)
		pause := 500*time.Millisecond + rand.N(500*time.Millisecond)
		if err := clock.Sleep(ctx, clock.Real(), pause); err != nil {
			return err
		}
	}
}

// term is one campaign, and one stay in office where it succeeds.
func (s *Store) term(ctx context.Context, name, candidate string, lead func(context.Context, *Term) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	grant, err := s.grantLease(ctx, s.cfg.ElectionTTL)
	if err != nil {
		return err
	}
	session, err := concurrency.NewSession(s.client, concurrency.WithLease(grant), concurrency.WithContext(ctx))
	if err != nil {
		s.revoke(grant)
		return s.explain("election", err)
	}
	defer func() {
		session.Orphan()
		s.revoke(grant) // the next leader need not wait for the lease to expire
	}()
	go func() {
		select {
		case <-session.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	election := concurrency.NewElection(session, s.prefix+dirElection+name)
	// Without a leader in etcd a campaign would wait on a member that is cut off.
	if err := election.Campaign(clientv3.WithRequireLeader(ctx), candidate); err != nil {
		return s.explain("election", err)
	}
	t := &Term{store: s, key: election.Key()[len(s.prefix):], created: election.Rev()}
	// A campaign that waited long enough may have outlived its own key.
	if err := t.Confirm(ctx); err != nil {
		return err
	}
	err = lead(ctx, t)
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

func (s *Store) grantLease(ctx context.Context, ttl time.Duration) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	resp, err := s.client.Grant(ctx, max(1, int64(ttl/time.Second)))
	if err != nil {
		return 0, s.explain("lease", err)
	}
	return resp.ID, nil
}

// Confirm asks etcd whether the term is still on: ErrNotLeader if not. It says
// nothing of the next moment; only a write's own compare does.
func (t *Term) Confirm(ctx context.Context) error {
	sn, err := t.store.read(ctx, t.keys()...)
	if err != nil {
		return err
	}
	return t.check(sn)
}

// Swap makes all of the swaps in one transaction, or none of them: liveness,
// drain, clusterset addresses (vip) and the bundle. ErrNotLeader where the term
// is over, ErrConflict where a stored record is neither Old nor New, ErrExists
// where an address is another service's.
func (t *Term) Swap(ctx context.Context, swaps ...Swap) (federation.Revision, error) {
	for _, w := range swaps {
		switch dirOf(w.Key) {
		case dirLiveness, dirDrain, dirVip, keyBundle:
		default:
			return federation.Revision{}, fmt.Errorf("key %q is not the leader's to write: %w", w.Key, ErrForbidden)
		}
	}
	return t.store.swap(ctx, "term_swap", t, swaps)
}

// PutAuthorities changes authorities, and the bundle with them where bundle is
// given, in one transaction.
func (t *Term) PutAuthorities(ctx context.Context, bundle *Swap, writes ...AuthorityWrite) (federation.Revision, error) {
	var swaps []Swap
	if bundle != nil {
		if bundle.Key != keyBundle {
			return federation.Revision{}, fmt.Errorf("key %q is not the bundle: %w", bundle.Key, ErrForbidden)
		}
		swaps = append(swaps, *bundle)
	}
	return t.store.putAuthorities(ctx, "put_authorities", t, swaps, writes)
}

// The nil term is nobody's: it reads and requires nothing.

func (t *Term) keys() []string {
	if t == nil {
		return nil
	}
	return []string{t.key}
}

func (t *Term) guards() []guard {
	if t == nil {
		return nil
	}
	return []guard{{key: t.key, created: t.created}}
}

func (t *Term) check(sn *snapshot) error {
	if t == nil || sn.entries[t.key].created == t.created {
		return nil
	}
	return fmt.Errorf("term %d of %s: %w", t.created, t.key, ErrNotLeader)
}

// Leader is the candidate that leads the election now, or empty.
func (s *Store) Leader(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, s.prefix+dirElection+name+"/", clientv3.WithFirstCreate()...)
	if err != nil {
		return "", s.explain("leader", err)
	}
	if len(resp.Kvs) == 0 {
		return "", nil
	}
	return string(resp.Kvs[0].Value), nil
}
