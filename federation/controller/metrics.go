package controller

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// metrics of one controller. Every label is one of a few words.
type metrics struct {
	enrolments *prometheus.CounterVec
	signatures *prometheus.CounterVec
	sessions   prometheus.Gauge
	updates    prometheus.Counter
	records    *prometheus.CounterVec
	leader     prometheus.Gauge
	silent     prometheus.Gauge
	calls      *prometheus.CounterVec
	collectors []prometheus.Collector
}

func newMetrics(reg prometheus.Registerer, revision func() float64) (*metrics, error) {
	m := &metrics{
		enrolments: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_controller_enrolments_total", Help: "Join tokens that were shown, by outcome: enrolled, refused, limited.",
		}, []string{"outcome"}),
		signatures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_controller_signatures_total", Help: "Identities signed, by role: agent, gateway, workload, controller, operator.",
		}, []string{"role"}),
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_controller_sessions", Help: "Agents whose stream this controller holds.",
		}),
		updates: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_controller_updates_total", Help: "Updates sent to agents, progress included.",
		}),
		records: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_controller_reported_records_total", Help: "Records that agents reported, by outcome: put, deleted, refused. What changes nothing is not counted.",
		}, []string{"outcome"}),
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_controller_leader", Help: "1 while this controller leads.",
		}),
		silent: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_controller_silent_clusters", Help: "Clusters that are suspect or expired, as the leader counts them.",
		}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_controller_calls_total", Help: "Finished calls by method and code.",
		}, []string{"method", "code"}),
	}
	at := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "weft_controller_revision", Help: "Number of the catalog's revision that this controller serves.",
	}, revision)
	m.collectors = []prometheus.Collector{m.enrolments, m.signatures, m.sessions, m.updates, m.records, m.leader, m.silent, m.calls, at}
	if reg == nil {
		return m, nil
	}
	for i, c := range m.collectors {
		if err := reg.Register(c); err != nil {
			for _, done := range m.collectors[:i] {
				reg.Unregister(done)
			}
			return nil, err
		}
	}
	return m, nil
}

// unregister takes the metrics out again.
func (m *metrics) unregister(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	for _, c := range m.collectors {
		reg.Unregister(c)
	}
}

func (m *metrics) enrolled(outcome string) { m.enrolments.WithLabelValues(outcome).Inc() }
func (m *metrics) signed(role string)      { m.signatures.WithLabelValues(role).Inc() }

func (m *metrics) reported(puts, deletes, refused int) {
	for outcome, n := range map[string]int{"put": puts, "deleted": deletes, "refused": refused} {
		if n > 0 {
			m.records.WithLabelValues(outcome).Add(float64(n))
		}
	}
}

// called counts a finished call. Its method is one that the server has: unknown
// ones never get here.
func (m *metrics) called(method string, err error) {
	m.calls.WithLabelValues(method, status.Code(err).String()).Inc()
}

func (m *metrics) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	err = plain(err)
	m.called(info.FullMethod, err)
	return resp, err
}

func (m *metrics) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := plain(handler(srv, ss))
	m.called(info.FullMethod, err)
	return err
}

// plain gives an error that is no status its code: a context's end is not
// "unknown".
func plain(err error) error {
	if err == nil {
		return nil
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return err
}
