package gateway

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the engine's; all labels have a handful of values.
type metrics struct {
	connections     *prometheus.CounterVec
	openConnections *prometheus.GaugeVec
	bytes           *prometheus.CounterVec
	attempts        *prometheus.CounterVec
	ejections       prometheus.Counter
	handshakes      *prometheus.CounterVec
	tunnels         *prometheus.GaugeVec
	refusals        *prometheus.CounterVec
	plaintext       *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		connections:     counter("weft_gateway_connections_total", "Connections of applications that have ended, by direction, whether they crossed clusters, and whether a backend was reached.", "direction", "cross", "result"),
		openConnections: gauge("weft_gateway_open_connections", "Connections of applications under way.", "direction"),
		bytes:           counter("weft_gateway_bytes_total", "Bytes of applications relayed by connections that have ended, from callers (sent) and to them (received).", "direction", "way"),
		attempts:        counter("weft_gateway_attempts_total", "Candidates tried, by outcome.", "outcome"),
		ejections:       prometheus.NewCounter(prometheus.CounterOpts{Name: "weft_gateway_ejections_total", Help: "Endpoints set aside because they failed again and again."}),
		handshakes:      counter("weft_gateway_handshakes_total", "TLS handshakes of tunnels, by side and result.", "side", "result"),
		tunnels:         gauge("weft_gateway_tunnels", "Tunnels that are open, by side.", "side"),
		refusals:        counter("weft_gateway_refusals_total", "Streams refused to other clusters, by status.", "status"),
		plaintext:       counter("weft_gateway_unadmitted_total", "Connections to a TLS listener that were closed before a handshake, by reason.", "reason"),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.connections, m.openConnections, m.bytes, m.attempts, m.ejections,
		m.handshakes, m.tunnels, m.refusals, m.plaintext,
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("gateway: metrics: %w (one engine per registry)", err)
		}
	}
	return m, nil
}

func (m *metrics) ended(r *Record) {
	d := r.Direction.String()
	m.openConnections.WithLabelValues(d).Dec()
	result, cross := "unserved", "no"
	if r.Connected {
		result = "served"
	}
	if r.Cross() {
		cross = "yes"
	}
	m.connections.WithLabelValues(d, cross, result).Inc()
	m.bytes.WithLabelValues(d, "sent").Add(float64(r.Sent))
	m.bytes.WithLabelValues(d, "received").Add(float64(r.Received))
}
