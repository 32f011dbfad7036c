package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// Agent is one cluster's part of the control plane. Make it with New, run it
// with Run, once.
type Agent struct {
	config  Config
	clock   clock.Clock
	log     *slog.Logger
	metrics *metrics

	lock  *os.File // of the state folder
	ready chan struct{}

	// Made by start, in this order, before anything runs.
	who      *who
	denials  *identity.Denials
	verifier *identity.Verifier
	mesh     *mesh
	report   *reporter
	findings *findings
	hosts    *hosts
	checker  *checker[endpointKey]
	source   *source // the source's goroutine's alone after start
	offering *offering
	proxies  *proxies
	xds      *xds.Server
	driver   *driver
	link     *link
	listens  []listening
	dnsUDP   net.PacketConn
	dnsTCP   net.Listener
	xdsAddr  net.Addr

	inForce   atomic.Pointer[scene] // what the proxies were told last
	documents atomic.Pointer[[]savedDocument]

	answered chan struct{} // room for one: a proxy answered
	reread   chan struct{} // room for one: the source is to be read again

	saved [sha256.Size]byte // of the last good state as it is on disk; the persister's

	mu     sync.Mutex
	probed map[federation.ClusterID]federation.Probe
}

// New checks the configuration and takes the state folder. It starts nothing.
func New(c Config) (*Agent, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	lock, err := lockDir(c.StateDir)
	if err != nil {
		return nil, err
	}
	return &Agent{
		config:   c,
		clock:    c.Clock,
		log:      c.Log,
		metrics:  newMetrics(c.Metrics),
		lock:     lock,
		ready:    make(chan struct{}),
		answered: make(chan struct{}, 1),
		reread:   make(chan struct{}, 1),
	}, nil
}

// Ready is closed when the agent has an identity and serves its proxies.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// DNSAddr is where DNS is served, once Ready; nil if nowhere.
func (a *Agent) DNSAddr() net.Addr {
	if a.dnsUDP == nil {
		return nil
	}
	return a.dnsUDP.LocalAddr()
}

// XDSAddr is where proxies come by mutual TLS, once Ready; nil if nowhere.
func (a *Agent) XDSAddr() net.Addr { return a.xdsAddr }

// Cluster is the agent's own, once Ready.
func (a *Agent) Cluster() federation.ClusterID { return a.who.Cluster }

// Findings are what is wrong here at present, once Ready.
func (a *Agent) Findings() []federation.Finding { return a.findings.all() }

// Run serves until ctx ends, then puts the state on disk and returns nil. It
// returns earlier with an error where waiting would mend nothing.
func (a *Agent) Run(ctx context.Context) error {
	defer a.lock.Close()
	var err error
	if a.who, err = a.identify(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if err := a.start(ctx); err != nil {
		return err
	}
	defer a.closeListeners()
	close(a.ready)

	// The state is written when everything that changes it has ended.
	g, run := errgroup.WithContext(ctx)
	g.Go(named(run, "identity", a.who.source.Run))
	g.Go(named(run, "source", a.runSource))
	g.Go(named(run, "checks", a.runSettle))
	g.Go(named(run, "plans", a.driver.run))
	g.Go(named(run, "answers", a.runAnswers))
	g.Go(named(run, "names", a.hosts.run))
	g.Go(named(run, "sync", a.link.run))
	for _, l := range a.listens {
		g.Go(named(run, l.name, l.serve))
	}
	if a.dnsUDP != nil {
		g.Go(named(run, "dns", func(ctx context.Context) error { return serveDNS(ctx, a.mesh, a.dnsUDP, a.dnsTCP) }))
	}
	saved := make(chan struct{})
	saving, stop := context.WithCancel(context.WithoutCancel(ctx))
	persist := persister{clock: a.clock, dirty: a.mesh.dirty, save: a.save, failing: a.saveFailing}
	go func() { defer close(saved); persist.run(saving) }()

	err = g.Wait()
	a.checker.wait()
	stop()
	<-saved
	return err
}

// named runs one part of the agent and names it in its error.
func named(ctx context.Context, name string, run func(context.Context) error) func() error {
	return func() error {
		if err := run(ctx); err != nil && ctx.Err() == nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
}

// start makes the parts, puts the last good state in place and carries it out,
// and binds every listener: what is wrong with the configuration shows before
// the agent is ready.
func (a *Agent) start(ctx context.Context) error {
	a.log = a.log.With("cluster", string(a.who.Cluster))
	a.denials = new(identity.Denials)
	a.verifier = identity.NewVerifier(identity.VerifierConfig{
		Clock: a.clock, Mesh: a.who.source, Denials: a.denials, Metrics: a.config.Metrics,
	})
	a.report = newReporter()
	a.findings = newFindings(a.clock, a.log, a.who.Cluster, a.report, a.metrics)
	a.mesh = newMesh(a.who.TrustDomain, a.who.Cluster, a.log)
	a.mesh.selfChanged, a.mesh.onFull = a.selfChanged, a.open
	a.report.setThresholds(a.mesh.thresholds)
	a.hosts = newHosts(a.clock, lookupIP, a.mesh.touchAll)
	a.hosts.failing = a.unresolved
	a.offering = newOffering(a.who.Cluster, a.log, a.mesh, a.report, a.findings, a.metrics)
	a.offering.settled = a.open
	a.checker = newChecker(a.clock, a.offering.checked)
	a.source = newSource(a.who.source.ID().TrustDomain(), a.who.Cluster)
	a.proxies = newProxies(a.clock, a.metrics)
	a.proxies.believe = a.believed
	a.link = a.newLink()
	a.proxies.changed = a.proxiesChanged
	if err := a.newDriver(); err != nil {
		return err
	}
	a.restore()
	if a.who.member != nil {
		a.mesh.add(&federationv1.Record{
			Key:  federationv1.MemberKey(a.who.Cluster).String(),
			Body: &federationv1.Record_Member{Member: a.who.member},
		})
	}
	a.driver.step()
	return a.listen(ctx)
}

// lookupIP asks the machine's resolver.
func lookupIP(ctx context.Context, host string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// restore puts the last good state in place, if there is one.
func (a *Agent) restore() {
	l, err := loadLastGood(a.config.StateDir, a.who.TrustDomain, a.who.Cluster, a.clock.Now())
	if err != nil {
		a.findings.set("last-good", []federation.Finding{federation.NewFinding(federation.CodeLastGoodUnusable,
			federation.Ref{Kind: "cluster", Name: string(a.who.Cluster)}, "%v", err)})
	}
	if l == nil {
		return
	}
	a.hosts.restore(l.Resolved)
	a.mesh.restore(l.Records, l.Revision)
	a.documents.Store(&l.Documents)
	a.source.restore(l.Documents)
	if len(l.Documents) > 0 {
		services := a.source.services()
		for id, svc := range services {
			services[id] = svc.behind(a.gatewayAddresses())
		}
		a.mesh.setOwn(services, a.source.policies())
	}
	a.driver.open()
	a.log.Info("starting from the last good state", "revision", l.Revision.String(),
		"records", len(l.Records), "ownServices", len(a.source.objects))
}

// save writes the last good state.
func (a *Agent) save() error {
	l := &lastGood{TrustDomain: a.who.TrustDomain, Cluster: a.who.Cluster, Resolved: a.hosts.snapshot()}
	l.Records, l.Revision = a.mesh.snapshot()
	if d := a.documents.Load(); d != nil {
		l.Documents = *d
	}
	a.metrics.records.Set(float64(len(l.Records)))
	b, err := l.encode()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	if sum == a.saved {
		return nil
	}
	if err := writeFile(filepath.Join(a.config.StateDir, lastGoodName), b); err != nil {
		return err
	}
	a.saved = sum
	a.metrics.saves.WithLabelValues("written").Inc()
	return nil
}

// saveFailing keeps a failure to write the state as a finding.
func (a *Agent) saveFailing(err error) {
	if err == nil {
		a.findings.set("save", nil)
		return
	}
	a.metrics.saves.WithLabelValues("failed").Inc()
	a.findings.set("save", []federation.Finding{federation.NewFinding(federation.CodeLastGoodNotSaved,
		federation.Ref{Kind: "cluster", Name: string(a.who.Cluster)}, "%v", err)})
}

// newLink makes the way to the controllers.
func (a *Agent) newLink() *link {
	creds := controllerCredentials(a.verifier, a.who.source)
	l := &link{
		clock: a.clock, log: a.log, metrics: a.metrics,
		controllers: a.controllers,
		version:     a.config.Version,
		mesh:        a.mesh, report: a.report,
		status: a.status, answer: a.answer, done: a.reportDone,
		connected:   a.renewIfLate,
		statusDirty: make(chan struct{}, 1),
	}
	l.instance = instanceName(a.clock.Now())
	l.dial = func(address string) (*grpc.ClientConn, error) { return dialController(address, creds) }
	return l
}

// instanceName tells two agents of one cluster apart.
func instanceName(now time.Time) string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s-%d-%x", host, os.Getpid(), now.UnixNano())
}

// renewIfLate asks for a renewal that the controller's absence has delayed.
func (a *Agent) renewIfLate() {
	svid, err := a.who.source.GetX509SVID()
	if err != nil {
		return
	}
	leaf := svid.Certificates[0]
	if half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2); a.clock.Now().After(half) {
		a.who.source.RenewNow()
	}
}
