package controller

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/access"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

func TestMain(m *testing.M) {
	code := m.Run()
	etcd.close()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// etcd is one server for all tests of this package; every test has a trust
// domain, and so a part of it, of its own.
var etcd sharedEtcd

// sharedEtcd is a store's embedded server, reached by others over TCP.
type sharedEtcd struct {
	once  sync.Once
	dir   string
	store *store.Store
	relay *relayTo
	err   error
}

func (e *sharedEtcd) endpoint(t testing.TB) string {
	t.Helper()
	e.once.Do(func() {
		if e.dir, e.err = os.MkdirTemp("", "weft-ctl-"); e.err != nil {
			return
		}
		e.store, e.err = store.Open(context.Background(), store.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("etcd.test"), Dir: e.dir, NoFsyncForTests: true,
		})
		if e.err != nil {
			return
		}
		e.relay, e.err = relayToSocket(filepath.Join(e.dir, "client.sock"))
	})
	if e.err != nil {
		t.Fatal(e.err)
	}
	return "http://" + e.relay.addr()
}

func (e *sharedEtcd) close() {
	if e.relay != nil {
		e.relay.close()
	}
	if e.store != nil {
		e.store.Close()
	}
	if e.dir != "" {
		os.RemoveAll(e.dir)
	}
}

// relayTo passes TCP connections on.
type relayTo struct {
	ln            net.Listener
	network, peer string
	mu            sync.Mutex
	open          map[net.Conn]bool
	done          sync.WaitGroup
}

func relayToSocket(path string) (*relayTo, error) { return newRelayTo("unix", path) }

func newRelayTo(network, peer string) (*relayTo, error) {
	return newRelayAt("127.0.0.1:0", network, peer)
}

func newRelayAt(addr, network, peer string) (*relayTo, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	r := &relayTo{ln: ln, network: network, peer: peer, open: map[net.Conn]bool{}}
	r.done.Go(r.run)
	return r, nil
}

func (r *relayTo) addr() string { return r.ln.Addr().String() }

func (r *relayTo) run() {
	for {
		conn, err := r.ln.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial(r.network, r.peer)
		if err != nil {
			conn.Close()
			continue
		}
		for _, way := range [][2]net.Conn{{conn, far}, {far, conn}} {
			r.mu.Lock()
			r.open[way[0]] = true
			r.mu.Unlock()
			r.done.Go(func() {
				_, _ = io.Copy(way[0], way[1])
				conn.Close()
				far.Close()
				r.mu.Lock()
				delete(r.open, way[0])
				r.mu.Unlock()
			})
		}
	}
}

func (r *relayTo) close() {
	r.ln.Close()
	r.mu.Lock()
	for c := range r.open {
		c.Close()
	}
	r.mu.Unlock()
	r.done.Wait()
}

// testMesh is a mesh of one test: its trust domain, keys and controllers.
type testMesh struct {
	t     testing.TB
	td    spiffeid.TrustDomain
	dir   string
	clock clock.Clock
	kek   string
	admin string
}

var meshes struct {
	sync.Mutex
	n int
}

func newTestMesh(t testing.TB, clk clock.Clock) *testMesh {
	meshes.Lock()
	meshes.n++
	n := meshes.n
	meshes.Unlock()
	dir := t.TempDir()
	return &testMesh{
		t: t, td: spiffeid.RequireTrustDomainFromString(fmt.Sprintf("m%d.test", n)), dir: dir, clock: clk,
		kek: filepath.Join(dir, "kek"), admin: filepath.Join(dir, "weft.yaml"),
	}
}

// config is a controller's of the mesh, over the shared etcd.
func (m *testMesh) config(name string) Config {
	m.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	return Config{
		Name: name, TrustDomain: m.td, Listener: ln,
		Store:   store.Config{Endpoints: []string{etcd.endpoint(m.t)}, ElectionTTL: 3 * time.Second, PresenceTTL: 3 * time.Second},
		KEKFile: m.kek, AdminCredential: m.admin, Clock: m.clock, Version: "test",
		Log: slog.New(slog.NewTextHandler(m.t.Output(), nil)).With("controller", name), Metrics: prometheus.NewRegistry(),
	}
}

func (m *testMesh) start(name string) *Started {
	m.t.Helper()
	return m.startWith(m.config(name))
}

// shortLifetimes make whole lives pass in seconds on a clock that runs 40 times
// as fast as the machine's.
func shortLifetimes() identity.Lifetimes {
	return identity.Lifetimes{
		Root: 24 * time.Hour, Region: 2 * time.Minute, Leaf: 20 * time.Second,
		Operators: 24 * time.Hour, Operator: time.Hour, Backdate: time.Second,
	}
}

// startWith is start of a configuration.
func (m *testMesh) startWith(cfg Config) *Started {
	m.t.Helper()
	s, err := Start(timeout(m.t), cfg)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			m.t.Errorf("controller %s: %v", cfg.Name, err)
		}
	})
	return s
}

func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a state.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it did not come to that: %s", what)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// credential is a chain and key as a client shows it, and the roots that it
// trusts.
type credential struct {
	svid   *x509svid.SVID
	bundle *identity.Bundle
}

func (m *testMesh) dial(c *credential, addr string) *grpc.ClientConn {
	m.t.Helper()
	v := identity.NewVerifier(identity.VerifierConfig{Clock: m.clock, Mesh: c.bundle})
	cfg := identity.ClientConfig{Authorize: identity.AllowRole(identity.RoleController), NextProtos: []string{"h2"}}
	if c.svid != nil {
		cfg.SVID = c.svid
	}
	return m.dialTLS(v.Client(cfg), addr)
}

func (m *testMesh) dialTLS(cfg *tls.Config, addr string) *grpc.ClientConn {
	m.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return conn
}

// adminCredential is the one that the first start wrote.
func (m *testMesh) adminCredential() *credential {
	m.t.Helper()
	file := must(access.Load(m.admin))(m.t)
	ctx := must(file.Context(""))(m.t)
	chain := must(identity.DecodePEM([]byte(ctx.Certificate)))(m.t)
	block, _ := pem.Decode([]byte(ctx.Key))
	key := must(x509.ParsePKCS8PrivateKey(block.Bytes))(m.t)
	return &credential{
		svid:   &x509svid.SVID{ID: must(x509svid.IDFromCert(chain[0]))(m.t), Certificates: chain, PrivateKey: key.(*ecdsa.PrivateKey)},
		bundle: must(identity.ParseBundlePEM(m.td, 1, []byte(ctx.CA)))(m.t),
	}
}

func (m *testMesh) adminClient(c *Started) federationv1.AdminClient {
	return federationv1.NewAdminClient(m.dial(m.adminCredential(), c.Address()))
}

// operator is a person with a role, made as an admin's tools would.
func (m *testMesh) operator(c *Started, name string, r role) *credential {
	m.t.Helper()
	ctx := timeout(m.t)
	key := must(identity.NewKey())(m.t)
	csr := must(identity.NewCSR(key))(m.t)
	who := must(identity.AdmitOperator(m.td, name, csr))(m.t)
	chain := must(c.trust.sign(ctx, who, 0, "test"))(m.t)
	if r != 0 {
		if err := c.store.PutOperator(ctx, name, r.String()); err != nil {
			m.t.Fatal(err)
		}
	}
	return &credential{svid: &x509svid.SVID{ID: who.ID, Certificates: chain, PrivateKey: key}, bundle: c.source.Bundle()}
}

// member is a registration for tests.
func member(cluster string) *federationv1.Member {
	return &federationv1.Member{
		Cluster: cluster, Region: "eu", Zone: "eu-a", Network: "lan", Grants: []string{"shop/*"},
		Gateways: []*federationv1.Address{{Host: "192.0.2.1", Port: 15443}}, Vips: "240.0.1.0/24",
	}
}

// register registers a cluster and returns its token.
func (m *testMesh) register(c *Started, cluster string) *federationv1.JoinToken {
	m.t.Helper()
	resp, err := m.adminClient(c).RegisterCluster(timeout(m.t), &federationv1.RegisterClusterRequest{Member: member(cluster)})
	if err != nil {
		m.t.Fatal(err)
	}
	return resp.GetToken()
}

// redeem shows a token with a CSR.
func (m *testMesh) redeem(addr string, token *federationv1.JoinToken, csr []byte) (*federationv1.EnrollResponse, error) {
	m.t.Helper()
	pin := must(identity.ParsePin(token.GetCaHash()))(m.t)
	conn := m.dialTLS(identity.PinnedClient(pin, m.clock, nil, "h2"), addr)
	defer conn.Close()
	return federationv1.NewEnrollClient(conn).Enroll(timeout(m.t), &federationv1.EnrollRequest{
		Token: token.GetToken(), Csr: csr, AgentVersion: "test",
	})
}

// enroll redeems a token for a key.
func (m *testMesh) enroll(addr string, token *federationv1.JoinToken, key *ecdsa.PrivateKey) (*credential, *federationv1.EnrollResponse, error) {
	m.t.Helper()
	resp, err := m.redeem(addr, token, must(identity.NewCSR(key))(m.t))
	if err != nil {
		return nil, nil, err
	}
	return &credential{svid: svidOf(m.t, resp.GetChain(), key), bundle: bundleOf(m.t, m.td, resp.GetBundle())}, resp, nil
}

func svidOf(t testing.TB, chain *federationv1.Chain, key *ecdsa.PrivateKey) *x509svid.SVID {
	t.Helper()
	certs := must(identity.ParseRawChain(chain.GetCertificates()))(t)
	return &x509svid.SVID{ID: spiffeid.RequireFromString(chain.GetSpiffeId()), Certificates: certs, PrivateKey: key}
}

func bundleOf(t testing.TB, td spiffeid.TrustDomain, b *federationv1.Bundle) *identity.Bundle {
	t.Helper()
	roots := must(identity.ParseRawChain(b.GetRoots()))(t)
	return must(identity.NewBundle(td, b.GetSequence(), roots))(t)
}

// join registers and enrols a cluster.
func (m *testMesh) join(c *Started, cluster string) *credential {
	m.t.Helper()
	cred, _, err := m.enroll(c.Address(), m.register(c, cluster), must(identity.NewKey())(m.t))
	if err != nil {
		m.t.Fatal(err)
	}
	return cred
}

// ghost is the agent of a cluster that was never registered, with a certificate
// that is good all the same: as after a restore from an old backup.
func (m *testMesh) ghost(c *Started, like *credential, cluster federation.ClusterID) *credential {
	m.t.Helper()
	id := must(identity.AgentID(m.td, cluster))(m.t)
	key := mustKey(m.t)
	region := must(c.trust.active(c.cfg.Region))(m.t)
	chain := must(region.authority.SignLeaf(identity.Admitted{ID: id, Key: &key.PublicKey}, c.cfg.Lifetimes, m.clock.Now()))(m.t)
	return &credential{svid: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle: like.bundle}
}

// testAgent is an agent as far as a controller sees it: it keeps what it is
// sent.
type testAgent struct {
	t       testing.TB
	stream  federationv1.Sync_SyncClient
	cancel  context.CancelFunc
	welcome *federationv1.Welcome
	// answer answers questions; nil leaves them.
	answer func(*federationv1.Question) *federationv1.Answer

	sending sync.Mutex
	mu      sync.Mutex
	have    map[string]*federationv1.Record
	full    bool
	rev     federation.Revision
	results []*federationv1.ReportResult
	err     error
	changed chan struct{}
	seq     uint64
}

// connect opens an agent's stream and reads it until it ends. before is what
// the agent had, nil for nothing.
func (m *testMesh) connect(cred *credential, addr string, before *testAgent) (*testAgent, error) {
	m.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	m.t.Cleanup(cancel)
	stream, err := federationv1.NewSyncClient(m.dial(cred, addr)).Sync(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	a := &testAgent{t: m.t, stream: stream, cancel: cancel, have: map[string]*federationv1.Record{}, changed: make(chan struct{})}
	hello := &federationv1.Hello{AgentVersion: "test", Instance: "agent-1"}
	if before != nil {
		var s federationv1.Sums
		before.mu.Lock()
		for key, r := range before.have {
			a.have[key] = r
			s.Add(key, must(r.Value())(m.t))
		}
		hello.Have = federationv1.EncodeRevision(before.rev)
		before.mu.Unlock()
		hello.Digest = s.Encode()
	}
	if err := stream.Send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Hello{Hello: hello}}); err != nil {
		_, err = stream.Recv()
		cancel()
		return nil, err
	}
	first, err := stream.Recv()
	if err != nil {
		cancel()
		return nil, err
	}
	if a.welcome = first.GetWelcome(); a.welcome == nil {
		m.t.Fatalf("the first message is %v", first)
	}
	go a.read()
	return a, nil
}

// connectWith is connect for an agent that answers questions.
func (m *testMesh) connectWith(cred *credential, addr string, answer func(*federationv1.Question) *federationv1.Answer) (*testAgent, error) {
	m.t.Helper()
	a, err := m.connect(cred, addr, nil)
	if err == nil {
		a.mu.Lock()
		a.answer = answer
		a.mu.Unlock()
	}
	return a, err
}

func mustKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	return must(identity.NewKey())(t)
}

func (m *testMesh) mustConnect(cred *credential, addr string, before *testAgent) *testAgent {
	m.t.Helper()
	a, err := m.connect(cred, addr, before)
	if err != nil {
		m.t.Fatal(err)
	}
	return a
}

func (a *testAgent) read() {
	puts := map[string]bool{}
	for {
		msg, err := a.stream.Recv()
		a.mu.Lock()
		if err != nil {
			a.err = err
		}
		if u := msg.GetUpdate(); u != nil {
			for _, r := range u.GetPuts() {
				a.have[r.GetKey()] = r
				puts[r.GetKey()] = true
			}
			for _, key := range u.GetDeletes() {
				delete(a.have, key)
			}
			if u.GetRevision() != nil {
				a.rev, _ = u.GetRevision().Decode()
			}
			if u.GetFull() && !a.full {
				a.full = true
				for key := range a.have {
					for _, b := range a.welcome.GetDiffering() {
						if federationv1.Bucket(key) == b && !puts[key] {
							delete(a.have, key)
						}
					}
				}
			}
		}
		if r := msg.GetReportResult(); r != nil {
			a.results = append(a.results, r)
		}
		q, reply := msg.GetQuestion(), a.answer
		close(a.changed)
		a.changed = make(chan struct{})
		a.mu.Unlock()
		if err != nil {
			return
		}
		if q != nil && reply != nil {
			answer := reply(q)
			answer.Id = q.GetId()
			a.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Answer{Answer: answer}})
		}
	}
}

func (a *testAgent) send(m *federationv1.SyncRequest) {
	a.sending.Lock()
	defer a.sending.Unlock()
	if err := a.stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
		a.t.Errorf("send: %v", err)
	}
}

// until waits until is holds for the agent.
func (a *testAgent) until(what string, is func() bool) {
	a.t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		a.mu.Lock()
		ok, changed := is(), a.changed
		a.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			a.mu.Lock()
			defer a.mu.Unlock()
			a.t.Fatalf("it did not come to that: %s; the agent has %d records at %v, error %v", what, len(a.have), a.rev, a.err)
		}
	}
}

// report sends a report and waits for its result.
func (a *testAgent) report(r *federationv1.Report) *federationv1.ReportResult {
	a.t.Helper()
	a.mu.Lock()
	a.seq++
	r.Sequence = a.seq
	n := len(a.results)
	a.mu.Unlock()
	a.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Report{Report: r}})
	a.until("a report's result", func() bool { return len(a.results) > n || a.err != nil })
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		a.t.Fatalf("the stream ended: %v", a.err)
	}
	got := a.results[n]
	if got.GetSequence() != r.Sequence {
		a.t.Fatalf("result of report %d, want %d", got.GetSequence(), r.Sequence)
	}
	return got
}

// reportFull reports a full set of one message.
func (a *testAgent) reportFull(records ...*federationv1.Record) *federationv1.ReportResult {
	a.t.Helper()
	return a.report(&federationv1.Report{FullBegin: true, FullEnd: true, Puts: records})
}

// ended waits for the stream's end and returns why it ended.
func (a *testAgent) ended() error {
	a.t.Helper()
	a.until("the end of the stream", func() bool { return a.err != nil })
	return a.err
}

// isOver reports whether the stream has ended.
func (a *testAgent) isOver() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err != nil
}

// tryReport reports a full set, and says whether it was stored.
func (a *testAgent) tryReport(records ...*federationv1.Record) bool {
	a.mu.Lock()
	n := len(a.results)
	a.mu.Unlock()
	a.send(&federationv1.SyncRequest{Message: &federationv1.SyncRequest_Report{Report: &federationv1.Report{FullBegin: true, FullEnd: true, Puts: records}}})
	a.until("a result, or the end", func() bool { return len(a.results) > n || a.err != nil })
	return !a.isOver()
}

func (a *testAgent) isFull() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.full
}

func (a *testAgent) hold(key string) *federationv1.Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.have[key]
}

// offer is an export of shop/name with its readiness.
func offer(cluster federation.ClusterID, name string, ready int) []*federationv1.Record {
	e := testExport(cluster, name)
	return []*federationv1.Record{
		federationv1.ExportRecord(e), federationv1.ReadinessRecord(e.ID(), federation.Readiness{Ready: ready, Total: 2}),
	}
}
