package agent

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/xds"
)

// view is what one configured proxy is told: the builder of its resources, and
// what it was told last.
type view struct {
	name     xds.View
	identity spiffeid.ID
	socket   Socket
	builder  *xds.Builder
	imports  map[federation.ServiceID][]uint16 // ports that it has
}

// publisher takes the resources of a view at a revision; *xds.Server is one.
type publisher interface {
	Set(view xds.View, rev federation.Revision, d xds.Delta)
}

// driver carries the mesh's scenes out: for each service that a change concerns
// it makes the plan anew, and hands the resources that follow to the xDS
// server. It works in one goroutine.
type driver struct {
	clock   clock.Clock
	log     *slog.Logger
	metrics *metrics
	mesh    *mesh
	hosts   *hosts
	state   func(endpointKey) health
	trust   func()                     // puts a change of trust into force
	roots   func() []*x509.Certificate // in force
	out     publisher
	found   func([]federation.Finding)
	applied func(*scene)
	views   []*view

	opened atomic.Bool                   // proxies may be told
	last   scene                         // carried out already
	failed map[string]federation.Finding // by view and service: plans that were not built
}

// open lets the proxies be told. Until then the resources are built, and kept.
func (d *driver) open() {
	if !d.opened.Swap(true) {
		d.mesh.wake()
	}
}

// run carries changes out as they come, until ctx ends. Changes that come while
// one is carried out are carried out together.
func (d *driver) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.mesh.changed:
			d.step()
		}
	}
}

// step carries out what changed since the last step.
func (d *driver) step() {
	began := d.clock.Now()
	opened := d.opened.Load() // before the scene: what opened it is in it
	now := d.mesh.scene()
	concerned := now.touched
	for _, c := range federation.Diff(d.last.catalog, now.catalog) {
		if c.Kind == federation.ServiceChanged {
			concerned[c.Service] = true
		}
	}
	for _, c := range federation.DiffWorlds(now.catalog, d.last.world, now.world) {
		concerned[c.Service] = true
	}
	if now.trust {
		d.hosts.set(gatewayHosts(now.catalog))
		d.trust()
	}
	for _, v := range d.views {
		if now.trust {
			d.members(v, now)
		}
		for s := range concerned {
			d.service(v, now, s)
		}
		if !opened {
			continue
		}
		delta, err := v.builder.Take()
		d.note(string(v.name)+" tables", err, federation.Ref{Kind: "cluster", Name: string(d.mesh.self)})
		d.out.Set(v.name, now.catalog.Revision(), delta)
	}
	d.last = now
	d.found(slices.SortedFunc(maps.Values(d.failed), federation.Finding.Compare))
	d.metrics.apply.Observe(clock.Since(d.clock, began).Seconds())
	d.metrics.services.WithLabelValues("imported").Set(float64(d.mesh.imported()))
	d.metrics.revision.Set(float64(now.catalog.Revision().Number))
	if opened {
		d.applied(&now)
	}
	d.log.Debug("carried out", "revision", now.catalog.Revision().String(), "world", now.world.Digest(), "services", len(concerned))
}

// note keeps a failure to build something as a finding until it is mended.
func (d *driver) note(key string, err error, subject federation.Ref) {
	if err == nil {
		delete(d.failed, key)
		return
	}
	d.failed[key] = federation.NewFinding(federation.CodeResourcesNotBuilt, subject, "%v: what was in force before stays", err)
}

// members tells a view whom to believe.
func (d *driver) members(v *view, now scene) {
	m := xds.Members{Roots: d.roots()}
	for x := range now.catalog.Members() {
		if x.State == federation.MemberActive {
			m.Clusters = append(m.Clusters, x.Cluster)
		}
	}
	err := v.builder.SetMembers(m)
	d.note(string(v.name)+" members", err, federation.Ref{Kind: "cluster", Name: string(d.mesh.self)})
}

// service builds one service of a view anew.
func (d *driver) service(v *view, now scene, s federation.ServiceID) {
	err := d.export(v, now, s)
	d.note(string(v.name)+" export "+s.String(), err, federation.Ref{Kind: "service", Name: s.String()})
	err = d.imported(v, now, s)
	d.note(string(v.name)+" import "+s.String(), err, federation.Ref{Kind: "service", Name: s.String()})
}

// export builds what the view serves of an own service.
func (d *driver) export(v *view, now scene, s federation.ServiceID) error {
	svc, own := d.mesh.ownService(s)
	e, exported := now.catalog.Export(federation.ExportID{Cluster: d.mesh.self, Service: s})
	var x xds.Export
	if own && exported {
		x = d.exportOf(v, now, svc, e)
	}
	if len(x.Ports) == 0 {
		return v.builder.RemoveExport(s)
	}
	return v.builder.SetExport(x)
}

// exportOf is an own service with the endpoints that can serve now: for a
// gateway all of them, for a proxy the one that it stands before.
func (d *driver) exportOf(v *view, now scene, svc *service, e *federation.Export) xds.Export {
	x := xds.Export{Service: svc.id, Mode: e.Mode, AllCallers: e.Visible.IsAll()}
	if !x.AllCallers {
		for m := range now.catalog.Members() {
			if m.Cluster == d.mesh.self || e.Visible.Selects(m.Cluster, m.Region) {
				x.Callers = append(x.Callers, m.Cluster)
			}
		}
	}
	for _, p := range svc.ports {
		if p.Protocol != federation.TCP {
			continue
		}
		port := xds.ExportPort{Number: p.Number}
		for _, ep := range svc.endpoints {
			for _, at := range ep.ports {
				if at.number == p.Number {
					if b, ok := d.backend(v, svc, ep, at); ok {
						port.Endpoints = append(port.Endpoints, b)
					}
				}
			}
		}
		if v.socket.kind() == xds.Gateway || len(port.Endpoints) > 0 {
			x.Ports = append(x.Ports, port)
		}
	}
	return x
}

// backend is one endpoint as the view uses it; false if it does not.
func (d *driver) backend(v *view, svc *service, ep endpoint, at endpointPort) (xds.Backend, bool) {
	if v.socket.kind() == xds.Proxy {
		// A proxy serves its workload also while the checks fail: who comes to it
		// was sent by somebody who knew better.
		return xds.Backend{Ready: true, Proxy: at.proxy, App: at.plain}, at.proxy == v.socket.Listen
	}
	// An endpoint whose first check is still out is used: who cannot reach it
	// tries another, and a restart takes nobody away.
	return xds.Backend{Ready: svc.health(ep, d.state) != healthFailing, Addr: at.plain, Proxy: at.proxy}, true
}

// imported builds the ports of a service that the view's callers can reach.
func (d *driver) imported(v *view, now scene, s federation.ServiceID) error {
	var listen netip.Addr
	if v.socket.kind() == xds.Gateway {
		listen = d.mesh.vip(s)
	} else {
		listen = v.socket.Outbound[s]
	}
	var ports []uint16
	var candidates []*federation.Export
	if svc, ok := now.catalog.ServiceFrom(s, d.mesh.self); ok && listen.IsValid() {
		for _, o := range svc.Offers {
			candidates = append(candidates, o.Export)
		}
		for _, p := range svc.Ports {
			if p.Protocol == federation.TCP {
				ports = append(ports, p.Number)
			}
		}
	}
	var failed error
	for _, port := range ports {
		plan := now.catalog.PlanPort(s, port, d.caller(v, now), now.world)
		d.metrics.plans.Inc()
		err := v.builder.SetImport(xds.Import{
			Listen: netip.AddrPortFrom(listen, port), Plan: d.resolved(plan), Candidates: candidates,
		})
		if err != nil {
			failed = fmt.Errorf("port %d: %w", port, err)
		}
	}
	for _, port := range v.imports[s] {
		if !slices.Contains(ports, port) {
			v.builder.RemoveImport(s, port)
		}
	}
	if len(ports) == 0 {
		delete(v.imports, s)
	} else {
		v.imports[s] = ports
	}
	return failed
}

// caller is whose traffic a view's plans are for: a proxy's workload, or
// anybody in the cluster, whose identity nobody attests.
func (d *driver) caller(v *view, now scene) federation.Caller {
	c := federation.Caller{Cluster: d.mesh.self}
	if m, ok := now.catalog.Member(d.mesh.self); ok {
		c.Zone = m.Zone
	}
	if v.socket.kind() == xds.Proxy {
		c.ID = v.identity
	}
	return c
}

// resolved is a plan whose gateways are addresses only. A backend whose
// gateways have no known address is left out: the others take its share.
func (d *driver) resolved(p federation.Plan) federation.Plan {
	tiers := make([]federation.Tier, 0, len(p.Tiers))
	for _, t := range p.Tiers {
		backends := make([]federation.Backend, 0, len(t.Backends))
		for _, b := range t.Backends {
			if !b.Local {
				b.Gateways = d.addresses(b.Gateways)
				if len(b.Gateways) == 0 {
					continue
				}
			}
			backends = append(backends, b)
		}
		if len(backends) == 0 {
			continue
		}
		if len(backends) < len(t.Backends) {
			fill(backends)
		}
		tiers = append(tiers, federation.Tier{Backends: backends})
	}
	p.Tiers = tiers
	return p
}

// fill raises shares in proportion until they add up to all.
func fill(backends []federation.Backend) {
	sum := federation.PerMille(0)
	for _, b := range backends {
		sum += b.Share
	}
	left := federation.All
	for i := range backends {
		backends[i].Share = backends[i].Share * federation.All / sum
		left -= backends[i].Share
	}
	for i := 0; left > 0; i, left = (i+1)%len(backends), left-1 {
		backends[i].Share++
	}
}

// addresses resolves host names by their last good answers.
func (d *driver) addresses(list []federation.Address) []federation.Address {
	out := make([]federation.Address, 0, len(list))
	for _, a := range list {
		if _, err := netip.ParseAddr(a.Host); err == nil {
			out = append(out, a)
			continue
		}
		for _, ip := range d.hosts.addresses(a.Host) {
			out = append(out, federation.Address{Host: ip.String(), Port: a.Port})
		}
	}
	slices.SortFunc(out, federation.Address.Compare)
	return slices.Compact(out)
}

// gatewayHosts are the host names among the gateways of all registrations: no
// export may name another.
func gatewayHosts(c *federation.Catalog) map[string]bool {
	out := make(map[string]bool)
	for m := range c.Members() {
		for _, a := range m.Gateways {
			if net.ParseIP(a.Host) == nil {
				out[a.Host] = true
			}
		}
	}
	return out
}

// persister writes the last good state behind changes: at most once in
// saveEvery, and once more at the end. A state so large that a write takes long
// is written less often, so that writing takes a tenth of a core at most.
type persister struct {
	clock   clock.Clock
	dirty   <-chan struct{}
	save    func() error
	failing func(error) // nil when it works again
}

const saveEvery = 200 * time.Millisecond

func (p *persister) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			p.failing(p.save())
			return
		case <-p.dirty:
		}
		began := p.clock.Now()
		p.failing(p.save())
		if clock.Sleep(ctx, p.clock, max(saveEvery, 9*clock.Since(p.clock, began))) != nil {
			continue // the end's write is next
		}
	}
}
