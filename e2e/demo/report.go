package demo

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// Report is what the demo found. Its JSON is the demo's -o json.
type Report struct {
	OK    bool   `json:"ok"`
	Steps []Step `json:"steps"`
	// Checks are what must hold over the whole play.
	Checks []Check `json:"checks"`
}

// Step is one act as the callers saw it.
type Step struct {
	Name     string `json:"name"`
	Title    string `json:"title"`
	Requests int    `json:"requests"`
	Failed   int    `json:"failed"`
	// Excused are the failures of requests that were in flight at a kill.
	Excused int `json:"inFlightAtKill"`
	// RecoverMillis is the time from the fault to the first of 100 successes in
	// a row: 0 where no later request failed, -1 where it never came.
	RecoverMillis int64          `json:"recoverMillis"`
	ServedBy      map[string]int `json:"servedBy"`
	Seconds       float64        `json:"seconds"`
	Errors        []string       `json:"errors,omitempty"`
	Why           string         `json:"why,omitempty"`
	OK            bool           `json:"ok"`
	Problem       string         `json:"problem,omitempty"`
}

// Check is one promise and whether it was kept.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// act says what one step may cost.
type act struct {
	name, title string
	// kills says that requests in flight at a kill may fail, and no others.
	kills bool
	// disturbs says that there is a fault to recover from.
	disturbs bool
}

// judge sums the outcomes of an act up. faults are its kills.
func judge(a act, outcomes []outcome, faults []lab.Death, took time.Duration) Step {
	s := Step{
		Name: a.name, Title: a.title, Requests: len(outcomes), Seconds: took.Seconds(),
		ServedBy: map[string]int{}, OK: true,
	}
	errs := map[string]int{}
	for _, o := range outcomes {
		switch {
		case o.err == nil:
			s.ServedBy[o.cluster]++
		case a.kills && excused(o, faults):
			s.Failed++
			s.Excused++
			errs[o.err.Error()]++
		default:
			s.Failed++
			errs[o.err.Error()]++
		}
	}
	for _, text := range slices.Sorted(maps.Keys(errs)) {
		s.Errors = append(s.Errors, fmt.Sprintf("%d x %s", errs[text], text))
	}
	if a.disturbs && len(faults) > 0 {
		if d, ok := recovery(outcomes, faults[0].Sent); ok {
			s.RecoverMillis = d.Milliseconds()
		} else {
			s.RecoverMillis = -1
		}
	}
	switch unexcused := s.Failed - s.Excused; {
	case s.Requests == 0:
		s.fail("no request was made")
	case unexcused > 0 && a.kills:
		s.fail("%d requests failed that were not in flight at a kill", unexcused)
	case unexcused > 0:
		s.fail("%d requests failed, and none may", unexcused)
	case s.RecoverMillis < 0:
		s.fail("no %d successes in a row after the fault", successesInARow)
	}
	return s
}

func (s *Step) fail(format string, args ...any) {
	if s.OK {
		s.Problem = fmt.Sprintf(format, args...)
	}
	s.OK = false
}

// served is who served, the busiest first.
func (s Step) served() string {
	names := slices.SortedFunc(maps.Keys(s.ServedBy), func(a, b string) int {
		if n := s.ServedBy[b] - s.ServedBy[a]; n != 0 {
			return n
		}
		return strings.Compare(a, b)
	})
	var parts []string
	for _, n := range names {
		parts = append(parts, fmt.Sprintf("%s %d", n, s.ServedBy[n]))
	}
	if len(parts) == 0 {
		return "nobody"
	}
	return strings.Join(parts, ", ")
}

// write prints a step for a person.
func (s Step) write(w io.Writer, paint bool) {
	verdict := colour("32", "ok", paint)
	if !s.OK {
		verdict = colour("31", "FAILED: "+s.Problem, paint)
	}
	fmt.Fprintf(w, "   requests %d   failed %d", s.Requests, s.Failed)
	if s.Excused > 0 {
		fmt.Fprintf(w, " (%d in flight at the kill)", s.Excused)
	}
	switch {
	case s.RecoverMillis > 0:
		fmt.Fprintf(w, "   recovered in %d ms", s.RecoverMillis)
	case s.RecoverMillis < 0:
		fmt.Fprint(w, "   not recovered")
	}
	fmt.Fprintf(w, "   served by %s   %s\n", s.served(), verdict)
	for _, e := range s.Errors {
		fmt.Fprintf(w, "   ! %s\n", e)
	}
	if s.Why != "" {
		fmt.Fprintln(w, "   why:")
		for l := range strings.SplitSeq(strings.TrimRight(s.Why, "\n"), "\n") {
			fmt.Fprintln(w, strings.TrimRight("     "+l, " "))
		}
	}
	fmt.Fprintln(w)
}

func (c Check) write(w io.Writer, paint bool) {
	verdict := colour("32", "ok    ", paint)
	if !c.OK {
		verdict = colour("31", "FAILED", paint)
	}
	fmt.Fprintf(w, "   %s  %s: %s\n", verdict, c.Name, c.Detail)
}

func colour(code, s string, on bool) string {
	if !on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// conclude decides the whole.
func (r *Report) conclude() {
	r.OK = len(r.Steps) > 0
	for _, s := range r.Steps {
		r.OK = r.OK && s.OK
	}
	for _, c := range r.Checks {
		r.OK = r.OK && c.OK
	}
}

// WriteJSON writes the report for a program.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
