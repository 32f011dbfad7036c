package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

const keepEvery = time.Second // probes, and a look at what is idle or old

// Probe is what this engine sees of another cluster's gateway.
type Probe struct {
	Cluster federation.ClusterID
	Address netip.AddrPort
	Answers bool
	RTT     time.Duration // of the last answer
	Since   time.Time     // when Answers became what it is

	known bool
}

// Probes is the present view of all gateways that are configured and have been
// tried, sorted by cluster and address.
func (e *Engine) Probes() []Probe {
	e.mu.Lock()
	pools := make([]*pool, 0, len(e.pools))
	for _, p := range e.pools {
		pools = append(pools, p)
	}
	e.mu.Unlock()
	var probes []Probe
	for _, p := range pools {
		p.mu.Lock()
		if p.warm && p.probe.known {
			probes = append(probes, p.probe)
		}
		p.mu.Unlock()
	}
	slices.SortFunc(probes, func(a, b Probe) int {
		if c := strings.Compare(string(a.Cluster), string(b.Cluster)); c != 0 {
			return c
		}
		return a.Address.Compare(b.Address)
	})
	return probes
}

// keep does what is due every second until the engine ends.
func (e *Engine) keep() {
	for clock.Sleep(e.life, e.clock, keepEvery) == nil {
		e.warmUp()
		now := e.clock.Now()
		e.mu.Lock()
		pools := make([]*pool, 0, len(e.pools))
		for _, p := range e.pools {
			pools = append(pools, p)
		}
		for in := range e.inbound {
			in.keep(now)
		}
		e.mu.Unlock()
		for _, p := range pools {
			p.keep(now)
		}
	}
}

// warmUp makes a pool for every gateway that ends tunnels itself, so that the
// first connection to it, and the probes, find a tunnel.
func (e *Engine) warmUp() {
	config := e.config.Load()
	for name, c := range config.Clusters {
		b := e.balancer(name)
		if b == nil || c.Tunnels == nil {
			continue
		}
		b.mu.Lock()
		var remote []*candidate
		for _, tier := range b.tiers {
			for _, l := range tier {
				remote = append(remote, l.members...)
			}
		}
		inUse := b.config
		b.mu.Unlock()
		for _, m := range remote {
			if t := inUse.TLS[m.TLS]; t != nil && strings.HasSuffix(t.SNI, ".t.weft") {
				e.pool(m, inUse, t)
			}
		}
	}
}

// keep probes a pool's tunnels, closes idle ones, and sees that one is warm.
func (p *pool) keep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.prune()
	if len(p.tunnels) == 0 && p.warm && p.dialing == nil && !now.Before(p.retryAt) {
		p.dial()
	}
	spare := len(p.tunnels)
	if p.warm {
		spare--
	}
	for _, t := range slices.Backward(p.tunnels) {
		idle := t.Stats().IdleSince
		if limit := p.limits.IdleTimeout; spare > 0 && limit > 0 && !idle.IsZero() && now.Sub(idle) > limit {
			spare--
			t.Drain()
			continue
		}
		if t.pinging.CompareAndSwap(false, true) {
			p.e.work.Go(func() { p.ping(t) })
		}
	}
}

func (p *pool) ping(t *outTunnel) {
	defer t.pinging.Store(false)
	// A tunnel carries connections that only a dead peer may cut, and a busy
	// machine is not a dead one.
	p.mu.Lock()
	timeout := max(p.limits.HTTP2.PingTimeout, deadPeer)
	p.mu.Unlock()
	ctx, cancel := withTimeout(p.e.life, p.e.clock, timeout)
	defer cancel()
	rtt, err := t.Ping(ctx)
	if err != nil && p.e.life.Err() != nil {
		return
	}
	p.mu.Lock()
	p.answered(err == nil, rtt)
	p.mu.Unlock()
	if err != nil && t.Err() == nil {
		p.e.log.Warn("tunnel given up: no answer to a ping", "cluster", string(p.cluster), "gateway", p.key.addr.String(), "after", timeout)
		t.Close()
	}
}

// keep drains an inbound tunnel that is old, or idle for long. Callers hold the
// engine's mu.
func (in *inbound) keep(now time.Time) {
	old := in.limits.MaxAge > 0 && now.Sub(in.born) > in.limits.MaxAge
	idle := in.tunnel.Stats().IdleSince
	unused := in.limits.IdleTimeout > 0 && !idle.IsZero() && now.Sub(idle) > in.limits.IdleTimeout
	if old || unused {
		in.tunnel.Drain()
	}
}
