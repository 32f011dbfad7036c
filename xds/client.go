package xds

import (
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/weftmesh/weft/federation/clock"
)

// ClientConfig is what NewClient takes: it says where a Client gets its configuration and who uses it.
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
