package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/weftmesh/weft/federation/clock"
)

// ClientConfig says where a Client gets its configuration and who uses it.
type ClientConfig struct {
	// Conn leads to the agent; the credential behind it is the proxy's
	// identity. The client does not close it.
	Conn grpc.ClientConnInterface
	// NodeID and NodeCluster appear in the agent's status. They are no identity.
	NodeID, NodeCluster string
	// Apply takes over a new Config. It is called from one goroutine, for one
	// response at a time, and returns when the change is in use, or refused:
	// what the server then hears is true. Each Refusal names a resource of this
	// Update that the engine goes on without; the rest of the update is in use.
	// The next Config holds the refused resource's last good version again (or
	// not at all, if there was none). Refusing a removal has no effect.
	Apply  func(*Update) []Refusal
	Clock  clock.Clock
	Logger *slog.Logger
	// Back-off between two connections, doubling with full jitter. Zero means
	// 50 ms and 2 s.
	BackoffMin, BackoffMax time.Duration
}

// Client reads a proxy's configuration by delta ADS and hands it to an engine.
// It keeps what it has while the server is away, and tells it which versions
// those are when it is back.
type Client struct {
	cfg    ClientConfig
	state  state // Run's alone
	config atomic.Pointer[Config]
	ready  chan struct{}
}

// NewClient has an empty Config until Run gets another.
func NewClient(cfg ClientConfig) *Client {
	if cfg.BackoffMin <= 0 {
		cfg.BackoffMin = 50 * time.Millisecond
	}
	if cfg.BackoffMax <= 0 {
		cfg.BackoffMax = 2 * time.Second
	}
	c := &Client{cfg: cfg, state: newState(), ready: make(chan struct{})}
	c.config.Store(c.state.config)
	return c
}

// Config is what the engine has at present.
func (c *Client) Config() *Config { return c.config.Load() }

// Ready is closed when the engine has its listeners for the first time, and
// with them what they refer to.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// Run reads until ctx ends, and returns its error. It connects again whenever
// the stream breaks. It must be called once.
func (c *Client) Run(ctx context.Context) error {
	backoff := c.cfg.BackoffMin
	for {
		got, err := c.stream(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if got {
			backoff = c.cfg.BackoffMin
		}
		// Full jitter: when an agent restarts, its proxies do not come back all at
		// once.
		wait := c.cfg.BackoffMin + time.Duration(rand.Int64N(int64(backoff)))
		c.cfg.Logger.WarnContext(ctx, "no configuration stream; what is in use stays in use", "error", err, "retryIn", wait)
		if err := clock.Sleep(ctx, c.cfg.Clock, wait); err != nil {
			return err
		}
		backoff = min(2*backoff, c.cfg.BackoffMax)
	}
}

// maxResponse is far above what a Server sends at once.
const maxResponse = 64 << 20

// stream runs one ADS stream. It reports whether any response came.
func (c *Client) stream(ctx context.Context) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ads, err := discoveryv3.NewAggregatedDiscoveryServiceClient(c.cfg.Conn).
		DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(maxResponse))
	if err != nil {
		return false, err
	}
	s := &session{client: c, out: newOutbox(ads.Send)}
	sent := make(chan error, 1)
	go func() {
		sent <- s.out.run(ctx)
		cancel() // recv below then ends
	}()
	defer func() {
		cancel()
		if e := <-sent; e != nil && !errors.Is(e, context.Canceled) {
			err = e
		}
	}()
	s.begin()
	for {
		r, err := ads.Recv()
		if err != nil {
			return got, err
		}
		got = true
		s.handle(ctx, r)
	}
}

// session is one stream's part of the conversation.
type session struct {
	client     *Client
	out        *outbox
	subscribed [typeCount]map[string]bool
	asked      [typeCount]bool
}

// begin asks for everything, and says what is here already.
func (s *session) begin() {
	for _, t := range []Type{TypeCluster, TypeListener} {
		s.send(t, &discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: s.client.state.have(t)})
	}
	s.subscribe()
}

// subscribe follows the names that the resources refer to.
func (s *session) subscribe() {
	for t, want := range s.client.state.references() {
		have := s.subscribed[t]
		r := &discoveryv3.DeltaDiscoveryRequest{}
		for name := range want {
			if !have[name] {
				r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
			}
		}
		for name := range have {
			if !want[name] {
				r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, name)
			}
		}
		s.subscribed[t] = want
		if len(r.ResourceNamesSubscribe)+len(r.ResourceNamesUnsubscribe) == 0 {
			continue
		}
		if !s.asked[t] {
			r.InitialResourceVersions = s.client.state.have(t)
		}
		s.send(t, r)
	}
}

func (s *session) send(t Type, r *discoveryv3.DeltaDiscoveryRequest) {
	r.TypeUrl = t.url()
	if !s.asked[TypeCluster] {
		r.Node = &corev3.Node{
			Id: s.client.cfg.NodeID, Cluster: s.client.cfg.NodeCluster, UserAgentName: "weft",
		}
	}
	s.asked[t] = true
	s.out.put(r)
}

// handle takes over one response and answers it.
func (s *session) handle(ctx context.Context, m *discoveryv3.DeltaDiscoveryResponse) {
	c := s.client
	answer := &discoveryv3.DeltaDiscoveryRequest{ResponseNonce: m.GetNonce()}
	t, ok := typeOf(m.GetTypeUrl())
	if !ok {
		answer.TypeUrl = m.GetTypeUrl()
		answer.ErrorDetail = &statuspb.Status{Code: int32(codes.InvalidArgument), Message: "type is not supported"}
		s.out.put(answer)
		return
	}
	step := c.state.step(t, m)
	var refused []Refusal
	if u := step.update(); u != nil {
		refused = c.cfg.Apply(u)
	}
	refused = slices.Concat(step.refused, step.commit(refused))
	c.config.Store(c.state.config)
	if t == TypeListener {
		c.becomeReady()
	}
	if t == TypeCluster || t == TypeListener {
		s.subscribe() // before the answer: the server then knows what is still due
	}
	if len(refused) > 0 {
		answer.ErrorDetail = &statuspb.Status{Code: int32(codes.InvalidArgument), Message: joinRefusals(refused)}
		c.cfg.Logger.WarnContext(ctx, "configuration refused; what was in use before stays", "reason", answer.ErrorDetail.GetMessage())
	}
	s.send(t, answer)
}

func (c *Client) becomeReady() {
	select {
	case <-c.ready:
	default:
		close(c.ready)
	}
}

func joinRefusals(refused []Refusal) string {
	texts := make([]string, len(refused))
	for i, r := range refused {
		texts[i] = r.String()
	}
	return strings.Join(texts, "; ")
}

// Update is one step from a Config to the next.
type Update struct {
	Config *Config
	// Previous is the Config before, as the engine had it; empty, not nil, at
	// first.
	Previous *Config
	// Names in Config or Previous, sorted, of what was added, changed or
	// removed. A cluster counts as changed when its endpoints did.
	Listeners, Clusters, Routes, Trust []string
}

// Refusal is why a resource was not taken.
type Refusal struct {
	Name   Name
	Reason string // says which field and why, in one line
}

func (r Refusal) String() string { return fmt.Sprintf("%s: %s", r.Name, r.Reason) }
