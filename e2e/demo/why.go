package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
)

// why is what 'weft why -o json' says, as far as the play needs it.
type why struct {
	Predicted bool
	Plan      struct {
		Verdicts []verdict
	}
	Proxies []struct {
		Name  string
		Acked bool
	}
}

type verdict struct {
	Cluster       string
	Tier          int
	SharePerMille int
	Readiness     struct{ Ready, Total int }
}

func (s *stage) why(ctx context.Context, service string) (why, error) {
	var w why
	out, _, err := s.lab.Weft(ctx, "why", service, "--from", eu1, "-o", "json", "--timeout", "3s")
	if err != nil {
		return w, err
	}
	return w, json.Unmarshal([]byte(out), &w)
}

// acked reports whether eu-1's own gateway says that it follows the plan.
func (w why) acked() bool {
	if w.Predicted || len(w.Proxies) == 0 {
		return false
	}
	for _, p := range w.Proxies {
		if !p.Acked {
			return false
		}
	}
	return true
}

// share is a cluster's part of tier 0, per mille.
func (w why) share(cluster string) int {
	for _, v := range w.Plan.Verdicts {
		if v.Cluster == cluster && v.Tier == 0 {
			return v.SharePerMille
		}
	}
	return 0
}

// settled says what is missing until the play can begin: all three clusters
// with both backends, eu-1 first.
func (w why) settled() error {
	for _, name := range []string{eu1, eu2, us1} {
		i := slices.IndexFunc(w.Plan.Verdicts, func(v verdict) bool { return v.Cluster == name })
		switch {
		case i < 0:
			return fmt.Errorf("%s does not export %s yet", name, payments)
		case w.Plan.Verdicts[i].Readiness.Ready < 2:
			return fmt.Errorf("%s has %d of 2 backends ready", name, w.Plan.Verdicts[i].Readiness.Ready)
		}
	}
	if w.share(eu1) != 1000 {
		return fmt.Errorf("%s has %d per mille of its own traffic", eu1, w.share(eu1))
	}
	if !w.acked() {
		return fmt.Errorf("the gateway of %s has not acknowledged the plan", eu1)
	}
	return nil
}
