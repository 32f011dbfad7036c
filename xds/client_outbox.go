package xds

import (
	"context"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// outbox sends requests in order without making the reader wait: a client that
// stopped reading while it sends, and a server that does the same, would wait
// for each other. What is queued is bounded by what the server sends unanswered:
// one response of each type.
type outbox struct {
	send func(*discoveryv3.DeltaDiscoveryRequest) error
	in   chan *discoveryv3.DeltaDiscoveryRequest
	over chan struct{} // closed when nothing is sent any more
}

const outboxSize = 4 * typeCount

func newOutbox(send func(*discoveryv3.DeltaDiscoveryRequest) error) *outbox {
	return &outbox{
		send: send,
		in:   make(chan *discoveryv3.DeltaDiscoveryRequest, outboxSize),
		over: make(chan struct{}),
	}
}

// put queues a request, or drops it if the stream is over.
func (o *outbox) put(r *discoveryv3.DeltaDiscoveryRequest) {
	select {
	case o.in <- r:
	case <-o.over:
	}
}

func (o *outbox) run(ctx context.Context) error {
	defer close(o.over)
	for {
		select {
		case r := <-o.in:
			if err := o.send(r); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
