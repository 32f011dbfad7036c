package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/weftmesh/weft/federation/clock"
)

const (
	// watchQuiet is after how long without a word from etcd the watch asks how
	// far it is; watchDead after how long it is taken for broken. Times of the
	// machine.
	watchQuiet = progressEvery
	watchDead  = 15 * time.Second
)

// Why a watch ended.
var (
	errCompacted = errors.New("what comes next in the watch was compacted away")
	errRestored  = errors.New("etcd is not the one, or not in the state, that it was")
	errLost      = errors.New("the watch was lost")
)

// run lists, watches, and lists again where only that helps, until ctx ends.
func (v *view) run(ctx context.Context) {
	s, machine := v.store, clock.Real()
	reason, pause := "start", time.Duration(0)
	for {
		if pause > 0 && clock.Sleep(ctx, machine, pause/2+rand.N(pause)) != nil {
			return
		}
		if reason != "" {
			if err := v.relist(ctx, reason); err != nil {
				if ctx.Err() != nil {
					return
				}
				s.log.WarnContext(ctx, "cannot list the store; trying again", "error", err)
				pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
				continue
			}
		}
		began := machine.Now()
		err := v.follows(ctx)
		if ctx.Err() != nil {
			return
		}
		pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
		if clock.Since(machine, began) > 10*time.Second {
			pause = 0
		}
		switch {
		case errors.Is(err, errCompacted):
			reason, pause = "compacted", 0
		case errors.Is(err, errRestored):
			reason, pause = "restored", 0
		default:
			reason = "" // nothing is missed: the watch goes on where it stopped
		}
		s.log.WarnContext(ctx, "the watch begins again", "relist", reason, "error", err)
	}
}

func (v *view) relist(ctx context.Context, reason string) error {
	s := v.store
	if reason == "restored" {
		if err := v.adopt(ctx); err != nil {
			return err
		}
	}
	found, where, err := s.listAll(ctx, 0)
	if err != nil {
		return err
	}
	s.metrics.relists.WithLabelValues(reason).Inc()
	v.replace(found, where)
	return nil
}

// adopt begins a new incarnation where nobody has yet, after a restore.
func (v *view) adopt(ctx context.Context) error {
	s := v.store
	if err := s.adopt(ctx); err != nil {
		return err
	}
	revision, cluster, incarnation := v.at()
	sn, now, err := s.readOnce(ctx, nil)
	if err != nil {
		return err
	}
	if now == cluster && sn.revision < revision {
		return s.wentBack(ctx, incarnation)
	}
	return nil
}

// follows watches from the view's revision on, and says why it stopped.
func (v *view) follows(ctx context.Context) error {
	s := v.store
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	from, _, _ := v.at()
	responses := s.client.Watch(ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(from+1),
		clientv3.WithProgressNotify(), clientv3.WithFragment(), clientv3.WithCreatedNotify())
	verify := s.clock.NewTimer(s.jitter(s.cfg.VerifyEvery))
	defer verify.Stop()
	machine := clock.Real()
	quiet := machine.NewTimer(time.Second)
	defer quiet.Stop()
	heard, asked := machine.Now(), machine.Now()
	for {
		select {
		case resp, ok := <-responses:
			if !ok {
				return errLost
			}
			heard = machine.Now()
			if err := v.take(ctx, resp); err != nil {
				return err
			}
		case <-quiet.C():
			quiet.Reset(time.Second)
			switch silent := clock.Since(machine, heard); {
			case silent > watchDead:
				return errLost
			case silent >= watchQuiet && clock.Since(machine, asked) >= watchQuiet:
				asked = machine.Now()
				if err := v.ask(ctx); err != nil {
					return err
				}
			}
		case <-verify.C():
			if err := v.verify(ctx); err != nil {
				return err
			}
			heard = machine.Now()
			verify.Reset(s.jitter(s.cfg.VerifyEvery))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask makes a silent watch speak. A watch that resumed at a revision which a
// restored etcd has not reached stays silent for good reason, and would miss
// everything: so it looks at etcd's revision itself as well.
func (v *view) ask(ctx context.Context) error {
	// Bounded, for it waits for a stream.
	asking, done := context.WithTimeout(ctx, time.Second)
	defer done()
	if err := v.store.client.RequestProgress(asking); err != nil {
		v.store.log.DebugContext(ctx, "asking the watch for its progress", "error", err)
	}
	revision, cluster, _ := v.at()
	sn, now, err := v.store.readOnce(ctx, nil)
	if err == nil && (now != cluster || sn.revision < revision) {
		return errRestored
	}
	return nil // an etcd that is away is waited for until watchDead
}

// jitter is d, give or take a tenth.
func (s *Store) jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// take brings one response into the view.
func (v *view) take(ctx context.Context, resp clientv3.WatchResponse) error {
	// etcd sets CompactRevision even where it does not call the watch canceled.
	if resp.CompactRevision != 0 {
		return errCompacted
	}
	if err := resp.Err(); err != nil {
		if errors.Is(err, rpctypes.ErrCompacted) {
			return errCompacted
		}
		return errors.Join(errLost, err)
	}
	if err := v.sameEtcd(ctx, resp); err != nil {
		return err
	}
	// One response holds whole revisions: etcd does not split one, and the client
	// joins fragments.
	for i := 0; i < len(resp.Events); {
		revision := resp.Events[i].Kv.ModRevision
		puts, deletes := make(map[string]entry), []string(nil)
		for ; i < len(resp.Events) && resp.Events[i].Kv.ModRevision == revision; i++ {
			kv := resp.Events[i].Kv
			key := string(kv.Key[len(v.store.prefix):])
			switch {
			case dirOf(key) == dirIssued:
			case resp.Events[i].Type == clientv3.EventTypeDelete:
				deletes = append(deletes, key)
			default:
				puts[key] = entryOf(kv)
			}
		}
		v.apply(revision, puts, deletes)
	}
	if resp.IsProgressNotify() {
		v.advance(resp.Header.Revision)
	}
	return nil
}

// sameEtcd tells a restored etcd from a member that is only behind: the first
// answers linearizably with another cluster id, or a lower revision than has
// been seen.
func (v *view) sameEtcd(ctx context.Context, resp clientv3.WatchResponse) error {
	revision, cluster, _ := v.at()
	if resp.Header.ClusterId == cluster && resp.Header.Revision >= revision {
		return nil
	}
	sn, now, err := v.store.readOnce(ctx, nil)
	if err != nil {
		return errors.Join(errLost, err)
	}
	if now != cluster || sn.revision < revision {
		return errRestored
	}
	return nil
}

// verify compares the view with a list of its own revision, and mends it. A
// difference is a bug of ours or of etcd's; consumers are told what was missed.
func (v *view) verify(ctx context.Context) error {
	s := v.store
	at, _, _ := v.at()
	found, where, err := s.listAll(ctx, at)
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return nil // the watch is about to hear of it, or past it already
	case errors.Is(err, rpctypes.ErrFutureRev):
		return errRestored
	case err != nil:
		return errors.Join(errLost, err)
	}
	if n := v.differences(found); n > 0 {
		s.metrics.repairs.Add(float64(n))
		s.log.ErrorContext(ctx, "the watched view was wrong and was mended", "keys", n, "revision", at)
		v.replace(found, where)
	}
	return nil
}
