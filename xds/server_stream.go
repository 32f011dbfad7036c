package xds

import (
	"context"
	"strconv"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
)

// stream is one proxy's ADS or SDS stream. What is below the line is guarded by
// the view's mutex.
type stream struct {
	server   *Server
	view     *view
	protocol protocol
	whole    bool
	only     *Type // nil: all types
	since    time.Time
	peer     string
	woken    chan struct{}

	node, agent string
	nonces      uint64
	subs        [typeCount]sub
	clusters    map[string]struct{} // sent before endpoints were asked for
	applied     federation.Revision
}

func newStream(ctx context.Context, s *Server, v *view, p protocol, only *Type) *stream {
	st := &stream{
		server: s, view: v, protocol: p, whole: p.whole(), only: only,
		since: s.cfg.Clock.Now(), woken: make(chan struct{}, 1),
	}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		st.peer = p.Addr.String()
	}
	return st
}

// wake makes the stream look for what it has not sent; it never waits.
func (s *stream) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

func (s *stream) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.view.mu.Lock()
	s.view.streams[s] = struct{}{}
	s.view.mu.Unlock()
	defer func() {
		s.view.mu.Lock()
		delete(s.view.streams, s)
		s.view.mu.Unlock()
	}()

	requests := make(chan *request)
	failed := make(chan error, 1)
	go func() {
		for {
			r, err := s.protocol.recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case r := <-requests:
			if err := s.handle(ctx, r); err != nil {
				return err
			}
		case <-s.woken:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := s.pump(); err != nil {
			return err
		}
	}
}

// pump sends all that may be sent now.
func (s *stream) pump() error {
	for {
		s.view.mu.Lock()
		if s.view.dropped {
			s.view.mu.Unlock()
			return status.Error(codes.Unavailable, "this proxy's configuration was taken away; connect again")
		}
		var b *batch
		if s.view.ready {
			b = s.next()
		}
		s.view.mu.Unlock()
		if b == nil {
			return nil
		}
		if err := s.protocol.send(b); err != nil {
			return err
		}
	}
}

func (s *stream) nonceOf() string { return strconv.FormatUint(s.nonces, 36) }

// handle takes one request: an answer to a response, a change of names, or both.
func (s *stream) handle(ctx context.Context, r *request) error {
	t, ok := typeOf(r.url)
	if !ok || s.only != nil && t != *s.only {
		s.server.cfg.Logger.WarnContext(ctx, "xds request for a type that is not served", "view", s.view.key, "type", r.url)
		return nil
	}
	s.view.mu.Lock()
	s.introduce(r.node)
	var acked []string
	var nack *Nack
	u := &s.subs[t]
	if u.flight != nil && r.nonce == u.nonce {
		if r.refused {
			nack = s.refused(t, u, r.cause)
		} else {
			acked = u.accept()
		}
	}
	switch {
	case !s.whole:
		s.subscribe(t, u, r)
	case r.nonce == u.nonce || !u.active:
		s.resubscribe(t, u, r)
	}
	node, applied := s.node, s.appliedNow()
	s.view.mu.Unlock()

	if acked != nil {
		s.server.cfg.OnAck(Ack{View: s.view.key, Node: node, Type: t, Names: acked, Applied: applied})
	}
	if nack != nil {
		s.server.cfg.Logger.WarnContext(ctx, "proxy refused a resource; its last good version stays in use",
			"view", s.view.key, "node", node, "resource", nack.Name.String(), "cause", nack.Cause)
		s.server.cfg.OnNack(*nack)
	}
	return nil
}

func (s *stream) introduce(n *corev3.Node) {
	if n == nil {
		return
	}
	s.node = n.GetId()
	s.agent = n.GetUserAgentName()
	switch v := n.GetUserAgentVersionType().(type) {
	case *corev3.Node_UserAgentVersion:
		s.agent += " " + v.UserAgentVersion
	case *corev3.Node_UserAgentBuildVersion:
		sem := v.UserAgentBuildVersion.GetVersion()
		s.agent += " " + strconv.Itoa(int(sem.GetMajorNumber())) + "." + strconv.Itoa(int(sem.GetMinorNumber())) + "." + strconv.Itoa(int(sem.GetPatch()))
	}
}

func (s *stream) refused(t Type, u *sub, cause string) *Nack {
	floor := u.flight.floor
	name, ok := u.refuse(cause, s.whole && t.all())
	if !ok {
		return nil
	}
	r := Rejection{Name: Name{t, name}, Cause: cause, Since: s.server.cfg.Clock.Now()}
	if rec := s.view.records[t].live(name); rec != nil {
		r.Version = rec.wire.GetVersion()
	}
	if u.rejected == nil {
		u.rejected = make(map[string]refusal)
	}
	u.rejected[name] = refusal{r, floor}
	return &Nack{View: s.view.key, Node: s.node, Rejection: r}
}

// subscribe is a delta request's change of names. The first of a type may say
// what the proxy still has from an earlier stream.
func (s *stream) subscribe(t Type, u *sub, r *request) {
	if !u.active {
		u.active, u.fresh = true, true
		u.known = r.known
		u.names = make(map[string]struct{}, len(r.add))
		u.wildcard = t.all() && len(r.add) == 0
		u.owed = u.wildcard
	}
	for _, n := range r.add {
		s.want(t, u, n)
	}
	for _, n := range r.take {
		if n == "*" {
			u.wildcard = false
		}
		delete(u.names, n)
		delete(u.pending, n)
	}
}

// want adds a name to what the stream gets; "*" is every name. It is sent even
// if it was sent before: whoever subscribes waits for an answer.
func (s *stream) want(t Type, u *sub, name string) {
	if name == "*" && t.all() {
		u.wildcard, u.owed, u.sent = true, true, 0
		return
	}
	if rec := s.view.records[t].byName[name]; rec != nil {
		name = rec.name // the request's memory need not live as long as the stream
	}
	u.names[name] = struct{}{}
	if !u.fresh {
		u.pend(name, false)
	}
}

// resubscribe is a request without deltas: it lists all names. None at first
// means every name.
func (s *stream) resubscribe(t Type, u *sub, r *request) {
	if !u.active {
		u.active, u.fresh = true, true
		u.wildcard = t.all() && len(r.add) == 0
		u.owed = t.all()
	} else if u.wildcard && len(r.add) == 0 {
		return
	}
	old := u.names
	u.names = make(map[string]struct{}, len(r.add))
	for _, n := range r.add {
		if n == "*" && t.all() {
			u.wildcard = true
		}
		u.names[n] = struct{}{}
		if _, ok := old[n]; ok {
			continue
		}
		if t.all() {
			u.owed = true
		} else if !u.fresh && s.view.records[t].live(n) != nil {
			u.pend(n, false)
		}
	}
}

// appliedNow is the newest revision that is in use as a whole.
func (s *stream) appliedNow() federation.Revision {
	if s.inSync() {
		s.applied = s.view.revision
	} else if rev, ok := s.view.revisionAt(s.done()); ok {
		s.applied = rev
	}
	return s.applied
}

func (s *stream) inSync() bool { return s.view.ready && s.started() && s.done() >= s.view.head }

// started: a proxy that has not asked for anything has applied nothing.
func (s *stream) started() bool {
	for t := range s.subs {
		if s.subs[t].active {
			return true
		}
	}
	return false
}

// done is the change up to which everything is in use.
func (s *stream) done() uint64 {
	done := s.view.head
	for t := range Type(typeCount) {
		done = min(done, s.addDone(t), s.goneDone(t))
		for _, r := range s.subs[t].rejected {
			done = min(done, r.floor)
		}
	}
	return done
}

func (s *stream) status() StreamStatus {
	st := StreamStatus{
		View: s.view.key, Node: s.node, Agent: s.agent, Peer: s.peer, Protocol: "delta", Since: s.since,
		Applied: s.appliedNow(), InSync: s.inSync(),
	}
	if s.whole {
		st.Protocol = "whole"
	}
	for t := range s.subs {
		for _, r := range s.subs[t].rejected {
			st.Rejected = append(st.Rejected, r.Rejection)
		}
	}
	return st
}
