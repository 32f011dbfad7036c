package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap/zapcore"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// featureLevel is what this program reads and writes. A store whose meta asks
// for more was written by a newer program.
const featureLevel = 1

// maxReceive bounds one answer of etcd: a page of records of the largest size.
const maxReceive = listPage*(MaxRecordBytes+4096) + 1<<20

// Store is the mesh's state. It is safe for concurrent use.
type Store struct {
	cfg     Config
	prefix  string
	where   string // endpoints, for people
	log     *slog.Logger
	clock   clock.Clock
	metrics *metrics
	server  *server // nil with an external etcd
	client  *clientv3.Client

	// writer names this process in the values that it writes; operations counts
	// its transactions. Together they name one transaction for ever.
	writer     string
	operations atomic.Uint64
	// newest is about the newest state that a read has seen.
	newest atomic.Pointer[reached]

	view   *view
	leased *leased
	failed chan error

	stop    context.CancelFunc
	running sync.WaitGroup
	closing sync.Once
	closed  chan struct{}
}

// Open starts the embedded etcd, or finds the external one, makes the key meta
// where there is none, and begins to watch. It fails within seconds where
// endpoints, TLS files or the data directory are wrong, and within 60 s where
// the embedded server does not become ready. ctx bounds the opening only.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, prefix: prefix(cfg.TrustDomain.Name()), log: cfg.Logger, clock: cfg.Clock,
		writer: rand.Text(), failed: make(chan error, 1), closed: make(chan struct{}),
	}
	if s.metrics, err = newMetrics(cfg.Metrics, cfg.Clock); err != nil {
		return nil, fmt.Errorf("store: metrics: %w", err)
	}
	background, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.view = newView(s)
	s.leased = newLeased(s)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()

	cc := clientv3.Config{
		DialTimeout:          readTimeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		MaxCallSendMsgSize:   2 << 20,
		MaxCallRecvMsgSize:   maxReceive,
		Logger:               zapLogger(cfg.Logger, zapcore.ErrorLevel),
		DialOptions:          cfg.dialOptions,
	}
	if cfg.Dir != "" {
		if s.server, err = startServer(ctx, &s.cfg); err != nil {
			return nil, err
		}
		cc.Endpoints, s.where = []string{s.server.endpoint}, cfg.Dir
	} else {
		found, err := findServers(ctx, &s.cfg)
		if err != nil {
			return nil, err
		}
		cc.Endpoints, cc.TLS, s.where = cfg.Endpoints, found.tls, strings.Join(cfg.Endpoints, ",")
	}
	if s.client, err = clientv3.New(cc); err != nil {
		return nil, fmt.Errorf("store: etcd client: %w", err)
	}
	if err := s.adopt(ctx); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if s.server != nil {
		s.running.Go(func() { s.server.watch(background, s.fail) })
	}
	s.running.Go(func() { s.view.run(background) })
	s.running.Go(func() { s.leased.run(background) })
	s.running.Go(func() { s.pollStatus(background) })
	return s, nil
}

// fail makes Err report the store's end.
func (s *Store) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// Err receives one error when the store cannot go on: the embedded server has
// died. The process should end; a supervisor starts it again. An external etcd
// that is away is no such error: calls fail meanwhile, and the watch goes on
// where it stopped.
func (s *Store) Err() <-chan error { return s.failed }

// Close ends watches and leases first, so that other processes need not wait
// for them to expire, then the client, then the embedded server. Elections end
// with their own context: end those before. It takes up to 10 s.
func (s *Store) Close() error {
	s.closing.Do(func() {
		close(s.closed)
		s.stop()
		s.running.Wait()
		if s.client != nil {
			if err := s.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
				s.log.Warn("closing the etcd client", "error", err)
			}
		}
		if s.server != nil {
			s.server.stop()
		}
		s.metrics.unregister(s.cfg.Metrics)
	})
	return nil
}

// adopt makes sure that meta exists and was made in the etcd cluster that is
// there now. Another cluster's id means that the data come from a backup: a new
// incarnation begins, and stays recovering until EndRecovery. Tokens of the
// backup die, for they may have been used since.
//
// Every process may find it first; one succeeds, the others read its meta.
func (s *Store) adopt(ctx context.Context) error {
	return retry(ctx, "adopt", func() error {
		sn, cluster, err := s.readOnce(ctx, nil)
		if err != nil {
			return err
		}
		if l := sn.meta.GetFeatureLevel(); l > featureLevel {
			return fmt.Errorf("the store at %s needs feature level %d, this program has %d: upgrade it", s.where, l, featureLevel)
		}
		fresh := !sn.entries[keyMeta].exists()
		if !fresh && sn.meta.GetEtcdClusterId() == cluster {
			return nil
		}
		return s.beginIncarnation(ctx, sn, cluster, !fresh)
	})
}

// beginIncarnation makes a new incarnation on what sn saw. errRaced where
// another process was faster.
func (s *Store) beginIncarnation(ctx context.Context, sn *snapshot, cluster uint64, recovering bool) error {
	t := s.begin("begin_incarnation", sn)
	meta := &federationv1.Meta{
		Incarnation: strings.ToLower(rand.Text()[:16]), FeatureLevel: featureLevel,
		EtcdClusterId: cluster, Began: timestamppb.New(s.clock.Now()), Recovering: recovering,
	}
	t.require(sn.compare(keyMeta)...)
	t.putState(s, keyMeta, metaState(meta), 0)
	t.putState(s, keyHead, &federationv1.State{}, 0)
	if recovering {
		t.deleteBelow(dirToken)
	}
	if _, err := s.commit(ctx, t); err != nil {
		return err
	}
	if recovering {
		s.log.WarnContext(ctx, "the store was restored from a backup: a new incarnation begins, and recovers",
			"incarnation", meta.GetIncarnation(), "before", sn.meta.GetIncarnation())
	} else {
		s.log.InfoContext(ctx, "made a new store", "incarnation", meta.GetIncarnation())
	}
	return nil
}

func metaState(m *federationv1.Meta) *federationv1.State {
	return &federationv1.State{Body: &federationv1.State_Meta{Meta: m}}
}

// BeginIncarnation declares the store restored: for a restore that the store
// cannot see itself, because etcd's cluster id stayed the same. After a lost
// reply a second call begins one more incarnation, which does no harm.
func (s *Store) BeginIncarnation(ctx context.Context) error {
	return retry(ctx, "begin incarnation", func() error {
		sn, cluster, err := s.readOnce(ctx, nil)
		if err != nil {
			return err
		}
		return s.beginIncarnation(ctx, sn, cluster, true)
	})
}

// wentBack begins a new incarnation because etcd was seen to go back, unless
// somebody else has ended the incarnation before already.
func (s *Store) wentBack(ctx context.Context, before string) error {
	return retry(ctx, "begin incarnation", func() error {
		sn, cluster, err := s.readOnce(ctx, nil)
		if err != nil || sn.meta.GetIncarnation() != before {
			return err
		}
		return s.beginIncarnation(ctx, sn, cluster, true)
	})
}

// EndRecovery ends the state recovering, once every member has reported or an
// operator says so. It changes nothing where that is so already.
func (s *Store) EndRecovery(ctx context.Context) error {
	return retry(ctx, "end recovery", func() error {
		sn, err := s.read(ctx)
		if err != nil || !sn.meta.GetRecovering() {
			return err
		}
		t := s.begin("end_recovery", sn)
		t.require(sn.compare(keyMeta)...)
		sn.meta.Recovering = false
		t.putState(s, keyMeta, metaState(sn.meta), 0)
		t.putState(s, keyHead, &federationv1.State{}, 0)
		_, err = s.commit(ctx, t)
		return err
	})
}

// Status is what etcd says of itself.
type Status struct {
	Embedded   bool
	Endpoints  []string
	Version    string
	Leader     string // member id in hexadecimal, or empty
	SizeBytes  int64
	InUseBytes int64
	QuotaBytes int64 // 0 where an external etcd's is not known
	Alarms     []string
	Revision   int64 // etcd's own
	Recovering bool
}

// Status asks the first endpoint that answers.
func (s *Store) Status(ctx context.Context) (Status, error) {
	st := Status{Embedded: s.server != nil, Endpoints: s.client.Endpoints()}
	if s.server != nil && s.server.stopped() {
		// etcd would answer by a panic.
		return st, errors.New("store: embedded etcd has stopped")
	}
	var errs error
	for _, ep := range st.Endpoints {
		call, cancel := context.WithTimeout(ctx, readTimeout)
		resp, err := s.client.Status(call, ep)
		cancel()
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("%s: %w", ep, err))
			continue
		}
		st.Version, st.SizeBytes, st.InUseBytes = resp.Version, resp.DbSize, resp.DbSizeInUse
		st.QuotaBytes, st.Revision = resp.DbSizeQuota, resp.Header.Revision
		if resp.Leader != 0 {
			st.Leader = fmt.Sprintf("%x", resp.Leader)
		}
		st.Alarms = append(st.Alarms, resp.Errors...)
		sn, err := s.read(ctx)
		if err != nil {
			return st, err
		}
		st.Recovering = sn.meta.GetRecovering()
		return st, nil
	}
	return st, fmt.Errorf("store: no etcd endpoint answers: %w", errs)
}

// pollStatus keeps the gauges of size and alarms up, and warns before etcd's
// quota is reached.
func (s *Store) pollStatus(ctx context.Context) {
	const every = 30 * time.Second
	for warned := false; ; {
		if st, err := s.Status(ctx); err == nil {
			s.metrics.size.Set(float64(st.SizeBytes))
			s.metrics.quota.Set(float64(st.QuotaBytes))
			s.metrics.alarms.Set(float64(len(st.Alarms)))
			tight := len(st.Alarms) > 0 || st.QuotaBytes > 0 && st.InUseBytes > st.QuotaBytes/10*7
			if tight && !warned {
				s.log.WarnContext(ctx, "etcd has alarms or little room left",
					"size", st.SizeBytes, "inUse", st.InUseBytes, "quota", st.QuotaBytes, "alarms", st.Alarms)
			}
			warned = tight
		}
		if clock.Sleep(ctx, clock.Real(), every) != nil {
			return
		}
	}
}
