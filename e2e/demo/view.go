package demo

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// live redraws one line with what the callers see, until ctx ends.
func (p *player) live(ctx context.Context) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case <-ctx.Done():
			p.mu.Lock()
			p.clearLine()
			p.mu.Unlock()
			return
		case <-tick.C:
		}
		line := p.liveLine(time.Since(began))
		p.mu.Lock()
		fmt.Fprintf(p.Out, "\r\x1b[K%s", line)
		p.mu.Unlock()
	}
}

// liveLine sums the last second up.
func (p *player) liveLine(elapsed time.Duration) string {
	const width = 10
	now := time.Now()
	all := p.load.since(0)
	served, failed, total := map[string]int{}, 0, 0
	for i := len(all) - 1; i >= 0 && now.Sub(all[i].ended) < time.Second; i-- {
		total++
		if all[i].err != nil {
			failed++
			continue
		}
		served[all[i].cluster]++
	}
	p.mu.Lock()
	phase := p.phase
	p.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "   %4.0fs  %-15s %3d/s  ", elapsed.Seconds(), phase, total)
	for _, c := range []string{eu1, eu2, us1} {
		n := 0
		if total > 0 {
			n = (served[c]*width + total - 1) / total
		}
		bar := strings.Repeat("■", n) + strings.Repeat("·", width-n)
		code := "36"
		if served[c] == 0 {
			code = "2"
		}
		fmt.Fprintf(&b, "%s %s  ", c, colour(code, bar, true))
	}
	code := "32"
	if failed > 0 {
		code = "31"
	}
	fmt.Fprintf(&b, "failed %s", colour(code, fmt.Sprint(failed), true))
	return b.String()
}

func (p *player) setPhase(s string) {
	p.mu.Lock()
	p.phase = s
	p.mu.Unlock()
}

// clearLine removes the live line; the caller holds mu.
func (p *player) clearLine() {
	if p.Terminal {
		fmt.Fprint(p.Out, "\r\x1b[K")
	}
}

func (p *player) print(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clearLine()
	fmt.Fprintf(p.Out, format, args...)
}

func (p *player) bold(s string) string { return colour("1", s, p.Terminal) }
