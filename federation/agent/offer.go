package agent

import (
	"context"
	"log/slog"
	"sync"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// offering is what the cluster offers: the source's services and policies with
// the outcomes of their checks. It hands changes on, to the mesh for the
// cluster's own callers, and to the reporter for everybody else's. It is safe
// for concurrent use.
type offering struct {
	cluster  federation.ClusterID
	log      *slog.Logger
	mesh     *mesh
	report   *reporter
	findings *findings
	metrics  *metrics
	// settled is called, without the lock, when every endpoint that the first
	// reading named has had an outcome.
	settled func()

	mu       sync.Mutex
	health   map[endpointKey]health
	why      map[endpointKey]string // of failing ones
	services map[federation.ServiceID]*service
	reported map[string]bool // keys of what was handed to the reporter
	read     bool            // a reading came
	full     bool
	// sure: outcomes count as they are. Until every endpoint of the first reading
	// has had one, or had its time, a service keeps the readiness that an earlier
	// process knew: a restart makes nobody unready.
	sure bool
}

func newOffering(cluster federation.ClusterID, log *slog.Logger, m *mesh, r *reporter, f *findings, x *metrics) *offering {
	return &offering{
		cluster: cluster, log: log, mesh: m, report: r, findings: f, metrics: x,
		settled:  func() {},
		health:   make(map[endpointKey]health),
		why:      make(map[endpointKey]string),
		reported: make(map[string]bool),
	}
}

// known says whether the services and their outcomes are known, and whether
// there can be no others.
func (o *offering) known() (sure, full bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sure, o.full
}

// of is what the checks have shown of an endpoint.
func (o *offering) of(k endpointKey) health {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.health[k]
}

// take replaces what the source says. full: there is nothing else. It returns
// the checks that are to run.
func (o *offering) take(services map[federation.ServiceID]*service, policies map[federation.PolicyID]federation.Policy, full bool) map[endpointKey]check {
	if full || len(services)+len(policies) > 0 {
		o.mesh.setOwn(services, policies)
	}
	want := checks(services)
	o.mu.Lock()
	o.services, o.full, o.read = services, full, true
	for k := range o.health {
		if _, ok := want[k]; !ok {
			delete(o.health, k)
			delete(o.why, k)
		}
	}
	report := make(map[string]*federationv1.Record)
	for _, svc := range services {
		if !svc.export {
			continue
		}
		e := federationv1.ExportRecord(svc.offer(o.cluster))
		report[e.GetKey()] = e
	}
	for _, p := range policies {
		r := federationv1.PolicyRecord(p)
		report[r.GetKey()] = r
	}
	for key := range o.reported {
		k, err := federationv1.ParseKey(key)
		svc := services[k.Service]
		counted := err == nil && k.Kind == federationv1.KindReadiness && svc != nil && svc.export
		if report[key] == nil && !counted {
			report[key] = nil // gone
			delete(o.reported, key)
		}
	}
	for key, r := range report {
		if r != nil {
			o.reported[key] = true
		}
	}
	o.mu.Unlock()
	o.report.set(report)
	o.findings.set("checks", o.failing())
	o.recount()
	return want
}

// readiness counts a service's endpoints by the outcomes so far.
func (o *offering) readiness(svc *service) (federation.Readiness, bool) {
	return svc.readiness(func(k endpointKey) health { return o.health[k] })
}

// recount counts every service, when the outcomes are sure.
func (o *offering) recount() {
	o.mu.Lock()
	if !o.sure {
		o.sure = o.read && o.allSettled()
		if !o.sure {
			o.mu.Unlock()
			return
		}
		defer o.settled()
	}
	full := o.full
	ids := make([]federation.ServiceID, 0, len(o.services))
	for id := range o.services {
		ids = append(ids, id)
	}
	o.mu.Unlock()
	o.count(ids...)
	o.report.setFull(full)
}

// giveUp ends the wait for first outcomes: an endpoint without one is not
// ready.
func (o *offering) giveUp() {
	o.mu.Lock()
	if o.sure || !o.read {
		o.mu.Unlock()
		return
	}
	for k := range checks(o.services) {
		if o.health[k] == healthUnknown {
			o.health[k] = healthFailing
		}
	}
	o.mu.Unlock()
	o.recount()
}

func (o *offering) allSettled() bool {
	for _, svc := range o.services {
		if !svc.export {
			continue
		}
		if _, settled := o.readiness(svc); !settled {
			return false
		}
	}
	return true
}

// count hands the readiness of services on. One with an endpoint whose first
// check is still out is left as it was: it is counted when that has ended.
func (o *offering) count(ids ...federation.ServiceID) {
	o.mu.Lock()
	defer o.mu.Unlock() // held to the end: what is handed on later must be newer
	counts := make(map[federation.ServiceID]federation.Readiness)
	report := make(map[string]*federationv1.Record)
	for _, id := range ids {
		svc, ok := o.services[id]
		if !ok || !svc.export {
			continue
		}
		n, settled := o.readiness(svc)
		if !settled {
			continue
		}
		counts[id] = n
		r := federationv1.ReadinessRecord(federation.ExportID{Cluster: o.cluster, Service: id}, n)
		report[r.GetKey()] = r
		o.reported[r.GetKey()] = true
	}
	o.mesh.setReadiness(counts, ids...)
	o.report.set(report)
	o.measure()
}

// checked takes the outcome of an endpoint's check.
func (o *offering) checked(k endpointKey, now health, why string) {
	o.mu.Lock()
	if _, ok := o.services[k.service]; !ok {
		o.mu.Unlock()
		return
	}
	before := o.health[k]
	o.health[k] = now
	if now == healthFailing {
		o.why[k] = why
	} else {
		delete(o.why, k)
	}
	sure := o.sure
	o.mu.Unlock()
	level := slog.LevelInfo
	if now == healthFailing {
		level = slog.LevelWarn
	}
	o.log.Log(context.Background(), level, "endpoint's readiness changed", "service", k.service.String(), "endpoint", k.endpoint,
		"was", before.String(), "is", now.String(), "why", why)
	o.findings.set("checks", o.failing())
	if sure {
		o.count(k.service)
	} else {
		o.recount()
	}
}

// failing are the findings about failing endpoints, one for each service: all
// its endpoints in one.
func (o *offering) failing() []federation.Finding {
	o.mu.Lock()
	defer o.mu.Unlock()
	type sum struct {
		n    int
		name string
		why  string
	}
	sums := make(map[federation.ServiceID]*sum)
	for k, why := range o.why {
		s := sums[k.service]
		if s == nil {
			s = new(sum)
			sums[k.service] = s
		}
		if s.n++; s.name == "" || k.endpoint < s.name {
			s.name, s.why = k.endpoint, why
		}
	}
	var list []federation.Finding
	for id, s := range sums {
		list = append(list, federation.NewFinding(federation.CodeHealthCheckFailing,
			federation.Ref{Kind: "export", Name: federation.ExportID{Cluster: o.cluster, Service: id}.String()},
			"%d of %d endpoints fail their check, for example %s: %s", s.n, len(o.services[id].endpoints), s.name, s.why))
	}
	return list
}

// measure sets the gauges.
func (o *offering) measure() {
	n := map[health]int{healthReady: 0, healthFailing: 0, healthUnknown: 0}
	for _, svc := range o.services {
		for _, e := range svc.endpoints {
			n[svc.health(e, func(k endpointKey) health { return o.health[k] })]++
		}
	}
	for h, k := range n {
		o.metrics.endpoints.WithLabelValues(h.String()).Set(float64(k))
	}
	o.metrics.services.WithLabelValues("own").Set(float64(len(o.services)))
}
