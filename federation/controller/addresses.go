package controller

import (
	"context"
	"net/netip"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// releaseCheck is how often released addresses are looked at.
const releaseCheck = time.Minute

// addresses gives every cluster with a range an address for each service that
// it may see, and takes those of vanished services back after their
// quarantine. It looks at what changed since it last did.
func (l *leader) addresses(ctx context.Context, snap *snapshot, now time.Time) error {
	var swaps []store.Swap
	add := func(m *federation.Member, s federation.ServiceID) {
		if w, ok := l.reconcile(ctx, snap.Catalog, m, s, now); ok {
			swaps = append(swaps, w)
		}
	}
	if snap.Catalog != l.reconciled {
		members, services := l.affected(snap.Catalog)
		for m := range snap.Catalog.Members() {
			if !m.VIPs.IsValid() || m.State == federation.MemberDeregistered {
				continue
			}
			list := services
			if members[m.Cluster] {
				list = l.known(snap.Catalog, m.Cluster)
			}
			for s := range list {
				add(m, s)
			}
		}
	}
	due := !now.Before(l.releaseAt)
	if due {
		l.releaseAt = now.Add(releaseCheck)
		for _, f := range l.c.state.all(federationv1.KindVIP) {
			v := f.Body.(federation.VIP)
			if !v.Released.IsZero() && now.Sub(v.Released) >= vipQuarantine {
				swaps = append(swaps, store.Swap{Key: f.Key.String(), Old: f.Record()})
				delete(l.taken[f.Key.Cluster], v.Address.String())
			}
		}
	}
	if err := l.swap(ctx, swaps); err != nil {
		return err // l.reconciled stays: the same is looked at again
	}
	l.reconciled = snap.Catalog
	if !due || len(l.without) == 0 {
		return nil
	}
	// An address may have become free for those that found none.
	swaps = nil
	for key := range l.without {
		m, ok := snap.Catalog.Member(key.Cluster)
		if !ok || !m.VIPs.IsValid() || m.State == federation.MemberDeregistered {
			delete(l.without, key)
			continue
		}
		add(m, key.Service)
	}
	return l.swap(ctx, swaps)
}

// affected are the clusters whose registration changed since the last
// reconciliation, and the services of which an export or a view did.
func (l *leader) affected(now *federation.Catalog) (map[federation.ClusterID]bool, map[federation.ServiceID]bool) {
	members, services := map[federation.ClusterID]bool{}, map[federation.ServiceID]bool{}
	for _, c := range federation.Diff(l.reconciled, now) {
		switch c.Kind {
		case federation.MemberChanged:
			members[c.Cluster] = true
		case federation.ExportChanged, federation.ServiceChanged:
			services[c.Service] = true
		}
	}
	return members, services
}

// known are all services that the catalog has, and those that a cluster has an
// address of.
func (l *leader) known(c *federation.Catalog, cluster federation.ClusterID) map[federation.ServiceID]bool {
	out := map[federation.ServiceID]bool{}
	for s := range c.ServiceIDs() {
		out[s] = true
	}
	for _, s := range l.taken[cluster] {
		out[s] = true
	}
	return out
}

// reconcile says what is to be written for one service's address in one
// cluster, if anything.
func (l *leader) reconcile(ctx context.Context, c *federation.Catalog, m *federation.Member, s federation.ServiceID, now time.Time) (store.Swap, bool) {
	key := federationv1.VIPKey(m.Cluster, s)
	f, has := l.c.state.fact(key)
	_, visible := c.ServiceFrom(s, m.Cluster)
	w := store.Swap{Key: key.String()}
	if !visible {
		delete(l.without, key)
	}
	if has {
		w.Old = f.Record()
		v := f.Body.(federation.VIP)
		outside := !m.VIPs.Contains(v.Address)
		switch {
		case visible && outside:
			// The cluster has another range now.
			delete(l.taken[m.Cluster], v.Address.String())
		case visible && !v.Released.IsZero():
			v.Released = time.Time{}
			w.New = federationv1.VIPRecord(m.Cluster, s, v)
			return w, true
		case !visible && v.Released.IsZero():
			v.Released = now
			w.New = federationv1.VIPRecord(m.Cluster, s, v)
			return w, true
		default:
			return w, false
		}
	} else if !visible {
		return w, false
	}
	taken := l.taken[m.Cluster]
	addr, err := chooseVIP(m.VIPs, s, func(a netip.Addr) bool { _, used := taken[a.String()]; return used })
	if err != nil {
		if !l.without[key] {
			l.without[key] = true
			l.c.log.ErrorContext(ctx, "a service gets no clusterset address", "cluster", string(m.Cluster), "service", s.String(), "range", m.VIPs.String(), "error", err)
		}
		return w, false
	}
	delete(l.without, key)
	l.take(m.Cluster, addr.String(), s)
	w.New = federationv1.VIPRecord(m.Cluster, s, federation.VIP{Address: addr})
	return w, true
}

func (l *leader) take(c federation.ClusterID, addr string, s federation.ServiceID) {
	if l.taken[c] == nil {
		l.taken[c] = map[string]federation.ServiceID{}
	}
	l.taken[c][addr] = s
}
