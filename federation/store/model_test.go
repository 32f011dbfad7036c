package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"pgregory.net/rapid"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// TestWatchEqualsList runs random transactions, compactions, cut connections
// and restarts of etcd. A model says what must be stored; every consumer, fast,
// slow or new, must come to exactly that, and must never see half of a
// transaction on the way.
func TestWatchEqualsList(t *testing.T) {
	t.Parallel()
	e := newEtcd(t, 1)
	var runs atomic.Int64
	rapid.Check(t, func(rt *rapid.T) {
		m := newModel(t, rt, e, fmt.Sprintf("run-%d", runs.Add(1)))
		defer m.close()
		rt.Repeat(map[string]func(*rapid.T){
			"report": m.report, "report full": m.reportFull, "policy": m.policy, "drain": m.drain,
			"take over": m.takeOver, "deregister": m.deregister, "compact": m.compact,
			"cut": m.cut, "restart": m.restart, "consume": m.consume, "": m.invariant,
		})
		m.settle()
	})
}

// model is one trust domain and what must be in it.
type model struct {
	t       testing.TB
	rt      *rapid.T
	etcd    *testEtcd
	cutter  *cutter
	fault   *fault
	reader  *Store // watches, through a cutter
	writer  *Store // writes, and now and then loses a reply
	ctx     context.Context
	stop    []func()
	fast    *Watch
	slow    *Watch
	seen    map[*Watch]records
	session map[string]*Session
	next    int // number of the next cluster
	ports   map[string]map[string]uint32
	policy_ map[string]int32
	drains  map[string]int32
	gone    int
}

func newModel(t testing.TB, rt *rapid.T, e *testEtcd, domain string) *model {
	m := &model{
		t: t, rt: rt, etcd: e, fault: new(fault), seen: make(map[*Watch]records), session: make(map[string]*Session),
		ports: make(map[string]map[string]uint32), policy_: make(map[string]int32), drains: make(map[string]int32),
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	m.ctx = ctx
	m.stop = append(m.stop, cancel)
	m.cutter = newCutter(t, e.urls[0])
	cfg := e.config()
	cfg.TrustDomain, cfg.Logger = federationTestDomain(domain), nil
	cfg.dialOptions = append(cfg.dialOptions, m.fault.option())
	m.writer = m.open(cfg)
	cfg.dialOptions, cfg.Endpoints = nil, []string{m.cutter.url}
	m.reader = m.open(cfg)
	m.fast, m.slow = m.reader.Watch(), m.reader.Watch()
	m.seen[m.fast], m.seen[m.slow] = records{}, records{}
	m.register()
	m.register()
	// Some replies are lost all along.
	m.fault.set(func(n int, _ *pb.TxnRequest) verdict {
		if n%5 == 4 {
			return loseReply
		}
		return pass
	})
	return m
}

func (m *model) open(cfg Config) *Store {
	s, err := Open(m.ctx, cfg)
	m.must(err)
	m.stop = append(m.stop, func() { s.Close() })
	return s
}

func (m *model) close() {
	for _, stop := range slices.Backward(m.stop) {
		stop()
	}
}

func (m *model) must(err error) {
	if err != nil {
		m.rt.Fatal(err)
	}
}

func (m *model) register() {
	name := fmt.Sprintf("c-%d", m.next)
	m.next++
	_, _, err := m.writer.Register(m.ctx, member(name), token("token-"+name))
	m.must(err)
	_, err = m.writer.Enrol(m.ctx, "token-"+name, []byte("key"))
	m.must(err)
	m.ports[name] = make(map[string]uint32)
	m.openSession(name)
}

func (m *model) openSession(name string) {
	ss, err := m.writer.OpenSession(m.ctx, SessionRequest{Cluster: clusterID(name), Controller: "c", Instance: "i"})
	m.must(err)
	m.session[name] = ss
}

func (m *model) cluster(rt *rapid.T) string {
	return rapid.SampledFrom(sortedKeys(m.session)).Draw(rt, "cluster")
}

var serviceNames = rapid.SampledFrom([]string{"a", "b", "c", "d", "e"})

// pair is an export and its readiness, which always are written together and
// say the same.
func pair(cluster, name string, port uint32) []*federationv1.Record {
	return []*federationv1.Record{export(cluster, name, port), ready(cluster, name, int32(port))}
}

func (m *model) report(rt *rapid.T) {
	c := m.cluster(rt)
	var puts []*federationv1.Record
	var deletes []string
	for name := range rapid.MapOfN(serviceNames, rapid.Just(true), 1, 3).Draw(rt, "services") {
		if rapid.IntRange(0, 2).Draw(rt, "what") == 0 {
			deletes = append(deletes, "export/"+c+"/shop/"+name, "ready/"+c+"/shop/"+name)
			delete(m.ports[c], name)
		} else {
			port := rapid.Uint32Range(1, 5).Draw(rt, "port")
			puts = append(puts, pair(c, name, port)...)
			m.ports[c][name] = port
		}
	}
	_, err := m.session[c].Report(m.ctx, puts, deletes)
	m.must(err)
}

func (m *model) reportFull(rt *rapid.T) {
	c := m.cluster(rt)
	m.ports[c] = rapid.MapOf(serviceNames, rapid.Uint32Range(1, 5)).Draw(rt, "full set")
	var all []*federationv1.Record
	for name, port := range m.ports[c] {
		all = append(all, pair(c, name, port)...)
	}
	_, err := m.session[c].ReportFull(m.ctx, all)
	m.must(err)
}

func (m *model) policy(rt *rapid.T) {
	name := serviceNames.Draw(rt, "policy")
	if _, ok := m.policy_[name]; ok && rapid.Bool().Draw(rt, "delete") {
		_, err := m.writer.DeletePolicy(m.ctx, "shop", name)
		m.must(err)
		delete(m.policy_, name)
		return
	}
	m.policy_[name] = rapid.Int32Range(1, 9).Draw(rt, "spill")
	_, err := m.writer.PutPolicy(m.ctx, policyRecord(name, name, m.policy_[name]).GetPolicy())
	m.must(err)
}

func (m *model) drain(rt *rapid.T) {
	c := m.cluster(rt)
	key := "drain/" + c
	w := Swap{Key: key}
	if have, ok := m.drains[c]; ok {
		w.Old = drain(c, have)
	}
	if w.Old == nil || rapid.Bool().Draw(rt, "step") {
		m.drains[c] = rapid.Int32Range(0, 1000).Draw(rt, "remaining")
		w.New = drain(c, m.drains[c])
	} else {
		delete(m.drains, c)
	}
	_, err := m.writer.Swap(m.ctx, w)
	m.must(err)
}

// takeOver opens a new session; the old one must not be able to do anything.
func (m *model) takeOver(rt *rapid.T) {
	c := m.cluster(rt)
	old := m.session[c]
	m.openSession(c)
	_, err := old.Report(m.ctx, pair(c, "a", 99), []string{"export/" + c + "/shop/b"})
	if !errors.Is(err, ErrStale) {
		m.rt.Fatalf("the old session of %s got %v", c, err)
	}
}

func (m *model) deregister(rt *rapid.T) {
	if rapid.IntRange(0, 3).Draw(rt, "really") != 0 {
		rt.Skip("deregistering is rare")
	}
	c := m.cluster(rt)
	_, err := m.writer.Deregister(m.ctx, clusterID(c), "gone")
	m.must(err)
	if _, err := m.session[c].Report(m.ctx, pair(c, "a", 99), nil); !errors.Is(err, ErrStale) {
		m.rt.Fatalf("the session of the deregistered %s got %v", c, err)
	}
	delete(m.session, c)
	delete(m.ports, c)
	delete(m.drains, c)
	m.gone++
	m.register()
}

func (m *model) compact(*rapid.T) {
	sn, err := m.writer.read(m.ctx)
	m.must(err)
	_, err = m.writer.client.Compact(m.ctx, sn.revision)
	if err != nil && err.Error() != "etcdserver: mvcc: required revision has been compacted" {
		m.rt.Fatal(err)
	}
}

// cut takes the reader's connections away or lets it in again.
func (m *model) cut(rt *rapid.T) {
	m.cutter.close()
	if rapid.Bool().Draw(rt, "and back") {
		m.cutter.open()
	}
}

func (m *model) restart(rt *rapid.T) {
	if rapid.IntRange(0, 9).Draw(rt, "really") != 0 {
		rt.Skip("a restart is rare, for it is slow")
	}
	m.etcd.stop()
	m.etcd.start()
}

// consume lets the fast consumer take what there is.
func (m *model) consume(*rapid.T) {
	ctx, cancel := context.WithTimeout(m.ctx, 5*time.Millisecond)
	defer cancel()
	for {
		b, err := m.fast.Next(ctx)
		if err != nil {
			return
		}
		m.take(m.fast, b)
	}
}

// take checks that every batch leaves a consumer between two transactions.
func (m *model) take(w *Watch, b Batch) {
	seen := m.seen[w]
	seen.take(b)
	for key, r := range seen {
		if e := r.GetExport(); e != nil {
			other := seen["ready/"+key[len(dirExport):]]
			if other == nil || uint32(other.GetReadiness().GetReady()) != e.GetPorts()[0].GetNumber() {
				m.rt.Fatalf("half of a transaction at %v: %s is %v, its readiness %v", b.Revision, key, e, other)
			}
		}
	}
}

// invariant: what is stored is what the model says.
func (m *model) invariant(rt *rapid.T) {
	now := m.list()
	exports := 0
	for c, services := range m.ports {
		for name, port := range services {
			exports++
			got := now["export/"+c+"/shop/"+name].GetExport()
			if len(got.GetPorts()) != 1 || got.GetPorts()[0].GetNumber() != port {
				rt.Fatalf("%s/%s is %v, want port %d", c, name, got, port)
			}
		}
	}
	for name, spill := range m.policy_ {
		if got := now["policy/controller/shop/"+name].GetPolicy().GetSpillBelowPerMille(); got != spill {
			rt.Fatalf("policy %s spills below %d, want %d", name, got, spill)
		}
	}
	for c, remaining := range m.drains {
		if got := now["drain/"+c].GetDrain(); got == nil || got.GetRemainingPerMille() != remaining {
			rt.Fatalf("drain of %s is %v, want %d", c, got, remaining)
		}
	}
	for dir, want := range map[string]int{
		dirExport: exports, dirReady: exports, dirPolicy: len(m.policy_), dirDrain: len(m.drains), dirCluster: m.next, dirDeny: m.gone,
	} {
		if got := keysBelow(now, dir); got != want {
			rt.Fatalf("%d keys below %s, want %d", got, dir, want)
		}
	}
}

func (m *model) list() map[string]*federationv1.Record {
	kvs, _, err := m.writer.listAll(m.ctx, 0)
	m.must(err)
	out := make(map[string]*federationv1.Record)
	for k, e := range kvs {
		if isRecord(k) {
			r, err := decodeRecord(k, e.value, e.created)
			m.must(err)
			out[k] = r
		}
	}
	return out
}

// settle lets everybody catch up.
func (m *model) settle() {
	m.cutter.open()
	want := m.list()
	late := m.reader.Watch()
	m.seen[late] = records{}
	for w, seen := range m.seen {
		for !same(seen, want) {
			b, err := w.Next(m.ctx)
			if err != nil {
				m.rt.Fatalf("%v: a consumer has %d records, %d are stored", err, len(seen), len(want))
			}
			m.take(w, b)
		}
		w.Close()
	}
	if n := m.reader.repairs(); n != 0 {
		m.rt.Fatalf("the view had to be mended %v times", n)
	}
}
