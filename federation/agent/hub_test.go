package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

var td = spiffeid.RequireTrustDomainFromString("weft.test")

// hub is a controller of one cluster's size: the real protocol and real TLS
// over a store that is a map, with every fault at hand.
type hub struct {
	federationv1.UnimplementedEnrollServer
	federationv1.UnimplementedIssueServer
	federationv1.UnimplementedSyncServer

	t        *testing.T
	cluster  federation.ClusterID
	address  string
	root     *identity.Authority
	region   *identity.Authority
	bundle   *identity.Bundle
	verifier *identity.Verifier
	leaf     leafSource
	now      clock.Clock
	token    identity.JoinToken
	server   *grpc.Server
	tasks    sync.WaitGroup

	mu          sync.Mutex
	incarnation string
	number      int64
	records     map[string]*federationv1.Record
	reports     []*federationv1.Report
	statuses    []*federationv1.Status
	enrolments  int
	holdFull    bool // sessions get no full marker
	streams     map[*hubStream]bool
	answers     chan *federationv1.Answer
	intercept   func(csr []byte) error // of an enrolment
	refuse      func(*federationv1.Record) *federationv1.Finding
	set         map[string]bool // keys of the full report under way
}

type hubStream struct {
	updates chan *federationv1.Update
	ask     chan *federationv1.Question
	end     chan struct{}
}

type leafSource struct{ svid *x509svid.SVID }

func (l leafSource) GetX509SVID() (*x509svid.SVID, error) { return l.svid, nil }

func newHub(t *testing.T, cluster federation.ClusterID) *hub {
	t.Helper()
	now := time.Now()
	life := identity.DefaultLifetimes()
	h := &hub{
		t: t, cluster: cluster, incarnation: "first", number: 10,
		now: clock.Real(), records: make(map[string]*federationv1.Record),
		streams: make(map[*hubStream]bool),
		answers: make(chan *federationv1.Answer, 16),
	}
	var err error
	check := func() {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h.root, err = identity.NewRoot(td, life, now)
	check()
	h.region, err = h.root.NewRegion("eu", life, now)
	check()
	h.bundle, err = identity.NewBundle(td, 1, []*x509.Certificate{h.root.Certificate()})
	check()
	h.verifier = identity.NewVerifier(identity.VerifierConfig{Clock: clock.Real(), Mesh: h.bundle, Metrics: prometheus.NewRegistry()})
	id, err := identity.ControllerID(td, "one")
	check()
	h.leaf = leafSource{h.svid(id)}
	h.token, err = identity.NewJoinToken(cluster)
	check()
	h.records["bundle"] = federationv1.BundleRecord(federation.Bundle{
		TrustDomain: td, Sequence: 1, Roots: [][]byte{h.root.Certificate().Raw},
	})
	h.records[federationv1.MemberKey(cluster).String()] = federationv1.MemberRecord(member(cluster, "10.0.0.1:15443"))
	h.listen("127.0.0.1:0")
	t.Cleanup(h.stop)
	return h
}

func member(c federation.ClusterID, gateway string) federation.Member {
	m := federation.Member{
		Cluster: c, Region: "eu", Zone: "eu-a", Generation: 1, State: federation.MemberActive,
		Grants: []federation.Grant{{Namespace: "*", Name: "*"}},
		VIPs:   netip.MustParsePrefix("127.9.0.0/16"),
	}
	if a, err := federation.ParseAddress(gateway); err == nil {
		m.Gateways = []federation.Address{a}
	}
	return m
}

// svid is a leaf of the mesh for id.
func (h *hub) svid(id spiffeid.ID) *x509svid.SVID {
	h.t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		h.t.Fatal(err)
	}
	chain, err := h.region.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, identity.DefaultLifetimes(), h.now.Now())
	if err != nil {
		h.t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

// clock gives the controller another time.
func (h *hub) clock(c clock.Clock) {
	h.now = c
	h.verifier = identity.NewVerifier(identity.VerifierConfig{Clock: c, Mesh: h.bundle, Metrics: prometheus.NewRegistry()})
	h.leaf = leafSource{h.svid(h.leaf.svid.ID)}
}

// Renew signs for an agent whose SVID has expired.
func (h *hub) Renew(_ context.Context, r *federationv1.RenewRequest) (*federationv1.RenewResponse, error) {
	peer, err := h.verifier.VerifyProof(identity.RenewalProof{Chain: r.GetChain(), Signature: r.GetSignature()}, r.GetCsr())
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	chain, err := h.sign(identity.PeerAsks(peer), peer.ID, r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &federationv1.RenewResponse{Chain: chain, Bundle: h.bundleMessage()}, nil
}

// listen serves at address, where port 0 is any free one.
func (h *hub) listen(address string) {
	h.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		h.t.Fatal(err)
	}
	h.address = l.Addr().String()
	h.server = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(h.verifier.Server(identity.ServerConfig{
			SVID: h.leaf, Anonymous: true, SendRoot: true, Authorize: identity.AllowRole(identity.RoleAgent),
		}))),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)
	federationv1.RegisterEnrollServer(h.server, h)
	federationv1.RegisterIssueServer(h.server, h)
	federationv1.RegisterSyncServer(h.server, h)
	server := h.server
	h.tasks.Go(func() { _ = server.Serve(l) })
}

// stop kills the controller: every connection breaks.
func (h *hub) stop() {
	h.server.Stop()
	h.tasks.Wait()
}

func (h *hub) restart() { h.listen(h.address) }

func (h *hub) Enroll(_ context.Context, r *federationv1.EnrollRequest) (*federationv1.EnrollResponse, error) {
	if r.GetToken() != h.token.Reveal() {
		return nil, status.Error(codes.PermissionDenied, "the join token is not valid")
	}
	h.mu.Lock()
	h.enrolments++
	var lost error
	if h.intercept != nil {
		lost = h.intercept(r.GetCsr())
	}
	h.mu.Unlock()
	if lost != nil {
		return nil, lost
	}
	chain, err := h.sign(identity.TokenAsks(h.cluster), spiffeid.ID{}, r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &federationv1.EnrollResponse{
		TrustDomain: td.Name(), Cluster: string(h.cluster), Chain: chain, Bundle: h.bundleMessage(),
		Member:      federationv1.EncodeMember(member(h.cluster, "10.0.0.1:15443")),
		Controllers: []string{h.address},
	}, nil
}

func (h *hub) bundleMessage() *federationv1.Bundle {
	return &federationv1.Bundle{TrustDomain: td.Name(), Sequence: 1, Roots: [][]byte{h.root.Certificate().Raw}}
}

func (h *hub) sign(asker identity.Asker, want spiffeid.ID, csr []byte) (*federationv1.Chain, error) {
	who, err := identity.Admit(td, asker, want, csr)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	certs, err := h.region.SignLeaf(who, identity.DefaultLifetimes(), h.now.Now())
	if err != nil {
		return nil, err
	}
	return &federationv1.Chain{SpiffeId: who.ID.String(), Certificates: identity.RawChain(certs)}, nil
}

func (h *hub) Issue(ctx context.Context, r *federationv1.IssueRequest) (*federationv1.IssueResponse, error) {
	agentID, _ := identity.AgentID(td, h.cluster)
	want, err := spiffeid.FromString(r.GetSpiffeId())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	chain, err := h.sign(identity.PeerAsks(identity.Peer{Subject: identity.Subject{ID: agentID, Role: identity.RoleAgent, Cluster: h.cluster}}), want, r.GetCsr())
	if err != nil {
		return nil, err
	}
	return &federationv1.IssueResponse{Chain: chain, Bundle: h.bundleMessage()}, nil
}

func (h *hub) Sync(stream federationv1.Sync_SyncServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "no hello")
	}
	have, err := hello.GetDigest().Decode()
	if err != nil {
		return err
	}
	s := &hubStream{updates: make(chan *federationv1.Update, 1024), ask: make(chan *federationv1.Question, 16), end: make(chan struct{})}
	h.mu.Lock()
	var mine, own federationv1.Sums
	for key, r := range h.records {
		value, _ := r.Value()
		mine.Add(key, value)
		if k, err := federationv1.ParseKey(key); err == nil && k.Cluster == h.cluster &&
			(k.Kind == federationv1.KindExport || k.Kind == federationv1.KindReadiness) {
			if e := r.GetExport(); e != nil {
				r = proto.CloneOf(r)
				r.GetExport().Accepted = 0
				value, _ = r.Value()
			}
			own.Add(key, value)
		}
	}
	differing := mine.Differing(have)
	full := &federationv1.Update{Revision: h.revision(), Full: !h.holdFull}
	for _, key := range slices.Sorted(maps.Keys(h.records)) {
		if slices.Contains(differing, federationv1.Bucket(key)) {
			full.Puts = append(full.Puts, h.records[key])
		}
	}
	h.streams[s] = true
	h.set = nil
	welcome := &federationv1.Welcome{
		TrustDomain: td.Name(), Revision: h.revision(), Epoch: h.number, Differing: differing, Reported: own.Encode(),
	}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.streams, s)
		h.mu.Unlock()
	}()
	if err := stream.Send(&federationv1.SyncResponse{Message: &federationv1.SyncResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	if err := stream.Send(&federationv1.SyncResponse{Message: &federationv1.SyncResponse_Update{Update: full}}); err != nil {
		return err
	}
	results := make(chan *federationv1.ReportResult, 64)
	failed := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			switch m := m.GetMessage().(type) {
			case *federationv1.SyncRequest_Report:
				results <- h.take(m.Report)
			case *federationv1.SyncRequest_Status:
				h.mu.Lock()
				h.statuses = append(h.statuses, m.Status)
				h.mu.Unlock()
			case *federationv1.SyncRequest_Answer:
				h.answers <- m.Answer
			}
		}
	}()
	for {
		var m *federationv1.SyncResponse
		select {
		case u := <-s.updates:
			m = &federationv1.SyncResponse{Message: &federationv1.SyncResponse_Update{Update: u}}
		case r := <-results:
			m = &federationv1.SyncResponse{Message: &federationv1.SyncResponse_ReportResult{ReportResult: r}}
		case q := <-s.ask:
			m = &federationv1.SyncResponse{Message: &federationv1.SyncResponse_Question{Question: q}}
		case <-s.end:
			return status.Error(codes.Unavailable, "cut")
		case err := <-failed:
			return err
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
}

// take stores a report as a controller does.
func (h *hub) take(r *federationv1.Report) *federationv1.ReportResult {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reports = append(h.reports, r)
	result := &federationv1.ReportResult{Sequence: r.GetSequence(), Revision: h.revision()}
	u := &federationv1.Update{}
	if r.GetFullBegin() {
		h.set = make(map[string]bool)
	}
	for _, put := range r.GetPuts() {
		if h.set != nil {
			h.set[put.GetKey()] = true
		}
		if h.refuse != nil {
			if f := h.refuse(put); f != nil {
				result.Refused = append(result.Refused, f)
				continue
			}
		}
		put = proto.CloneOf(put)
		if e := put.GetExport(); e != nil {
			e.Accepted = h.number
			if old := h.records[put.GetKey()].GetExport(); old != nil {
				e.Accepted = old.GetAccepted()
			}
		}
		h.records[put.GetKey()] = put
		u.Puts = append(u.Puts, put)
	}
	for _, key := range r.GetDeletes() {
		delete(h.records, key)
		u.Deletes = append(u.Deletes, key)
	}
	if r.GetFullEnd() {
		for key := range h.records {
			k, err := federationv1.ParseKey(key)
			if err != nil || h.set[key] {
				continue
			}
			own := k.Cluster == h.cluster && (k.Kind == federationv1.KindExport || k.Kind == federationv1.KindReadiness || k.Kind == federationv1.KindFinding)
			if own || k.Kind == federationv1.KindPolicy && k.Policy.Origin == string(h.cluster) {
				delete(h.records, key)
				u.Deletes = append(u.Deletes, key)
			}
		}
		h.set = nil
	}
	h.push(u)
	return result
}

func (h *hub) revision() *federationv1.Revision {
	return &federationv1.Revision{Incarnation: h.incarnation, Number: h.number}
}

// push sends a change to the sessions. mu is held.
func (h *hub) push(u *federationv1.Update) {
	h.number++
	u.Revision = h.revision()
	for s := range h.streams {
		s.updates <- u
	}
}

// put stores records as if somebody else had, and sends them.
func (h *hub) put(records ...*federationv1.Record) federation.Revision {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range records {
		h.records[r.GetKey()] = r
	}
	h.push(&federationv1.Update{Puts: records})
	return federation.Revision{Incarnation: h.incarnation, Number: h.number}
}

func (h *hub) del(keys ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range keys {
		delete(h.records, k)
	}
	h.push(&federationv1.Update{Deletes: keys})
}

// cut ends every session.
func (h *hub) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.streams {
		close(s.end)
		delete(h.streams, s)
	}
}

// record is what the hub has stored under key.
func (h *hub) record(key string) *federationv1.Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.records[key]
}

func (h *hub) connected() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.streams) > 0
}

// remote adds another cluster that exports a service with a VIP here.
func (h *hub) remote(c federation.ClusterID, s federation.ServiceID, gateway, vip string, ready int) {
	m := member(c, gateway)
	e := federation.Export{
		Cluster: c, Service: s, Ports: []federation.Port{{Name: "http", Number: 80, Protocol: federation.TCP}},
		Accepted: 3, Gateways: m.Gateways,
	}
	h.put(
		federationv1.MemberRecord(m), federationv1.ExportRecord(e),
		federationv1.ReadinessRecord(e.ID(), federation.Readiness{Ready: ready, Total: ready}),
		federationv1.VIPRecord(h.cluster, s, federation.VIP{Address: netip.MustParseAddr(vip)}),
	)
}

// config is one for an agent of the hub's cluster, in a folder of its own.
func (h *hub) config(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	short, err := os.MkdirTemp("", "w") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	source := filepath.Join(dir, "services")
	if err := os.Mkdir(source, 0o700); err != nil {
		t.Fatal(err)
	}
	return Config{
		Join: h.token, CAHash: identity.PinOf(h.root.Certificate()), Controllers: []string{h.address},
		StateDir: filepath.Join(dir, "state"), Source: source,
		Sockets: []Socket{{
			Path: filepath.Join(short, "g.sock"), Identity: "gateway", Listen: netip.MustParseAddrPort("127.0.0.1:15443"),
		}},
		DNSListen: "127.0.0.1:0",
		Version:   "test", Log: testLog(t),
	}
}

func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(string(b))
	return len(b), nil
}

// running is an agent that runs.
type running struct {
	*Agent
	t    *testing.T
	stop func() error // ends it and waits
}

func start(t *testing.T, c Config) *running {
	t.Helper()
	r, err := tryStart(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tryStart(t *testing.T, c Config) (*running, error) {
	t.Helper()
	c.Metrics = prometheus.NewRegistry()
	a, err := New(c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	var result error
	go func() {
		defer close(done)
		result = a.Run(ctx)
	}()
	r := &running{Agent: a, t: t, stop: func() error {
		cancel()
		<-done
		return result
	}}
	t.Cleanup(func() { _ = r.stop() })
	select {
	case <-a.Ready():
		return r, nil
	case <-done:
		cancel()
		if result == nil {
			result = errors.New("ended")
		}
		return nil, result
	}
}

// eventually waits for a state, whatever the machine's speed.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// write puts a file into the source folder, whole at once.
func write(t *testing.T, c Config, name, text string) {
	t.Helper()
	tmp := filepath.Join(c.StateDir, ".."+name)
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(c.Source, name)); err != nil {
		t.Fatal(err)
	}
}

// serviceYAML is a service with endpoints on loopback, without checks.
func serviceYAML(name string, endpoints ...string) string {
	text := "apiVersion: weft.dev/v1\nkind: Service\nmetadata: {namespace: shop, name: " + name + "}\nspec:\n" +
		"  export: true\n  ports: [{name: http, port: 80}]\n  endpoints:\n"
	for _, e := range endpoints {
		a := netip.MustParseAddrPort(e)
		text += fmt.Sprintf("    - {address: %s, ports: {http: %d}}\n", a.Addr(), a.Port())
	}
	return text
}

var payments = federation.ServiceID{Namespace: "shop", Name: "payments"}

// metrics are some that nobody reads.
func (h *hub) metrics() *metrics { return newMetrics(h.registry()) }

func (h *hub) registry() *prometheus.Registry { return prometheus.NewRegistry() }
