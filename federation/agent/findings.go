package agent

import (
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// findingsMost bounds the findings that one part of the agent may have at a
// time: a folder of a thousand broken files needs no thousand findings.
const findingsMost = 100

// findings are the agent's own, by the part of it that found them. Each part
// replaces all of its own at once, so that one that is mended goes by itself.
// What changes is logged and reported to the controller.
type findings struct {
	clock   clock.Clock
	log     *slog.Logger
	cluster federation.ClusterID
	report  *reporter
	metrics *metrics

	mu   sync.Mutex
	from map[string]map[string]federation.Finding // part, then key
}

func newFindings(c clock.Clock, log *slog.Logger, cluster federation.ClusterID, report *reporter, m *metrics) *findings {
	return &findings{clock: c, log: log, cluster: cluster, report: report, metrics: m, from: make(map[string]map[string]federation.Finding)}
}

// set replaces what one part has found.
func (f *findings) set(part string, list []federation.Finding) {
	if len(list) > findingsMost {
		list = list[:findingsMost]
	}
	now := make(map[string]federation.Finding, len(list))
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.from[part]
	changes := make(map[string]*federationv1.Record)
	for _, x := range list {
		key := federationv1.FindingKey(f.cluster, x.Code, x.Subject).String()
		x.ReportedBy = "agent of " + string(f.cluster)
		old, had := before[key]
		if x.Since = old.Since; !had {
			x.Since = f.clock.Now().UTC()
		}
		now[key] = x
		if had && old.Message == x.Message {
			continue
		}
		f.log.Warn("finding", "code", string(x.Code), "subject", x.Subject.String(), "message", x.Message)
		changes[key] = federationv1.FindingRecord(f.cluster, x)
	}
	for key, old := range before {
		if _, still := now[key]; !still {
			f.log.Info("finding is over", "code", string(old.Code), "subject", old.Subject.String())
			changes[key] = nil
		}
	}
	f.from[part] = now
	f.metrics.findings.WithLabelValues(part).Set(float64(len(now)))
	f.report.set(changes)
}

// of are the present findings of one part, in no order.
func (f *findings) of(part string) []federation.Finding {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.from[part]))
}

// all are the present findings, in no order.
func (f *findings) all() []federation.Finding {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []federation.Finding
	for _, part := range f.from {
		for _, x := range part {
			out = append(out, x)
		}
	}
	return out
}
