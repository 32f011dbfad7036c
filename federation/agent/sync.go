package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// Times of the Sync stream.
const (
	syncRetryFirst = 200 * time.Millisecond // pause after a session or an attempt that failed,
	syncRetryMost  = 5 * time.Second        // doubled up to this, a random half taken off
	syncWelcome    = 10 * time.Second       // a controller that says nothing for so long is left
	statusEvery    = 5 * time.Second
	statusPause    = time.Second // least time between two Status messages
	// syncMessage bounds one message, in bytes, to both sides.
	syncMessage = 64 << 20
	// answersAtOnce bounds the questions that are worked on at the same time.
	answersAtOnce = 16
)

// link is the agent's way to the controllers: it keeps one Sync session open
// with one of them, and lends its connection to other calls.
type link struct {
	clock       clock.Clock
	log         *slog.Logger
	metrics     *metrics
	dial        func(address string) (*grpc.ClientConn, error)
	controllers func() []string
	version     string
	instance    string // name of this process
	mesh        *mesh
	report      *reporter
	status      func() *federationv1.Status
	answer      func(context.Context, *federationv1.Question) *federationv1.Answer
	// done takes the controller's answer to a report: the keys of the report, and
	// the findings about those that were refused.
	done      func(keys []string, refused []*federationv1.Finding)
	connected func() // called at the begin of each session

	statusDirty chan struct{} // room for one

	mu   sync.Mutex
	conn *grpc.ClientConn // of the session that is open, or nil
}

// errAway is what calls get while no controller is connected.
var errAway = errors.New("no controller is connected")

// connection is that of the open session.
func (l *link) connection() (*grpc.ClientConn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return nil, errAway
	}
	return l.conn, nil
}

// statusChanged has the status sent soon.
func (l *link) statusChanged() {
	raise(l.statusDirty)
}

func (l *link) setConnection(c *grpc.ClientConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = c
}

// run keeps a session open until ctx ends. It goes through the controllers in
// turn, from a random one on, so that agents spread over replicas.
func (l *link) run(ctx context.Context) error {
	next, failures := rand.IntN(1<<16), 0
	for ctx.Err() == nil {
		list := l.controllers()
		address := list[next%len(list)]
		next++
		lived, err := l.session(ctx, address)
		if ctx.Err() != nil {
			return nil
		}
		if lived {
			failures = 0
		}
		wait := retryAfter(failures)
		failures++
		level := slog.LevelWarn
		if failures > 3 && failures%20 != 0 {
			level = slog.LevelDebug
		}
		l.log.Log(ctx, level, "no session with the controller: the last good state stays in use",
			"controller", address, "error", err, "retryIn", wait.Round(time.Millisecond))
		if clock.Sleep(ctx, l.clock, wait) != nil {
			return nil
		}
	}
	return nil
}

// retryAfter doubles from the first pause to the longest, a random half off,
// so that agents do not come back all at once.
func retryAfter(failures int) time.Duration {
	d := syncRetryMost
	if failures < 5 {
		d = min(d, syncRetryFirst<<failures)
	}
	return max(syncRetryFirst, d/2+rand.N(d/2+1))
}

// session is one Sync stream from its begin to its end. lived says that a
// controller welcomed the agent.
func (l *link) session(ctx context.Context, address string) (lived bool, err error) {
	conn, err := l.dial(address)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer cancel(nil)

	stream, err := federationv1.NewSyncClient(conn).Sync(ctx)
	if err != nil {
		return false, err
	}
	hello := l.mesh.hello()
	hello.AgentVersion, hello.Instance = l.version, l.instance
	if err := stream.Send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Hello{Hello: hello}}); err != nil {
		return false, streamError(stream, err)
	}
	late := l.clock.NewTimer(syncWelcome)
	defer late.Stop()
	welcomed := make(chan struct{})
	tasks.Go(func() {
		select {
		case <-late.C():
			cancel(fmt.Errorf("the controller said nothing for %v", syncWelcome))
		case <-welcomed:
		case <-ctx.Done():
		}
	})
	first, err := stream.Recv()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return false, err
	}
	close(welcomed)
	welcome := first.GetWelcome()
	if welcome == nil {
		return false, fmt.Errorf("the controller sent %T before its welcome", first.GetMessage())
	}
	if err := l.mesh.begin(welcome); err != nil {
		return false, err
	}
	defer l.mesh.end()
	l.report.begin(l.mesh.knownOwn(welcome))
	defer l.report.end()
	l.setConnection(conn)
	defer l.setConnection(nil)
	l.metrics.connected.Set(1)
	defer l.metrics.connected.Set(0)
	l.metrics.sessions.Inc()
	l.log.Info("session with the controller", "controller", address, "epoch", welcome.GetEpoch(),
		"revision", revisionText(welcome.GetRevision()), "differingBuckets", len(welcome.GetDiffering()))

	l.connected()

	answers := make(chan *federationv1.Answer)
	tasks.Go(func() {
		// What io.EOF stands for, Recv says.
		if err := l.send(ctx, stream, answers); err != nil && !errors.Is(err, io.EOF) {
			cancel(err)
		}
	})
	slots := make(chan struct{}, answersAtOnce)
	for {
		m, err := stream.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return true, err
		}
		switch m := m.GetMessage().(type) {
		case *federationv1.SyncResponse_Update:
			l.metrics.updates.Inc()
			l.mesh.update(m.Update)
		case *federationv1.SyncResponse_ReportResult:
			if keys, ok := l.report.result(m.ReportResult.GetSequence()); ok {
				l.done(keys, m.ReportResult.GetRefused())
			}
		case *federationv1.SyncResponse_Question:
			l.ask(ctx, &tasks, slots, answers, m.Question)
		case *federationv1.SyncResponse_Welcome:
			return true, errors.New("the controller sent a second welcome")
		}
	}
}

// ask works on a question beside the stream. While too many are open, it is
// refused rather than kept waiting.
func (l *link) ask(ctx context.Context, tasks *sync.WaitGroup, slots chan struct{}, answers chan<- *federationv1.Answer, q *federationv1.Question) {
	select {
	case slots <- struct{}{}:
		tasks.Go(func() {
			defer func() { <-slots }()
			a := l.answer(ctx, q)
			a.Id = q.GetId()
			select {
			case answers <- a:
			case <-ctx.Done():
			}
		})
	default:
		tasks.Go(func() {
			select {
			case answers <- &federationv1.Answer{Id: q.GetId(), Error: "the agent has too many open questions: ask again"}:
			case <-ctx.Done():
			}
		})
	}
}

// send is the only sender of a session: reports as they become due, the status
// when it changed and every statusEvery, and answers.
func (l *link) send(ctx context.Context, stream grpc.BidiStreamingClient[federationv1.SyncRequest, federationv1.SyncResponse], answers <-chan *federationv1.Answer) error {
	due, status := l.clock.NewTimer(0), l.clock.NewTimer(0)
	defer due.Stop()
	defer status.Stop()
	var lastStatus time.Time
	statusWaits := true // a timer for the next status is running; it is the first
	for {
		for {
			report, wait := l.report.take(l.clock.Now())
			if report == nil {
				if wait > 0 {
					due.Reset(wait)
				}
				break
			}
			l.metrics.reports.Inc()
			if err := stream.Send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Report{Report: report}}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-l.report.wake:
		case <-due.C():
		case <-l.statusDirty:
			if !statusWaits {
				status.Reset(max(0, statusPause-clock.Since(l.clock, lastStatus)))
				statusWaits = true
			}
		case <-status.C():
			lastStatus, statusWaits = l.clock.Now(), false
			status.Reset(statusEvery)
			if err := stream.Send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Status{Status: l.status()}}); err != nil {
				return err
			}
		case a := <-answers:
			if err := stream.Send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Answer{Answer: a}}); err != nil {
				return err
			}
		}
	}
}

// streamError is why a stream broke: Send says only that it did.
func streamError(stream grpc.ClientStream, err error) error {
	var m federationv1.SyncResponse
	if e := stream.RecvMsg(&m); e != nil {
		return e
	}
	return err
}

// dialController opens a connection to a controller, lazily. svid is nil where
// the call needs none.
func dialController(address string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(creds),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(syncMessage), grpc.MaxCallSendMsgSize(syncMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
}

// controllerCredentials are mutual TLS with controllers alone.
func controllerCredentials(v *identity.Verifier, own *identity.Source) credentials.TransportCredentials {
	return credentials.NewTLS(v.Client(identity.ClientConfig{
		SVID:      own,
		Authorize: identity.AllowRole(identity.RoleController),
	}))
}

func revisionText(r *federationv1.Revision) string {
	return federation.Revision{Incarnation: r.GetIncarnation(), Number: r.GetNumber()}.String()
}
