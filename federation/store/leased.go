package store

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// leased keeps this process's presence in etcd: its controller's record and the
// clusters whose agents it serves, all under one lease. It states what is
// wanted and brings etcd there, again whenever the lease was lost.
type leased struct {
	store *Store
	kick  chan struct{}

	mu   sync.Mutex
	want map[string]*federationv1.State
}

func newLeased(s *Store) *leased {
	return &leased{store: s, kick: make(chan struct{}, 1), want: make(map[string]*federationv1.State)}
}

// SetController shows this controller to the others until the store closes, or
// for Config.PresenceTTL after a crash. It returns at once; failures are tried
// again.
func (s *Store) SetController(c *federationv1.ControllerState) {
	s.leased.set(controllerKey(c.GetName()), &federationv1.State{
		Body: &federationv1.State_Controller{Controller: proto.CloneOf(c)},
	})
}

// SetPresence shows that a cluster's agent is connected to this process;
// ClearPresence ends that. Both return at once. Where the agent has moved to
// another controller meanwhile, clearing leaves that one's record alone.
func (s *Store) SetPresence(p *federationv1.Presence) {
	s.leased.set(presenceKey(federation.ClusterID(p.GetCluster())), &federationv1.State{
		Body: &federationv1.State_Presence{Presence: proto.CloneOf(p)},
	})
}

// ClearPresence undoes SetPresence.
func (s *Store) ClearPresence(c federation.ClusterID) { s.leased.set(presenceKey(c), nil) }

func (l *leased) set(key string, st *federationv1.State) {
	l.mu.Lock()
	if st == nil {
		delete(l.want, key)
	} else {
		l.want[key] = st
	}
	l.mu.Unlock()
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

func (l *leased) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := l.hold(ctx); err != nil && ctx.Err() == nil {
			l.store.log.WarnContext(ctx, "presence is not shown; trying again", "error", err)
			if clock.Sleep(ctx, clock.Real(), time.Second+rand.N(time.Second)) != nil {
				return
			}
		}
	}
}

// hold keeps one lease, once there is something to show, and everything wanted
// under it, until the lease is lost or ctx ends.
func (l *leased) hold(ctx context.Context) error {
	for l.idle() {
		select {
		case <-l.kick:
		case <-ctx.Done():
			return nil
		}
	}
	s := l.store
	grant, err := s.grantLease(ctx, s.cfg.PresenceTTL)
	if err != nil {
		return err
	}
	session, err := concurrency.NewSession(s.client, concurrency.WithLease(grant), concurrency.WithContext(ctx))
	if err != nil {
		s.revoke(grant)
		return s.explain("presence", err)
	}
	defer func() {
		session.Orphan()
		s.revoke(grant)
	}()
	shown := make(map[string]shownState)
	for {
		if err := l.show(ctx, grant, shown); err != nil {
			return err
		}
		select {
		case <-l.kick:
		case <-session.Done():
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (l *leased) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.want) == 0
}

type shownState struct {
	state    *federationv1.State
	modified int64
}

// show puts what is wanted and not shown, and deletes what is shown and not
// wanted, where it is still ours.
func (l *leased) show(ctx context.Context, lease clientv3.LeaseID, shown map[string]shownState) error {
	l.mu.Lock()
	want := maps.Clone(l.want)
	l.mu.Unlock()
	s := l.store
	for key, st := range want {
		if shown[key].state == st {
			continue
		}
		st := proto.CloneOf(st)
		st.Writer, st.Operation = s.writer, s.operations.Add(1)
		v, err := encodeState(key, st)
		if err != nil {
			return err
		}
		resp, err := s.send(ctx, nil, []clientv3.Op{clientv3.OpPut(s.prefix+key, string(v), clientv3.WithLease(lease))})
		if err != nil {
			return s.explain("presence", err)
		}
		shown[key] = shownState{state: want[key], modified: resp.Header.Revision}
	}
	for key, was := range shown {
		if _, ok := want[key]; ok {
			continue
		}
		own := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.prefix+key), "=", was.modified)}
		if _, err := s.send(ctx, own, []clientv3.Op{clientv3.OpDelete(s.prefix + key)}); err != nil {
			return s.explain("presence", err)
		}
		delete(shown, key)
	}
	return nil
}

// Controllers are the running controllers, by name, as the watch sees them.
func (s *Store) Controllers() []*federationv1.ControllerState {
	var out []*federationv1.ControllerState
	for _, st := range s.view.states(dirController) {
		out = append(out, st.GetController())
	}
	slices.SortFunc(out, func(a, b *federationv1.ControllerState) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// Presences are the connected agents by cluster, as the watch sees them.
func (s *Store) Presences() map[federation.ClusterID]*federationv1.Presence {
	out := make(map[federation.ClusterID]*federationv1.Presence)
	for key, st := range s.view.states(dirPresence) {
		out[federation.ClusterID(strings.TrimPrefix(key, dirPresence))] = st.GetPresence()
	}
	return out
}

// Reports says by cluster how far its report got, as the watch sees it.
func (s *Store) Reports() map[federation.ClusterID]*federationv1.ReportState {
	out := make(map[federation.ClusterID]*federationv1.ReportState)
	for key, st := range s.view.states(dirReport) {
		out[federation.ClusterID(strings.TrimPrefix(key, dirReport))] = st.GetReport()
	}
	return out
}

// Sessions are the newest sessions by cluster, as the watch sees them.
func (s *Store) Sessions() map[federation.ClusterID]*federationv1.SessionState {
	out := make(map[federation.ClusterID]*federationv1.SessionState)
	for key, st := range s.view.states(dirSession) {
		out[federation.ClusterID(strings.TrimPrefix(key, dirSession))] = st.GetSession()
	}
	return out
}
