package demo

import (
	"errors"
	"testing"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// timeline builds outcomes of 1 ms each, one after the other, from a string:
// '.' is a success, 'x' a failure.
func timeline(start time.Time, text string) []outcome {
	var out []outcome
	for i, c := range text {
		o := outcome{started: start.Add(time.Duration(i) * time.Millisecond), cluster: "a"}
		o.ended = o.started.Add(time.Millisecond)
		if c == 'x' {
			o.cluster, o.err = "", errors.New("refused")
		}
		out = append(out, o)
	}
	return out
}

func dots(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = '.'
	}
	return string(b)
}

func TestRecoveryIsTheFirstOfAHundredSuccesses(t *testing.T) {
	start := time.Unix(0, 0)
	fault := start.Add(10 * time.Millisecond)
	for name, tc := range map[string]struct {
		text string
		want time.Duration
		ok   bool
	}{
		"never failed":          {dots(200), 0, true},
		"failed before":         {"xxxx" + dots(200), 0, true},
		"failed for 5 ms":       {dots(10) + "xxxxx" + dots(100), 6 * time.Millisecond, true},
		"fell back":             {dots(10) + "x" + dots(99) + "x" + dots(100), 102 * time.Millisecond, true},
		"too few to be sure":    {dots(10) + "x" + dots(99), 0, false},
		"nothing after a fault": {dots(9), 0, false},
	} {
		if got, ok := recovery(timeline(start, tc.text), fault); got != tc.want || ok != tc.ok {
			t.Errorf("%s: got %v, %v; want %v, %v", name, got, ok, tc.want, tc.ok)
		}
	}
}

func TestJudgeExcusesOnlyWhatWasInFlight(t *testing.T) {
	start := time.Unix(0, 0)
	kill := start.Add(10*time.Millisecond + 500*time.Microsecond)
	inFlight := dots(10) + "x" + dots(150)
	late := dots(10) + "xx" + dots(150)
	a := act{name: "kill", kills: true, disturbs: true}
	if s := judge(a, timeline(start, inFlight), []lab.Death{{Sent: kill, Gone: kill}}, time.Second); !s.OK || s.Failed != 1 || s.Excused != 1 {
		t.Errorf("in flight at the kill: %+v", s)
	}
	if s := judge(a, timeline(start, late), []lab.Death{{Sent: kill, Gone: kill}}, time.Second); s.OK || s.Failed != 2 || s.Excused != 1 {
		t.Errorf("one after the kill: %+v", s)
	}
	slow := lab.Death{Sent: kill, Gone: kill.Add(2 * time.Millisecond)}
	if s := judge(a, timeline(start, late), []lab.Death{slow}, time.Second); !s.OK || s.Excused != 2 {
		t.Errorf("both met a process that was dying: %+v", s)
	}
	if s := judge(act{name: "steady"}, timeline(start, inFlight), []lab.Death{{Sent: kill, Gone: kill}}, time.Second); s.OK {
		t.Errorf("a step without kills excuses nothing: %+v", s)
	}
	if s := judge(act{name: "steady"}, nil, nil, time.Second); s.OK {
		t.Error("no requests at all passed")
	}
}

func TestReportNeedsEveryStepAndCheck(t *testing.T) {
	for name, tc := range map[string]struct {
		r    Report
		want bool
	}{
		"empty":      {Report{}, false},
		"good":       {Report{Steps: []Step{{OK: true}}, Checks: []Check{{OK: true}}}, true},
		"bad step":   {Report{Steps: []Step{{OK: true}, {}}}, false},
		"bad check":  {Report{Steps: []Step{{OK: true}}, Checks: []Check{{}}}, false},
		"only check": {Report{Checks: []Check{{OK: true}}}, false},
	} {
		tc.r.conclude()
		if tc.r.OK != tc.want {
			t.Errorf("%s: got %v", name, tc.r.OK)
		}
	}
}
