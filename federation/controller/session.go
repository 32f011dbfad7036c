package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

const (
	helloTimeout    = 10 * time.Second // for an agent's first message
	progressEvery   = time.Second      // to streams that no change concerns
	presenceEvery   = time.Second      // at most, where a status changed
	presenceRefresh = 15 * time.Second // at least, where only its measurements did
	repliesWaiting  = 16               // to an agent that does not read; then its reports wait
	messagesWaiting = 4
	reportAttempts  = 5 // against a registration that keeps changing
	// Reports that one cluster may have written: a flood of them is slowed down,
	// so that it takes no more than its part of etcd.
	reportsPerSecond = 100
	reportsBurst     = 500
)

// syncServer serves agents' streams.
type syncServer struct {
	federationv1.UnimplementedSyncServer
	c *Controller
}

// session is one agent's stream.
type session struct {
	c       *Controller
	log     *slog.Logger
	cluster federation.ClusterID
	caller  caller
	stream  federationv1.Sync_SyncServer
	stored  *store.Session
	feed    *stream
	out     chan any // messages to the agent, in order; the sender's
	taken   chan struct{}
	since   time.Time
	heard   time.Time // when the agent's last message came; run's own
	version string
	name    string // of the agent's process

	// The report in progress: run's own.
	judge  *judge
	damper *damper
	set    *fullSet // between the begin and the end of a full set
	pace   *rate.Limiter

	mu       sync.Mutex
	asked    map[uint64]chan *federationv1.Answer
	lastID   uint64
	shown    *federationv1.Status // as presence shows it
	shownAt  time.Time
	unshown  *federationv1.Status
	takeOnce sync.Once
}

// fullSet is a full report on its way in, as the agent sent it.
type fullSet struct{ records []*federationv1.Record }

// Sync is one agent's stream from its Hello to its end.
func (s *syncServer) Sync(stream federationv1.Sync_SyncServer) error {
	c := s.c
	who := callerOf(stream.Context())
	in := make(chan *federationv1.SyncRequest, messagesWaiting)
	// The context that readers and writers of this stream end with: it ends when
	// the handler returns, which is what makes a blocked Send or Recv return.
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	received := make(chan error, 1)
	c.streams.Go(func() { received <- receive(ctx, stream, in) })

	hello, err := firstHello(ctx, c, in, received)
	if err != nil {
		return err
	}
	a, first, err := c.openSession(ctx, stream, who, hello)
	if err != nil {
		return err
	}
	defer a.close()
	sent := make(chan error, 1)
	c.streams.Go(func() { sent <- a.send(ctx, first) })
	return a.run(ctx, in, received, sent)
}

func receive(ctx context.Context, stream federationv1.Sync_SyncServer, in chan<- *federationv1.SyncRequest) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case in <- m:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func firstHello(ctx context.Context, c *Controller, in <-chan *federationv1.SyncRequest, received <-chan error) (*federationv1.Hello, error) {
	patience := c.cfg.Clock.NewTimer(helloTimeout)
	defer patience.Stop()
	select {
	case m := <-in:
		if m.GetHello() == nil {
			return nil, status.Error(codes.InvalidArgument, "the stream must begin with a hello")
		}
		return m.GetHello(), nil
	case err := <-received:
		return nil, err
	case <-patience.C():
		return nil, status.Errorf(codes.DeadlineExceeded, "no hello within %v", helloTimeout)
	case <-c.draining:
		return nil, errStopping()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func errStopping() error {
	return status.Error(codes.Unavailable, "this controller is stopping: connect to another one, or again")
}

// openSession takes the cluster's session over and prepares its first messages.
func (c *Controller) openSession(ctx context.Context, stream federationv1.Sync_SyncServer, who caller, hello *federationv1.Hello) (*session, []any, error) {
	have, err := hello.GetDigest().Decode()
	if err != nil {
		return nil, nil, status.Errorf(codes.InvalidArgument, "hello: %v", err)
	}
	if err := c.state.reached(ctx, federation.Revision{}); err != nil {
		return nil, nil, err
	}
	c.hearDenials(ctx, who.cluster(), hello.GetDenials())
	instance := hello.GetInstance()
	if instance == "" {
		instance = "agent"
	}
	if m, err := c.store.Member(ctx, who.cluster()); err == nil {
		if err := c.checkIdentity(ctx, who.who, m); err != nil {
			return nil, nil, err
		}
	} // else OpenSession says what is wrong
	stored, err := c.store.OpenSession(ctx, store.SessionRequest{
		Cluster: who.cluster(), Controller: c.cfg.Name, Instance: instance,
	})
	if err != nil {
		return nil, nil, c.sessionRefused(ctx, who.cluster(), err)
	}
	a := &session{
		c: c, cluster: who.cluster(), caller: who, stream: stream, stored: stored,
		log: c.log.With("cluster", string(who.cluster()), "epoch", stored.Epoch(), "instance", instance),
		out: make(chan any, repliesWaiting), taken: make(chan struct{}),
		since: c.cfg.Clock.Now(), heard: c.cfg.Clock.Now(), version: hello.GetAgentVersion(), name: instance,
		damper: newDamper(), pace: rate.NewLimiter(reportsPerSecond, reportsBurst), asked: map[uint64]chan *federationv1.Answer{},
	}
	if err := a.reload(); err != nil {
		stored.Close()
		return nil, nil, c.storeError(err)
	}
	member := stored.Member()
	reported, err := a.reported()
	if err != nil {
		stored.Close()
		return nil, nil, c.storeError(err)
	}
	feed, differing, first := c.state.views.subscribe(a.cluster, member.GetRegion(), have)
	a.feed = feed
	welcome := &federationv1.Welcome{
		TrustDomain: c.cfg.TrustDomain.Name(), Revision: federationv1.EncodeRevision(first.revision),
		Epoch: stored.Epoch(), Self: member, Differing: differing,
	}
	if first.full {
		// Otherwise the store recovers, and every member has to report.
		welcome.Reported = reported.Encode()
	}
	messages := []any{&federationv1.SyncResponse{Message: &federationv1.SyncResponse_Welcome{Welcome: welcome}}}
	for _, f := range first.frames() {
		messages = append(messages, f)
	}
	c.sessions.add(a)
	a.show(&federationv1.Status{}, c.cfg.Clock.Now())
	a.log.InfoContext(ctx, "session opened", "from", who.addr, "have", hello.GetHave().GetNumber(), "differing", len(differing), "agent", a.version)
	return a, messages, nil
}

// sessionRefused says why a cluster has no session.
func (c *Controller) sessionRefused(ctx context.Context, cluster federation.ClusterID, err error) error {
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrStale) {
		m, merr := c.store.Member(ctx, cluster)
		switch {
		case merr == nil:
			if standing := checkStanding(m); standing != nil {
				return standing
			}
		case errors.Is(merr, store.ErrNotFound):
			// A valid identity that the store does not know: it was restored from
			// a backup that is older than the registration.
			if _, err := c.store.AdoptMember(ctx, &federationv1.Member{Cluster: string(cluster)}); err != nil {
				return c.storeError(err)
			}
			return status.Errorf(codes.FailedPrecondition, "cluster %q has a valid identity and no registration (any more): it is pending until an operator registers it anew; keep what you have", cluster)
		}
	}
	return c.storeError(err)
}

// hearDenials takes denials that an agent knows and a restored store has
// forgotten. At any other time nobody needs them, and a stolen agent could
// deny others by them.
func (c *Controller) hearDenials(ctx context.Context, from federation.ClusterID, denials []*federationv1.Denial) {
	now := c.state.current()
	if now == nil || !now.recovering || len(denials) == 0 {
		return
	}
	var unknown []*federationv1.Denial
	for _, m := range denials {
		d, err := m.Decode()
		if err != nil || d.Cluster == from {
			continue
		}
		if _, ok := c.state.fact(federationv1.DenialKey(d.Cluster, d.Generation)); !ok {
			unknown = append(unknown, m)
		}
	}
	if len(unknown) == 0 {
		return
	}
	if _, err := c.store.Deny(ctx, unknown...); err != nil {
		c.log.ErrorContext(ctx, "denials that an agent remembers are not stored", "from", string(from), "error", err)
		return
	}
	c.log.WarnContext(ctx, "took denials that the restored store had forgotten", "from", string(from), "count", len(unknown))
}

// close ends everything that the session has.
func (a *session) close() {
	a.c.state.views.unsubscribe(a.feed)
	a.c.sessions.remove(a)
	a.stored.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, ch := range a.asked {
		close(ch)
		delete(a.asked, id)
	}
	a.asked = nil
}

// takeOver ends a session in favour of a newer one on this controller.
func (a *session) takeOver() { a.takeOnce.Do(func() { close(a.taken) }) }

// run handles the agent's messages until the session ends, and says why it did.
func (a *session) run(ctx context.Context, in <-chan *federationv1.SyncRequest, received, sent <-chan error) error {
	c := a.c
	damped := c.cfg.Clock.NewTimer(time.Hour)
	defer damped.Stop()
	shown := c.cfg.Clock.NewTimer(presenceEvery)
	defer shown.Stop()
	end := func(err error) error {
		a.log.InfoContext(ctx, "session ended", "reason", err)
		return err
	}
	for {
		denied := c.denials.Changed()
		if err := c.verifier.Recheck(a.caller.state); err != nil {
			return end(status.Errorf(codes.PermissionDenied, "the agent's identity is refused now: %v", err))
		}
		select {
		case m := <-in:
			a.heard = c.cfg.Clock.Now()
			if err := a.handle(ctx, m); err != nil {
				return end(err)
			}
			if due, ok := a.damper.next(); ok {
				damped.Reset(due.Sub(c.cfg.Clock.Now()))
			}
		case <-damped.C():
			if err := a.writeDamped(ctx); err != nil {
				return end(err)
			}
			if due, ok := a.damper.next(); ok {
				damped.Reset(due.Sub(c.cfg.Clock.Now()))
			}
		case <-shown.C():
			a.show(nil, c.cfg.Clock.Now())
			shown.Reset(presenceEvery)
		case <-denied:
		case <-a.taken:
			return end(status.Errorf(codes.Aborted, "another connection of cluster %q has taken this session over", a.cluster))
		case <-a.stored.Done():
			return end(a.whyOver(ctx))
		case <-c.draining:
			return end(errStopping())
		case err := <-received:
			if errors.Is(err, io.EOF) { // the agent says good-bye
				a.heard = c.cfg.Clock.Now()
			}
			return end(err)
		case err := <-sent:
			return end(err)
		case <-ctx.Done():
			return end(ctx.Err())
		}
	}
}

// whyOver says why the store does not take this session's writes any more.
func (a *session) whyOver(ctx context.Context) error {
	m, err := a.c.store.Member(ctx, a.cluster)
	if err == nil {
		err = checkStanding(m)
	}
	if err != nil {
		return a.c.storeError(err)
	}
	return status.Errorf(codes.Aborted, "session %d of cluster %q has been taken over, at another controller or after a new enrolment", a.stored.Epoch(), a.cluster)
}

func (a *session) handle(ctx context.Context, m *federationv1.SyncRequest) error {
	switch m := m.GetMessage().(type) {
	case *federationv1.SyncRequest_Report:
		result, err := a.report(ctx, m.Report)
		if err != nil {
			return a.c.storeError(err)
		}
		return a.reply(ctx, &federationv1.SyncResponse{Message: &federationv1.SyncResponse_ReportResult{ReportResult: result}})
	case *federationv1.SyncRequest_Status:
		a.c.hearDenials(ctx, a.cluster, m.Status.GetDenials())
		a.mu.Lock()
		a.unshown = m.Status
		a.mu.Unlock()
		a.show(nil, a.c.cfg.Clock.Now())
		return nil
	case *federationv1.SyncRequest_Answer:
		a.answered(m.Answer)
		return nil
	default:
		return status.Errorf(codes.InvalidArgument, "a message of type %T is not expected here", m)
	}
}

// reply queues a message to the agent. An agent that does not read makes its
// own reports wait.
func (a *session) reply(ctx context.Context, m any) error {
	select {
	case a.out <- m:
		return nil
	case <-a.taken:
		return status.Error(codes.Aborted, "taken over")
	case <-a.c.draining:
		return errStopping()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// send is the one goroutine that writes to the stream.
func (a *session) send(ctx context.Context, first []any) error {
	for _, m := range first {
		if err := a.stream.SendMsg(m); err != nil {
			return err
		}
	}
	progress := a.c.cfg.Clock.NewTimer(progressEvery)
	defer progress.Stop()
	for {
		select {
		case m := <-a.out:
			if err := a.stream.SendMsg(m); err != nil {
				return err
			}
			continue
		case <-a.feed.wake:
		case <-progress.C():
		case <-ctx.Done():
			return ctx.Err()
		}
		if u, ok := a.c.state.views.next(a.feed); ok {
			for _, f := range u.frames() {
				if err := a.stream.SendMsg(f); err != nil {
					return err
				}
			}
			a.c.metrics.updates.Inc()
		}
		progress.Reset(progressEvery)
	}
}

// show puts a status into the cluster's presence, where every controller sees
// it; nil shows what has come since, if it is time to.
func (a *session) show(s *federationv1.Status, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s == nil {
		since := now.Sub(a.shownAt)
		if a.unshown == nil || since < presenceEvery || since < presenceRefresh && proto.Equal(steady(a.unshown), steady(a.shown)) {
			return
		}
		s = a.unshown
	}
	a.shown, a.shownAt, a.unshown = s, now, nil
	a.c.sessions.show(a, &federationv1.Presence{
		Cluster: string(a.cluster), Controller: a.c.cfg.Name, Instance: a.name,
		Since: timestamppb.New(a.since), Status: s, AgentVersion: a.version,
	})
}

// steady is a status without what is measured anew every time.
func steady(s *federationv1.Status) *federationv1.Status {
	s = proto.CloneOf(s)
	for _, g := range s.GetGateways() {
		for _, p := range g.GetPeers() {
			p.Rtt = nil
		}
	}
	return s
}

// ask puts a question to the agent and waits for its answer.
func (a *session) ask(ctx context.Context, q *federationv1.Question) (*federationv1.Answer, error) {
	ch := make(chan *federationv1.Answer, 1)
	a.mu.Lock()
	if a.asked == nil {
		a.mu.Unlock()
		return nil, errNoAgent
	}
	a.lastID++
	q.Id = a.lastID
	a.asked[q.Id] = ch
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.asked, q.Id)
	}()
	if err := a.reply(ctx, &federationv1.SyncResponse{Message: &federationv1.SyncResponse_Question{Question: q}}); err != nil {
		return nil, err
	}
	select {
	case answer, ok := <-ch:
		if !ok {
			return nil, errNoAgent
		}
		if answer.GetError() != "" {
			return nil, fmt.Errorf("its agent says: %s", clip(answer.GetError()))
		}
		return answer, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (a *session) answered(answer *federationv1.Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ch, ok := a.asked[answer.GetId()]; ok {
		ch <- answer // room for one, and deleted at once: a second answer finds nobody
		delete(a.asked, answer.GetId())
	}
}

// sessions are the ones that this controller holds, one for each cluster.
type sessions struct {
	store *store.Store
	count func(int)

	mu    sync.Mutex
	by    map[federation.ClusterID]*session
	heard map[federation.ClusterID]time.Time // by sessions that ended here
}

// add makes a the cluster's session; an older one of this controller ends.
func (s *sessions) add(a *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.by[a.cluster]; old != nil {
		old.takeOver()
	}
	s.by[a.cluster] = a
	s.count(len(s.by))
}

// remove forgets a, and that its agent is connected here, unless a newer
// session of the same cluster is.
func (s *sessions) remove(a *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[a.cluster] != a {
		return
	}
	delete(s.by, a.cluster)
	s.count(len(s.by))
	s.heard[a.cluster] = a.heard
	s.store.ClearPresence(a.cluster)
}

// lastHeard is when the agent of a session that ended here sent its last
// message: a dead connection is noticed only some seconds later.
func (s *sessions) lastHeard(c federation.ClusterID) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.heard[c]
	return t, ok
}

// show shows a's presence, unless a newer session's is to be shown.
func (s *sessions) show(a *session, p *federationv1.Presence) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[a.cluster] == a {
		s.store.SetPresence(p)
	}
}

// of is the cluster's session here, or nil.
func (s *sessions) of(c federation.ClusterID) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.by[c]
}
