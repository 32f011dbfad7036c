package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Session is one cluster's right to write what it offers: the newest one
// opened has it, all others are stale. Every write compares the session's
// epoch and the cluster's record, so a stale session, of this replica or
// another, changes nothing and gets ErrStale.
//
// A session knows what its cluster has stored, for nobody else writes it, and
// so writes only what differs. Its methods are safe for concurrent use, and
// run one after the other.
type Session struct {
	store       *Store
	cluster     federation.ClusterID
	epoch       int64
	generation  int64
	incarnation string
	opened      int64 // revision at which the session was taken over
	takenOver   chan struct{}
	endOnce     sync.Once

	mu     sync.Mutex
	stale  error // once set, every write fails with it
	doubt  bool  // an outcome stayed unknown: read everything again first
	base   *snapshot
	member *federationv1.Member
	report *federationv1.ReportState
	stored map[string]entry // of the cluster's own keys
}

// SessionRequest says who takes a session over.
type SessionRequest struct {
	Cluster    federation.ClusterID
	Controller string // name of this controller
	Instance   string // of the agent's process
}

// OpenSession takes the cluster's session over: its epoch goes up by one, and
// every older session is stale. A full report must follow. ErrNotFound where
// the cluster is unknown or deregistered, ErrStale where it is not active.
// After ErrUnknown, opening again takes over from oneself.
func (s *Store) OpenSession(ctx context.Context, req SessionRequest) (*Session, error) {
	if !checkPart(req.Controller) || !checkPart(req.Instance) {
		return nil, fmt.Errorf("session of cluster %q: the names of controller %q and agent %q must not be empty or hold a slash: %w", req.Cluster, req.Controller, req.Instance, ErrForbidden)
	}
	ss := &Session{store: s, cluster: req.Cluster, takenOver: make(chan struct{})}
	err := retry(ctx, "open session", func() error {
		sn, err := s.read(ctx, clusterKey(req.Cluster), sessionKey(req.Cluster))
		if err != nil {
			return err
		}
		m, err := sn.member(req.Cluster)
		if err != nil {
			return err
		}
		if err := checkActive(m, m.GetGeneration()); err != nil {
			return err
		}
		st, err := sn.state(sessionKey(req.Cluster))
		if err != nil {
			return err
		}
		ss.epoch, ss.generation = st.GetSession().GetEpoch()+1, m.GetGeneration()
		ss.incarnation = sn.meta.GetIncarnation()
		t := s.begin("open_session", sn)
		t.require(sn.compare(clusterKey(req.Cluster), sessionKey(req.Cluster))...)
		t.putState(s, sessionKey(req.Cluster), &federationv1.State{Body: &federationv1.State_Session{Session: &federationv1.SessionState{
			Epoch: ss.epoch, Generation: ss.generation, Controller: req.Controller, Instance: req.Instance,
		}}}, 0)
		ss.opened, err = s.commit(ctx, t)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open session of cluster %q: %w", req.Cluster, err)
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if err := ss.load(ctx); err != nil {
		return nil, fmt.Errorf("open session of cluster %q: %w", req.Cluster, err)
	}
	s.view.follow(ss)
	return ss, nil
}

func checkActive(m *federationv1.Member, generation int64) error {
	switch {
	case m.GetState() == federationv1.MemberState_MEMBER_STATE_DEREGISTERED:
		return fmt.Errorf("cluster %q is deregistered: %w", m.GetCluster(), errors.Join(ErrStale, ErrNotFound))
	case m.GetState() != federationv1.MemberState_MEMBER_STATE_ACTIVE:
		return fmt.Errorf("cluster %q is not active: %w", m.GetCluster(), ErrStale)
	case m.GetGeneration() != generation:
		return fmt.Errorf("cluster %q has enrolled anew: %w", m.GetCluster(), ErrStale)
	}
	return nil
}

// Cluster is whose session it is.
func (ss *Session) Cluster() federation.ClusterID { return ss.cluster }

// Epoch counts the takeovers of the cluster's session.
func (ss *Session) Epoch() int64 { return ss.epoch }

// Generation of the registration that the session belongs to.
func (ss *Session) Generation() int64 { return ss.generation }

// Done is closed when the watch sees that the session is not the newest any
// more, or when Close is called. Writes are refused from the takeover itself
// on, which is earlier.
func (ss *Session) Done() <-chan struct{} { return ss.takenOver }

// Close forgets the session in this process. Its record stays: the next
// session counts on from it.
func (ss *Session) Close() {
	ss.store.view.unfollow(ss)
	ss.end()
}

func (ss *Session) end() { ss.endOnce.Do(func() { close(ss.takenOver) }) }

// Member is the registration that the session's last write compared with. The
// caller must not change it.
func (ss *Session) Member() *federationv1.Member {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.member
}

// Stored is what the cluster has stored: its exports, readiness, policies and
// findings, sorted by key.
func (ss *Session) Stored() ([]*federationv1.Record, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	out := make([]*federationv1.Record, 0, len(ss.stored))
	for _, k := range slices.Sorted(maps.Keys(ss.stored)) {
		r, err := decodeRecord(k, ss.stored[k].value, ss.stored[k].created)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// Written is what a report changed. Revision is the catalog's once all of it
// is in; where nothing was written, the revision at the session's last write or
// opening.
type Written struct {
	Revision      federation.Revision
	Puts, Deletes int
}

// Report writes a delta: records of the cluster's own, and keys to delete. It
// takes transactions of at most 120 changes, deletes after puts; what is stored
// already is not written, and an unchanged report writes nothing.
//
// ErrStale: the session is over. ErrConflict: the registration's grants,
// gateways or limits have changed; check the report against Member and send it
// again. ErrForbidden: a key is not the cluster's own; nothing was written.
// ErrUnknown: a part may be written; the next report finds out first.
func (ss *Session) Report(ctx context.Context, puts []*federationv1.Record, deletes []string) (Written, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	want, err := ss.encode(puts)
	if err != nil {
		return Written{}, err
	}
	if err := ss.ready(ctx); err != nil {
		return Written{}, err
	}
	var gone []string
	for _, k := range deletes {
		if err := ss.owns(k); err != nil {
			return Written{}, err
		}
		if _, put := want[k]; !put {
			gone = append(gone, k)
		}
	}
	return ss.write(ctx, want, gone, ss.report.GetFull() && ss.report.GetEpoch() == ss.epoch)
}

// ReportFull makes the cluster's stored records exactly these: it writes what
// differs, then deletes what is not among them, then notes that this epoch's
// set is full. Nothing is deleted before everything is put. Errors are those of
// Report.
func (ss *Session) ReportFull(ctx context.Context, all []*federationv1.Record) (Written, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	want, err := ss.encode(all)
	if err != nil {
		return Written{}, err
	}
	if err := ss.ready(ctx); err != nil {
		return Written{}, err
	}
	var gone []string
	for k := range ss.stored {
		if _, ok := want[k]; !ok {
			gone = append(gone, k)
		}
	}
	return ss.write(ctx, want, gone, true)
}

// owns reports why k is no key of this cluster's report.
func (ss *Session) owns(k string) error {
	for _, dir := range ownDirs(ss.cluster) {
		if strings.HasPrefix(k, dir) {
			return nil
		}
	}
	return fmt.Errorf("key %q is not cluster %q's to write: %w", k, ss.cluster, ErrForbidden)
}

func (ss *Session) encode(records []*federationv1.Record) (map[string][]byte, error) {
	want := make(map[string][]byte, len(records))
	for _, r := range records {
		k := r.GetKey()
		if err := ss.owns(k); err != nil {
			return nil, err
		}
		if err := checkBody(k, r); err != nil {
			return nil, err
		}
		v, err := encodeRecord(r)
		if err != nil {
			return nil, err
		}
		want[k] = v
	}
	return want, nil
}

// ready makes sure that what the session knows is so.
func (ss *Session) ready(ctx context.Context) error {
	if ss.stale != nil {
		return ss.stale
	}
	if !ss.doubt {
		return nil
	}
	return ss.load(ctx)
}

// load reads everything that the session's writes are compared with.
func (ss *Session) load(ctx context.Context) error {
	before := ss.member
	if err := ss.check(ctx); err != nil {
		return err
	}
	stored := make(map[string]entry)
	for _, dir := range ownDirs(ss.cluster) {
		kvs, _, err := ss.store.list(ctx, dir, ss.base.revision)
		if err != nil {
			return err
		}
		maps.Copy(stored, kvs)
	}
	ss.stored, ss.doubt = stored, false
	return sameRegistration(before, ss.member)
}

// check reads whether the session still stands.
func (ss *Session) check(ctx context.Context) error {
	keys := []string{clusterKey(ss.cluster), sessionKey(ss.cluster), reportKey(ss.cluster)}
	sn, err := ss.store.read(ctx, keys...)
	if err != nil {
		return err
	}
	if sn.meta.GetIncarnation() != ss.incarnation {
		return ss.lose(fmt.Errorf("session of cluster %q: the store was restored: %w", ss.cluster, ErrStale))
	}
	m, err := sn.member(ss.cluster)
	if err != nil {
		return err
	}
	if err := checkActive(m, ss.generation); err != nil {
		return ss.lose(fmt.Errorf("session of cluster %q: %w", ss.cluster, err))
	}
	if sn.entries[sessionKey(ss.cluster)].modified != ss.opened {
		return ss.lose(fmt.Errorf("session of cluster %q: taken over from epoch %d: %w", ss.cluster, ss.epoch, ErrStale))
	}
	st, err := sn.state(reportKey(ss.cluster))
	if err != nil {
		return err
	}
	ss.base, ss.member, ss.report = sn, m, st.GetReport()
	return nil
}

func (ss *Session) lose(err error) error {
	ss.stale = err
	ss.end()
	return err
}

// sameRegistration reports ErrConflict where a report that was checked against
// one registration must be checked again.
func sameRegistration(before, after *federationv1.Member) error {
	if before == nil || slices.Equal(before.GetGrants(), after.GetGrants()) && before.GetMaxExports() == after.GetMaxExports() &&
		before.GetNetwork() == after.GetNetwork() &&
		slices.EqualFunc(before.GetGateways(), after.GetGateways(), func(a, b *federationv1.Address) bool { return proto.Equal(a, b) }) {
		return nil
	}
	return fmt.Errorf("registration of cluster %q changed during the report: %w", after.GetCluster(), ErrConflict)
}

// write brings the stored records to want and without gone, in as few
// transactions as the limits allow, and leaves report{epoch, full}.
func (ss *Session) write(ctx context.Context, want map[string][]byte, gone []string, full bool) (Written, error) {
	var changes []change
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if have, ok := ss.stored[k]; !ok || !bytes.Equal(have.value, want[k]) {
			changes = append(changes, change{key: k, value: want[k]})
		}
	}
	slices.Sort(gone)
	for _, k := range slices.Compact(gone) {
		if _, ok := ss.stored[k]; ok {
			changes = append(changes, change{key: k})
		}
	}
	out := Written{Revision: ss.base.catalog()}
	marked := ss.report.GetEpoch() == ss.epoch && ss.report.GetFull() == full
	for len(changes) > 0 || !marked && full {
		part := chunk(changes)
		last := len(part) == len(changes)
		report := &federationv1.ReportState{
			Epoch: ss.epoch, Sequence: 1, Full: full && last || ss.report.GetEpoch() == ss.epoch && ss.report.GetFull(),
		}
		if ss.report.GetEpoch() == ss.epoch {
			report.Sequence = ss.report.GetSequence() + 1
		}
		rev, err := ss.commit(ctx, part, report)
		if err != nil {
			return out, err
		}
		for _, c := range part {
			if isCatalog(c.key) {
				out.Revision = ss.base.at(rev)
			}
			if c.value == nil {
				out.Deletes++
			} else {
				out.Puts++
			}
		}
		changes = changes[len(part):]
		marked = report.GetFull() == full
	}
	return out, nil
}

// chunk takes as many changes from the front as fit into one transaction.
func chunk(changes []change) []change {
	size := 0
	for i, c := range changes {
		size += len(c.key) + len(c.value) + 64
		if i == maxOps || i > 0 && size > maxTxnBytes {
			return changes[:i]
		}
	}
	return changes
}

// commit writes one part of a report, and takes note of it.
func (ss *Session) commit(ctx context.Context, part []change, report *federationv1.ReportState) (int64, error) {
	s := ss.store
	var rev int64
	err := retry(ctx, "report", func() error {
		t := s.begin("report", ss.base)
		t.require(ss.base.compare(sessionKey(ss.cluster), clusterKey(ss.cluster), reportKey(ss.cluster))...)
		t.changes = slices.Clone(part)
		t.putState(s, reportKey(ss.cluster), &federationv1.State{Body: &federationv1.State_Report{Report: report}}, 0)
		var err error
		rev, err = s.commit(ctx, t)
		if err == nil && rev <= ss.base.revision {
			// etcd went back. What was just written is the cluster's own and true, but
			// the rest of what the session knows is not.
			return ss.lose(fmt.Errorf("session of cluster %q: the store was restored: %w", ss.cluster, ErrStale))
		}
		if !errors.Is(err, errRaced) {
			return err
		}
		reported, before := ss.base.entries[reportKey(ss.cluster)].modified, ss.member
		if err := ss.check(ctx); err != nil {
			return err
		}
		if ss.base.entries[reportKey(ss.cluster)].modified != reported {
			// A write of ours that was given up came through late.
			ss.doubt = true
			return fmt.Errorf("report of cluster %q: %w", ss.cluster, ErrConflict)
		}
		if err := sameRegistration(before, ss.member); err != nil {
			return err
		}
		return errRaced
	})
	if err != nil {
		ss.doubt = ss.doubt || errors.Is(err, ErrUnknown)
		return 0, err
	}
	created := func(k string) int64 {
		if e, ok := ss.stored[k]; ok {
			return e.created
		}
		return rev
	}
	for _, c := range part {
		if c.value == nil {
			delete(ss.stored, c.key)
		} else {
			ss.stored[c.key] = entry{value: c.value, created: created(c.key), modified: rev}
		}
	}
	ss.report = report
	entries := maps.Clone(ss.base.entries)
	entries[reportKey(ss.cluster)] = entry{modified: rev}
	if slices.ContainsFunc(part, func(c change) bool { return isCatalog(c.key) }) {
		entries[keyHead] = entry{modified: rev}
	}
	ss.base = &snapshot{revision: rev, entries: entries, meta: ss.base.meta}
	return rev, nil
}
