package gateway

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/xds"
)

// balancer chooses the endpoints of one cluster for new connections. Weights
// are followed exactly by smooth weighted round robin; failures set endpoints
// aside. Both survive a change of the endpoints, as far as those stay.
type balancer struct {
	clock clock.Clock

	mu     sync.Mutex
	config *xds.Cluster
	tiers  [][]*locality
	health map[string]*health // by endpoint
}

// locality is the endpoints of one remote cluster in one tier.
type locality struct {
	*xds.Locality
	weight  int
	current int // smooth weighted round robin: the largest is next
	next    int // round robin within
	members []*candidate
}

// candidate is one endpoint that a connection may go to.
type candidate struct {
	*xds.Endpoint
	key      string
	locality *locality
	health   *health
}

// tier is the candidate's place in the plan.
func (c *candidate) tier() int { return c.locality.Priority }

// health is what is known of an endpoint from its own connections.
type health struct {
	failures  int       // in a row: not connected
	breaks    int       // in a row: connected, then broken before a byte came back
	ejections int       // recent ones: each lasts longer than the one before
	until     time.Time // set aside until then
	proving   bool      // was set aside: the next failure does it again at once
}

func newBalancer(c clock.Clock, config *xds.Cluster) *balancer {
	b := &balancer{clock: c, health: map[string]*health{}}
	b.update(config)
	return b
}

// endpointKey tells endpoints apart, and names them in logs and records.
func endpointKey(e *xds.Endpoint) string {
	switch {
	case e.Pipe != "":
		return e.Pipe
	case e.TLS == "":
		return e.Addr.String()
	}
	return e.TLS + "@" + e.Addr.String()
}

// update takes over another set of endpoints.
func (b *balancer) update(config *xds.Cluster) {
	b.mu.Lock()
	defer b.mu.Unlock()
	type place struct {
		tier    int
		cluster string
		weight  int
	}
	before := map[place]*locality{}
	for _, tier := range b.tiers {
		for _, l := range tier {
			before[place{l.Priority, string(l.Cluster), l.weight}] = l
		}
	}
	b.config, b.tiers = config, nil
	known := b.health
	b.health = make(map[string]*health, len(known))
	sorted := slices.SortedStableFunc(slices.Values(config.Localities), func(x, y *xds.Locality) int { return cmp.Compare(x.Priority, y.Priority) })
	weighted := slices.ContainsFunc(sorted, func(l *xds.Locality) bool { return l.Weight > 0 })
	for i, in := range sorted {
		l := &locality{Locality: in, weight: in.Weight}
		if !weighted {
			l.weight = 1
		}
		if old := before[place{in.Priority, string(in.Cluster), l.weight}]; old != nil {
			l.current, l.next = old.current, old.next
		}
		for _, e := range in.Endpoints {
			key := endpointKey(e)
			h := known[key]
			if h == nil {
				h = &health{}
			}
			b.health[key] = h
			l.members = append(l.members, &candidate{Endpoint: e, key: key, locality: l, health: h})
		}
		if i == 0 || in.Priority != sorted[i-1].Priority {
			b.tiers = append(b.tiers, nil)
		}
		last := len(b.tiers) - 1
		b.tiers[last] = append(b.tiers[last], l)
	}
}

// search is one connection's way through the candidates.
type search struct {
	tried   map[string]bool
	refused map[*locality]bool // their gateway answers, but has no backend
	stay    *locality          // a gateway of it was silent: another may answer
}

func newSearch() *search { return &search{tried: map[string]bool{}, refused: map[*locality]bool{}} }

// pick is the next candidate for s, or nil when all were tried. First those of
// the first tier that has any in good standing; then those of clusters that
// have refused; at last those set aside: they may be back.
func (b *balancer) pick(s *search) *candidate {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.clock.Now()
	good := func(c *candidate) bool { return !s.tried[c.key] && !now.Before(c.health.until) }
	passes := []func(c *candidate) bool{
		func(c *candidate) bool { return good(c) && !s.refused[c.locality] },
		good,
		func(c *candidate) bool { return !s.tried[c.key] },
	}
	for _, usable := range passes {
		for _, tier := range b.tiers {
			if c := pickFrom(tier, s.stay, usable); c != nil {
				s.tried[c.key] = true
				return c
			}
		}
	}
	return nil
}

func pickFrom(tier []*locality, stay *locality, usable func(*candidate) bool) *candidate {
	var best *locality
	total := 0
	for _, l := range tier {
		if l.weight == 0 || !slices.ContainsFunc(l.members, usable) {
			continue
		}
		if l == stay {
			return l.take(usable)
		}
		l.current += l.weight
		total += l.weight
		if best == nil || l.current > best.current {
			best = l
		}
	}
	if best == nil {
		return nil
	}
	best.current -= total
	return best.take(usable)
}

// take is the next usable member in turn; there is one.
func (l *locality) take(usable func(*candidate) bool) *candidate {
	for {
		c := l.members[l.next%len(l.members)]
		l.next = (l.next + 1) % len(l.members)
		if usable(c) {
			return c
		}
	}
}

// connected tells that c took a connection, and served that bytes came back.
func (b *balancer) connected(c *candidate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := c.health
	if h.failures = 0; h.breaks == 0 {
		h.proving = false
	}
	b.forgive(h)
}

func (b *balancer) served(c *candidate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.health.breaks, c.health.proving = 0, false
}

// forgive forgets ejections that were long ago.
func (b *balancer) forgive(h *health) {
	if h.ejections > 0 && b.clock.Now().Sub(h.until) > b.config.Ejection.MaxTime {
		h.ejections = 0
	}
}

// failed tells that c could not be connected, and broke that it took a
// connection and broke it before its first byte. They report whether c is set
// aside for it.
func (b *balancer) failed(c *candidate) (ejected bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.health.failures++
	return b.judge(c.health, c.health.failures)
}

func (b *balancer) broke(c *candidate) (ejected bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.health.breaks++
	return b.judge(c.health, c.health.breaks)
}

func (b *balancer) judge(h *health, inARow int) (ejected bool) {
	e, now := b.config.Ejection, b.clock.Now()
	if e.Failures <= 0 || now.Before(h.until) || (inARow < e.Failures && !h.proving) {
		return false
	}
	b.forgive(h)
	h.ejections++
	aside := e.BaseTime * time.Duration(h.ejections)
	if e.MaxTime > 0 {
		aside = min(aside, e.MaxTime)
	}
	h.proving, h.until = true, now.Add(aside)
	return true
}
