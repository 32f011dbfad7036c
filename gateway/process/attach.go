package process

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/gateway"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

const (
	reportEvery  = 250 * time.Millisecond // a look at what changed
	reportAnyway = 5 * time.Second        // a report although nothing did
)

// attach keeps the stream on which the agent hears what the engine sees, and
// says whom to believe, until ctx ends.
func (p *Process) attach(ctx context.Context, w *self) {
	for ctx.Err() == nil {
		err := p.attachOnce(ctx, w)
		if ctx.Err() != nil {
			return
		}
		p.config.Log.Info("the agent is away; going on with what it said last", "error", err)
		_ = clock.Sleep(ctx, p.config.Clock, retryAfter/4)
	}
}

func (p *Process) attachOnce(ctx context.Context, w *self) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := federationv1.NewLocalClient(p.conn).Attach(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Hello{Hello: &federationv1.ProxyHello{
		Name: p.config.Name, Engine: p.config.Engine, Version: p.config.Version,
	}}}); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				received <- err
				return
			}
			p.take(w, m)
		}
	}()
	var last *federationv1.ProxyReport
	var sent time.Time
	timer := p.config.Clock.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case err := <-received:
			return err
		case m := <-p.send:
			if err := stream.Send(m); err != nil {
				return errors.Join(err, <-received)
			}
		case <-timer.C():
			now := p.config.Clock.Now()
			if r := report(w); !proto.Equal(stable(r), stable(last)) || now.Sub(sent) >= reportAnyway {
				last, sent = r, now
				if err := stream.Send(&federationv1.AttachRequest{Message: &federationv1.AttachRequest_Report{Report: r}}); err != nil {
					return errors.Join(err, <-received)
				}
			}
			timer.Reset(reportEvery)
		}
	}
}

// report is what the engine sees now.
func report(w *self) *federationv1.ProxyReport {
	r := &federationv1.ProxyReport{}
	if svid, err := w.source.GetX509SVID(); err == nil {
		r.SvidExpires = timestamppb.New(svid.Certificates[0].NotAfter)
	}
	if b := w.source.Bundle(); b != nil {
		r.BundleSequence = b.Sequence()
	}
	if w.engine == nil { // an external one tells nobody what it sees
		return r
	}
	r.OpenConnections, r.Address = uint64(max(0, w.engine.Connections())), w.engine.Address()
	for _, probe := range w.engine.Probes() {
		peer := &federationv1.Peer{
			Cluster: string(probe.Cluster), Address: probe.Address.String(), Probe: federationv1.Probe_PROBE_SILENT,
			Since: timestamppb.New(probe.Since),
		}
		if probe.Answers {
			peer.Probe, peer.Rtt = federationv1.Probe_PROBE_ANSWERS, durationpb.New(probe.RTT)
		}
		r.Peers = append(r.Peers, peer)
	}
	return r
}

// stable leaves out what changes all the time and is no news by itself.
func stable(r *federationv1.ProxyReport) *federationv1.ProxyReport {
	if r == nil {
		return nil
	}
	s := proto.CloneOf(r)
	s.OpenConnections = 0
	for _, p := range s.GetPeers() {
		p.Rtt = nil
	}
	return s
}

// take obeys one message of the agent's.
func (p *Process) take(w *self, m *federationv1.AttachResponse) {
	switch m := m.GetMessage().(type) {
	case *federationv1.AttachResponse_Bundle:
		p.believe(w, m.Bundle)
	case *federationv1.AttachResponse_TraceSource:
		p.mu.Lock()
		p.traces[m.TraceSource] = true
		p.mu.Unlock()
	}
}

// believe puts a bundle and the denials into force, and cuts the tunnels of
// those who are trusted no more.
func (p *Process) believe(w *self, u *federationv1.BundleUpdate) {
	b, err := bundleOf(u.GetBundle())
	if err == nil && b != nil {
		err = w.source.SetBundle(b)
	}
	if err != nil && !errors.Is(err, identity.ErrOldBundle) {
		p.config.Log.Error("the agent's trust bundle cannot be used: the one before stays in force", "error", err)
	}
	var denials []identity.Denial
	for _, m := range u.GetDenials() {
		d, err := m.Decode()
		if err != nil {
			p.config.Log.Error("a denial cannot be read, the others count", "error", err)
			continue
		}
		denials = append(denials, identity.Denial{Cluster: d.Cluster, Generation: d.Generation})
	}
	w.denials.Replace(denials)
	if w.engine != nil {
		w.engine.Recheck()
	}
}

// record passes a connection's record on: to the access log, and to the agent
// if it asked for this source.
func (p *Process) record(r gateway.Record) {
	if p.config.Access != nil {
		p.config.Access(r)
	}
	source := r.Source.String()
	p.mu.Lock()
	asked := p.traces[source]
	delete(p.traces, source)
	p.mu.Unlock()
	if !asked {
		return
	}
	select {
	case p.send <- &federationv1.AttachRequest{Message: &federationv1.AttachRequest_Access{Access: access(r)}}:
	default: // the agent does not read; it asked for news, not for all of it
	}
}

func access(r gateway.Record) *federationv1.Access {
	a := &federationv1.Access{
		Start: timestamppb.New(r.Start), Source: r.Source.String(), Caller: r.Caller, Cluster: string(r.Cluster),
		Endpoint: r.Endpoint, Tier: int32(r.Tier), Attempts: int32(r.Attempts), Peer: r.Peer,
		BytesSent: uint64(max(0, r.Sent)), BytesReceived: uint64(max(0, r.Received)),
		Duration: durationpb.New(r.Duration), Revision: r.Revision, Decision: r.Decision, End: r.End,
		Direction: r.Direction.String(),
	}
	if r.Gateway.IsValid() {
		a.Gateway = r.Gateway.String()
	}
	if s, port, ok := xds.ParseAuthority(r.Service); ok {
		a.Namespace, a.Name, a.Port = s.Namespace, s.Name, uint32(port)
	}
	return a
}
