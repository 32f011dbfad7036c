package agent

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics of an agent. Labels are bounded: parts of the agent, kinds of
// results, never services or addresses.
type metrics struct {
	connected prometheus.Gauge
	sessions  prometheus.Counter
	updates   prometheus.Counter
	reports   prometheus.Counter
	refused   prometheus.Counter
	findings  *prometheus.GaugeVec
	records   prometheus.Gauge
	revision  prometheus.Gauge
	services  *prometheus.GaugeVec
	endpoints *prometheus.GaugeVec
	proxies   *prometheus.GaugeVec
	saves     *prometheus.CounterVec
	plans     prometheus.Counter
	apply     prometheus.Histogram
	questions *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	f := promauto.With(r)
	return &metrics{
		connected: f.NewGauge(prometheus.GaugeOpts{
			Name: "weft_agent_connected",
			Help: "1 while a session with a controller is open.",
		}),
		sessions: f.NewCounter(prometheus.CounterOpts{
			Name: "weft_agent_sessions_total",
			Help: "Sessions that a controller has welcomed.",
		}),
		updates: f.NewCounter(prometheus.CounterOpts{
			Name: "weft_agent_updates_total",
			Help: "Updates received, those that only say how far the controller is included.",
		}),
		reports: f.NewCounter(prometheus.CounterOpts{
			Name: "weft_agent_reports_total",
			Help: "Reports sent.",
		}),
		refused: f.NewCounter(prometheus.CounterOpts{
			Name: "weft_agent_refused_records_total",
			Help: "Reported records that the controller refused.",
		}),
		findings: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weft_agent_findings",
			Help: "Findings at present, by the part of the agent.",
		}, []string{"part"}),
		records: f.NewGauge(prometheus.GaugeOpts{
			Name: "weft_agent_records",
			Help: "Records of the mesh that the agent holds.",
		}),
		revision: f.NewGauge(prometheus.GaugeOpts{
			Name: "weft_agent_applied_revision",
			Help: "Number of the catalog revision that is in force.",
		}),
		services: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weft_agent_services",
			Help: "Services: own ones of the source, and imported ones with an address.",
		}, []string{"kind"}),
		endpoints: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weft_agent_endpoints",
			Help: "Own endpoints by what their checks have shown.",
		}, []string{"health"}),
		proxies: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weft_agent_proxies",
			Help: "Attached gateways and proxies, by role.",
		}, []string{"role"}),
		saves: f.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_agent_state_writes_total",
			Help: "Writes of the last good state, by result.",
		}, []string{"result"}),
		plans: f.NewCounter(prometheus.CounterOpts{
			Name: "weft_agent_plans_total",
			Help: "Plans made for service ports.",
		}),
		apply: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "weft_agent_apply_seconds",
			Help:    "From a change's arrival in the agent to its resources' hand-over to the xDS server.",
			Buckets: prometheus.ExponentialBuckets(0.0002, 4, 9),
		}),
		questions: f.NewCounterVec(prometheus.CounterOpts{
			Name: "weft_agent_questions_total",
			Help: "Questions of the controller, by kind and result.",
		}, []string{"kind", "result"}),
	}
}
