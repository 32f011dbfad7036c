package agent

import (
	"bytes"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

const (
	// reportEvery is how often readiness is reported whose change moves no
	// traffic between clusters.
	reportEvery = time.Second
	// reportRecords bounds the records of one report: the store takes up to 120
	// operations in one transaction, and a record may need more than one.
	reportRecords = 50
	// reportsOpen bounds the reports that wait for their result.
	reportsOpen = 8
)

// reporter decides what is reported, and when. It holds what the cluster
// offers now (want) and what the present session has been told (sent), both by
// key: what differs is due. Readiness that crosses zero or a threshold is due at
// once, as is everything that is no readiness; the rest at most once a second,
// and what returns to what was sent meanwhile is never sent.
//
// It has no clock and does not wait: take says what to send at a time, and
// when to ask again.
type reporter struct {
	wake chan struct{} // room for one: something may be due

	mu   sync.Mutex
	want map[string]reported
	// full: want is all that the cluster offers, so what is not in it may be
	// withdrawn. Without, nothing is.
	full bool
	// thresholds are the ready fractions at which policies move traffic.
	thresholds func(federation.ServiceID) []federation.PerMille

	session *reportSession // nil while there is none
}

// reported is one record, with its value as it is compared, and its numbers if
// it is readiness.
type reported struct {
	record *federationv1.Record
	value  []byte
	key    federationv1.Key
	ready  *federation.Readiness
}

// reportSession is what one Sync stream has been told.
type reportSession struct {
	sent     map[string]reported
	dirty    map[string]bool
	lastRest time.Time // when readiness that could wait was sent last
	sequence uint64
	open     map[uint64][]string // reports without a result: their keys

	// The full set on its way: keys that are still to be sent, in order. It has
	// begun when filling is set, and its end is sent with the last of them.
	filling bool
	begun   bool
	full    bool // it has begun as full, and is ended so
	left    []string
}

func newReporter() *reporter {
	return &reporter{
		wake:       make(chan struct{}, 1),
		want:       make(map[string]reported),
		thresholds: func(federation.ServiceID) []federation.PerMille { return nil },
	}
}

// set changes what the cluster offers: a record under its key, or nil to
// withdraw it. A record that cannot be encoded is left out.
func (p *reporter) set(changes map[string]*federationv1.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, record := range changes {
		old, had := p.want[key]
		if record == nil {
			if !had {
				continue
			}
			delete(p.want, key)
		} else {
			value, err := record.Value()
			k, kerr := federationv1.ParseKey(key)
			if err != nil || kerr != nil || had && bytes.Equal(old.value, value) {
				continue
			}
			r := reported{record: record, value: value, key: k}
			if b := record.GetReadiness(); b != nil {
				r.ready = &federation.Readiness{Ready: int(b.GetReady()), Total: int(b.GetTotal())}
			}
			p.want[key] = r
		}
		if p.session != nil {
			p.session.dirty[key] = true
		}
	}
	p.notify()
}

// setFull says whether what is set is all that the cluster offers. When it
// becomes so in mid-session, the full set follows.
func (p *reporter) setFull(full bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if full && !p.full && p.session != nil {
		p.refill()
	}
	p.full = full
	p.notify()
}

// setThresholds replaces the function that knows the policies' thresholds.
func (p *reporter) setThresholds(f func(federation.ServiceID) []federation.PerMille) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.thresholds = f
}

// begin starts a session. known are the own records that the controller has
// for sure, in their stored form, or nil where that is not known: if they say
// just what is to be reported, nothing need be sent.
func (p *reporter) begin(known map[string]*federationv1.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.session = &reportSession{sent: make(map[string]reported), dirty: make(map[string]bool), open: make(map[uint64][]string)}
	if known != nil && p.matches(known) {
		for key, r := range p.want {
			if r.key.Kind == federationv1.KindFinding {
				p.session.dirty[key] = true // no catalog shows findings
			} else {
				p.session.sent[key] = r
			}
		}
		p.notify()
		return
	}
	p.refill()
	p.notify()
}

// matches reports whether the controller's known records say what want does.
// The controller sets a few fields of an export itself; they do not count.
func (p *reporter) matches(known map[string]*federationv1.Record) bool {
	n := 0
	for key, r := range p.want {
		if r.key.Kind == federationv1.KindFinding {
			continue
		}
		k, ok := known[key]
		if !ok || !sameReport(k, r.record) {
			return false
		}
		n++
	}
	return n == len(known) || !p.full
}

// refill makes the whole of want due: as a full set if it is one, else as
// additions.
func (p *reporter) refill() {
	s := p.session
	s.filling, s.begun = true, false
	s.left = slices.Sorted(maps.Keys(p.want))
}

// resend makes the whole of want due once more, for example because the
// registration changed and what was refused may be taken now.
func (p *reporter) resend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session != nil {
		p.refill()
	}
	p.notify()
}

// end forgets the session.
func (p *reporter) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.session = nil
}

// result counts a report as answered, and returns its keys; false for one that
// is not open.
func (p *reporter) result(sequence uint64) ([]string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session == nil {
		return nil, false
	}
	keys, ok := p.session.open[sequence]
	delete(p.session.open, sequence)
	p.notify()
	return keys, ok
}

func (p *reporter) notify() {
	raise(p.wake)
}

// take is the next report to send at the time now, which the caller must send.
// Without one, wait is how long nothing will be due unless wake says otherwise;
// 0 is for ever.
func (p *reporter) take(now time.Time) (report *federationv1.Report, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.session
	if s == nil || len(s.open) >= reportsOpen {
		return nil, 0
	}
	if s.filling {
		report = p.takeFull(s)
	}
	if report == nil {
		report, wait = p.takeDue(s, now)
	}
	if report == nil {
		return nil, wait
	}
	s.sequence++
	report.Sequence = s.sequence
	keys := slices.Clone(report.Deletes)
	for _, r := range report.Puts {
		keys = append(keys, r.GetKey())
	}
	s.open[s.sequence] = keys
	return report, 0
}

// takeFull is the next part of the full set. Each record is sent as it is now;
// what was withdrawn since the begin is left out.
func (p *reporter) takeFull(s *reportSession) *federationv1.Report {
	report := new(federationv1.Report)
	if !s.begun {
		s.begun, s.full = true, p.full
		report.FullBegin = s.full
	}
	for len(s.left) > 0 && len(report.Puts) < reportRecords {
		key := s.left[0]
		s.left = s.left[1:]
		delete(s.dirty, key)
		r, ok := p.want[key]
		if !ok {
			if _, told := s.sent[key]; told && !s.full {
				s.dirty[key] = true
			} else {
				delete(s.sent, key)
			}
			continue
		}
		report.Puts = append(report.Puts, r.record)
		s.sent[key] = r
	}
	if len(s.left) == 0 {
		s.filling, s.left = false, nil
		// Even where the source is in doubt by now: what has left since the begin
		// was taken away while it was not.
		report.FullEnd = s.full
	}
	if !report.FullBegin && !report.FullEnd && len(report.Puts) == 0 {
		return nil
	}
	return report
}

// takeDue is what differs from what was sent and is due.
func (p *reporter) takeDue(s *reportSession, now time.Time) (*federationv1.Report, time.Duration) {
	restDue := s.lastRest.Add(reportEvery).Sub(now)
	report := new(federationv1.Report)
	var keys []string
	held := false
	for key := range s.dirty {
		r, wanted := p.want[key]
		old, told := s.sent[key]
		switch {
		case !wanted && !told, wanted && told && bytes.Equal(r.value, old.value):
			delete(s.dirty, key) // as it was: nothing to say
		case restDue > 0 && wanted && told && p.canWait(old, r):
			held = true
		default:
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	if len(keys) > reportRecords {
		keys = keys[:reportRecords]
	}
	for _, key := range keys {
		delete(s.dirty, key)
		r, wanted := p.want[key]
		if !wanted {
			delete(s.sent, key)
			report.Deletes = append(report.Deletes, key)
			continue
		}
		if old, told := s.sent[key]; told && p.canWait(old, r) {
			s.lastRest = now
		}
		s.sent[key] = r
		report.Puts = append(report.Puts, r.record)
	}
	switch {
	case len(keys) > 0:
		return report, 0
	case held:
		return nil, restDue
	}
	return nil, 0
}

// canWait reports whether the step from old to r moves no traffic between
// clusters by itself.
func (p *reporter) canWait(old, r reported) bool {
	if r.key.Kind == federationv1.KindFinding {
		return true
	}
	if old.ready == nil || r.ready == nil {
		return false
	}
	return !crosses(*old.ready, *r.ready, p.thresholds(r.key.Service))
}

// crosses reports whether the step from a to b crosses zero or one of the
// thresholds of the ready fraction.
func crosses(a, b federation.Readiness, thresholds []federation.PerMille) bool {
	if (a.Ready == 0) != (b.Ready == 0) {
		return true
	}
	for _, t := range thresholds {
		if below(a, t) != below(b, t) {
			return true
		}
	}
	return false
}

// below reports whether the ready fraction is below t.
func below(r federation.Readiness, t federation.PerMille) bool {
	return r.Ready*int(federation.All) < r.Total*int(t)
}
