package store

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weftmesh/weft/federation/clock"
)

// metrics of one store. Labels are names of this package's methods and
// outcomes, so they are bounded.
type metrics struct {
	clock        clock.Clock
	requests     *prometheus.HistogramVec
	transactions *prometheus.CounterVec
	unknown      prometheus.Counter
	revision     prometheus.Gauge
	keys         prometheus.Gauge
	relists      *prometheus.CounterVec
	repairs      prometheus.Counter
	badValues    prometheus.Counter
	consumers    prometheus.Gauge
	leader       *prometheus.GaugeVec
	size, quota  prometheus.Gauge
	alarms       prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, c clock.Clock) (*metrics, error) {
	m := &metrics{
		clock: c,
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "weft_store_request_duration_seconds", Help: "Time that etcd took for a read, list or transaction.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"request", "outcome"}),
		transactions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_store_transactions_total", Help: "Transactions by method and outcome: committed, raced, unknown, failed.",
		}, []string{"transaction", "outcome"}),
		unknown: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_store_unknown_outcomes_total", Help: "Writes that etcd did not answer, and that had to be looked for.",
		}),
		revision: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_watch_revision", Help: "etcd revision up to which the watched view is complete.",
		}),
		keys: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_watch_keys", Help: "Keys in the watched view.",
		}),
		relists: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_store_relists_total", Help: "Full lists by reason: start, compacted, restored, lost.",
		}, []string{"reason"}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_store_watch_repairs_total", Help: "Keys in which the watched view differed from a fresh list of the same revision. Anything but 0 is a bug.",
		}),
		badValues: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_store_bad_values_total", Help: "Values that could not be decoded; their last good version stays in the view.",
		}),
		consumers: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_watch_consumers", Help: "Open watches in this process.",
		}),
		leader: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weft_store_leader", Help: "1 while this process leads the election.",
		}, []string{"election"}),
		size: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_size_bytes", Help: "Size of etcd's database, as of the last status.",
		}),
		quota: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_quota_bytes", Help: "Quota of the embedded etcd; 0 where it is not known.",
		}),
		alarms: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_alarms", Help: "Alarms that etcd has raised, as of the last status.",
		}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.transactions, m.unknown, m.revision, m.keys, m.relists, m.repairs,
		m.badValues, m.consumers, m.leader, m.size, m.quota, m.alarms,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// unregister lets a later store of the same process register again.
func (m *metrics) unregister(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.transactions, m.unknown, m.revision, m.keys, m.relists, m.repairs,
		m.badValues, m.consumers, m.leader, m.size, m.quota, m.alarms,
	} {
		reg.Unregister(c)
	}
}

// request observes one call; defer it with the address of the named error.
func (m *metrics) request(kind string, start time.Time, err *error) {
	outcome := "ok"
	if *err != nil {
		outcome = "failed"
	}
	m.requests.WithLabelValues(kind, outcome).Observe(clock.Since(m.clock, start).Seconds())
}

func (m *metrics) transaction(name string, start time.Time, err error) {
	outcome := "committed"
	switch {
	case errors.Is(err, errRaced):
		outcome = "raced"
	case errors.Is(err, ErrUnknown):
		outcome = "unknown"
	case err != nil:
		outcome = "failed"
	}
	m.transactions.WithLabelValues(name, outcome).Inc()
	m.requests.WithLabelValues("transaction", outcome).Observe(clock.Since(m.clock, start).Seconds())
}
