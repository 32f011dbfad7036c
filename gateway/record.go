package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/weftmesh/weft/federation"
)

// Direction is which way a connection goes through an engine.
type Direction uint8

// Out comes from a local caller, In is a stream of another's tunnel, Through
// is passed on by name without being opened.
const (
	Out Direction = iota + 1
	In
	Through
)

func (d Direction) String() string {
	switch d {
	case Out:
		return "out"
	case In:
		return "in"
	case Through:
		return "through"
	}
	return fmt.Sprintf("Direction(%d)", uint8(d))
}

// Record is the account of one connection of an application.
type Record struct {
	Start     time.Time
	Direction Direction
	Listener  string
	Source    netip.AddrPort       // who connected to this engine
	From      federation.ClusterID // cluster of the source
	Caller    string               // SPIFFE ID that the source asserts; empty: unattested
	Service   string               // authority, or the name that was asked for
	Cluster   federation.ClusterID // that serves
	Gateway   netip.AddrPort       // its gateway; zero where this engine dialled the endpoint
	Endpoint  string               // the backend, as far as it is known
	Tier      int                  // of the plan; -1 where there is none
	Attempts  int                  // candidates that were tried here
	Peer      string               // SPIFFE ID of the verified peer: of the tunnel's other end
	Sent      int64                // bytes from the caller to the service
	Received  int64
	Duration  time.Duration
	Revision  string
	Decision  string
	Connected bool   // a backend was reached
	End       string // why it ended
}

// Cross reports whether the connection left its cluster, or came from another.
func (r Record) Cross() bool { return r.From != r.Cluster || r.Direction == Through }

// LogValue groups a record's fields under the names of Weft's glossary.
func (r Record) LogValue() slog.Value {
	attrs := []slog.Attr{
		slog.Time("time", r.Start),
		slog.String("direction", r.Direction.String()),
		slog.String("source", r.Source.String()),
		slog.String("from", string(r.From)),
		slog.String("caller", r.Caller),
		slog.String("service", r.Service),
		slog.String("cluster", string(r.Cluster)),
		slog.String("endpoint", r.Endpoint),
		slog.Int("tier", r.Tier),
		slog.Int("attempts", r.Attempts),
		slog.String("peer", r.Peer),
		slog.Int64("bytesSent", r.Sent),
		slog.Int64("bytesReceived", r.Received),
		slog.Duration("duration", r.Duration),
		slog.String("revision", r.Revision),
		slog.String("decision", r.Decision),
		slog.String("end", r.End),
	}
	if r.Gateway.IsValid() {
		attrs = append(attrs, slog.String("gateway", r.Gateway.String()))
	}
	return slog.GroupValue(attrs...)
}

// LogAccess makes an Access that logs the connections which cross clusters.
func LogAccess(log *slog.Logger) func(Record) {
	return func(r Record) {
		if r.Cross() {
			log.LogAttrs(context.Background(), slog.LevelInfo, "access", slog.Any("access", r))
		}
	}
}

// begin and finish bracket a connection.
func (e *Engine) begin(r *Record) {
	r.Start = e.clock.Now()
	e.mu.Lock()
	e.open[r] = struct{}{}
	e.mu.Unlock()
	e.metrics.openConnections.WithLabelValues(r.Direction.String()).Inc()
}

func (e *Engine) finish(r *Record) {
	r.Duration = e.clock.Now().Sub(r.Start)
	e.mu.Lock()
	delete(e.open, r)
	if e.cutting {
		e.cut = append(e.cut, *r)
	}
	e.mu.Unlock()
	e.metrics.ended(r)
	e.cfg.Access(*r)
}
