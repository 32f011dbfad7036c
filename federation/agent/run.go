package agent

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/xds"
)

// settleTime is how long the first outcomes of checks are waited for, before
// endpoints without one count as not ready.
const settleTime = 5 * time.Second

// newDriver makes the xDS server and a view for each configured proxy.
func (a *Agent) newDriver() error {
	td, err := spiffeid.TrustDomainFromString(a.who.TrustDomain)
	if err != nil {
		return err
	}
	a.xds = xds.NewServer(xds.ServerConfig{
		Clock: a.clock, Logger: a.log,
		OnAck:  func(xds.Ack) { a.proxyAnswered() },
		OnNack: func(xds.Nack) { a.proxyAnswered() },
	})
	a.driver = &driver{
		clock: a.clock, log: a.log, metrics: a.metrics,
		mesh: a.mesh, hosts: a.hosts, state: a.offering.of, trust: a.takeTrust, out: a.xds,
		roots:  func() []*x509.Certificate { return a.who.source.Bundle().Roots() },
		found:  func(list []federation.Finding) { a.findings.set("plans", list) },
		failed: make(map[string]federation.Finding),
		applied: func(s *scene) {
			a.inForce.Store(s)
			a.link.statusChanged()
		},
	}
	for i, s := range a.config.Sockets {
		id, err := s.id(td, a.who.Cluster)
		if err != nil {
			return err
		}
		b, err := xds.NewBuilder(xds.Node{
			TrustDomain: td, Cluster: a.who.Cluster, Kind: s.kind(), Bind: s.Listen, LocalPipe: s.LocalPipe,
		})
		if err != nil {
			return fmt.Errorf("socket of %s: %w", s.Identity, err)
		}
		a.driver.views = append(a.driver.views, &view{
			name: xds.View(fmt.Sprintf("%s#%d", s.Identity, i)), identity: id, socket: s, builder: b,
			imports: make(map[federation.ServiceID][]uint16),
		})
	}
	return nil
}

// proxyAnswered has the answers of proxies looked at. It must not wait.
func (a *Agent) proxyAnswered() {
	raise(a.answered)
	a.link.statusChanged()
}

// runAnswers keeps the findings about refused resources up to date.
func (a *Agent) runAnswers(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.answered:
			a.refusals()
		}
	}
}

// runSource follows the folder of services.
func (a *Agent) runSource(ctx context.Context) error {
	if a.config.Source == "" {
		// Nothing is offered, but nothing of an earlier process is withdrawn.
		a.offering.take(nil, nil, false)
		a.open()
		return nil
	}
	return watchFolder(ctx, a.config.Source, a.clock, a.log, a.reread, func() {
		a.source.load(a.config.Source, readFolder(a.config.Source))
		a.findings.set("source", a.source.findings)
		services := a.source.services()
		gateways := a.gatewayAddresses()
		for id, svc := range services {
			services[id] = svc.behind(gateways)
		}
		if a.source.full || len(services) > 0 {
			documents := a.source.documents()
			a.documents.Store(&documents)
			a.mesh.persist()
		}
		a.checker.set(ctx, a.offering.take(services, a.source.policies(), a.source.full))
		a.open()
	})
}

// runSettle ends the wait for the first outcomes of checks.
func (a *Agent) runSettle(ctx context.Context) error {
	if clock.Sleep(ctx, a.clock, settleTime) == nil {
		a.offering.giveUp()
	}
	return nil
}

// gatewayAddresses are what exports name: those of the configuration, or else
// those of the registration.
func (a *Agent) gatewayAddresses() []federation.Address {
	if len(a.config.Gateways) > 0 {
		return a.config.Gateways
	}
	catalog, _ := a.mesh.present()
	if m, ok := catalog.Member(a.who.Cluster); ok {
		return m.Gateways
	}
	return nil
}

// selfChanged follows a change of the own registration: what was refused may be
// taken now, and exports may name other gateways.
func (a *Agent) selfChanged() {
	a.report.resend()
	raise(a.reread)
}

// open lets the proxies be told, once the agent knows enough: what a proxy
// still has from before counts for more than what an agent without a memory
// does not know yet. That is a full set of the controller's, and the own
// services with the outcomes of their checks, unless there are none.
func (a *Agent) open() {
	sure, full := a.offering.known()
	synced, stored := a.mesh.known()
	if sure && synced && (full || !stored) {
		a.driver.open()
	}
}

// reportDone follows the controller's answer to a report: records that it
// refused become findings, those that it took do no more.
func (a *Agent) reportDone(keys []string, refused []*federationv1.Finding) {
	done := make(map[string]bool, len(keys))
	for _, key := range keys {
		// A finding or readiness that was taken says nothing about its subject.
		if k, err := federationv1.ParseKey(key); err == nil && k.Kind != federationv1.KindFinding && k.Kind != federationv1.KindReadiness {
			done[subjectName(k)] = true
		}
	}
	kept := slices.DeleteFunc(a.findings.of("refused"), func(f federation.Finding) bool { return done[f.Subject.Name] })
	for _, m := range refused {
		a.metrics.refused.Inc()
		f, err := m.Decode()
		if err != nil {
			a.log.Warn("the controller refused a record, for a reason that this version cannot read", "error", err)
			continue
		}
		kept = append(kept, f)
	}
	// An export that is refused has its readiness refused as well: the cause is
	// told, not that.
	caused := make(map[string]bool)
	for _, f := range kept {
		if f.Code != federation.CodeRecordRefused {
			caused[f.Subject.Name] = true
		}
	}
	kept = slices.DeleteFunc(kept, func(f federation.Finding) bool {
		return f.Code == federation.CodeRecordRefused && caused[f.Subject.Name]
	})
	a.findings.set("refused", kept)
}

// subjectName is the name of the subject of findings about a record.
func subjectName(k federationv1.Key) string {
	if k.Kind == federationv1.KindPolicy {
		return k.Policy.Origin + "/" + k.Policy.String()
	}
	return k.Export().String()
}

// unresolved keeps gateways' host names that do not resolve as findings.
func (a *Agent) unresolved(names map[string]string) {
	var list []federation.Finding
	for name, why := range names {
		list = append(list, federation.NewFinding(federation.CodeGatewayUnresolved,
			federation.Ref{Kind: "gateway", Name: name}, "%s: its last good addresses stay in use", why))
	}
	a.findings.set("names", list)
}
