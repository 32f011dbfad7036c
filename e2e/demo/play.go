package demo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weftmesh/weft/e2e/lab"
)

// Options of the play.
type Options struct {
	Out      io.Writer // the play for a person; discarded if nil
	Terminal bool      // Out is a terminal: show a live line and colours
	Steps    []string  // names of the steps to play; empty is all
	Keep     bool      // leave the mesh running until ctx ends
	Binaries string
	Rate     int // requests a second; 0 is 200
}

// StepNames are the names of the steps in their order.
func StepNames() []string {
	var names []string
	for _, s := range script() {
		names = append(names, s.name)
	}
	return names
}

// player is one run of the play.
type player struct {
	Options
	stage  *stage
	load   *load
	echo   *echoStream
	report Report

	mu    sync.Mutex
	phase string // what the live line says
}

// scene is one step: what it does, and what that may cost.
type scene struct {
	act
	// play does the step, and returns its kills.
	play func(context.Context, *player) ([]lab.Death, error)
}

// Lengths of the scenes. Everything together stays under 90 s.
const (
	steadyFor  = 8 * time.Second
	afterKill  = 8 * time.Second
	drainOver  = 10 * time.Second
	afterDrain = 3 * time.Second
	controlOff = 10 * time.Second
	returnFor  = 10 * time.Second
)

func script() []scene {
	return []scene{
		{act{name: "steady", title: "everything is well"}, steady},
		{act{name: "kill-backends", title: "eu-1's backends are killed", kills: true, disturbs: true}, killLocal},
		{act{name: "drain", title: "eu-2 is drained over 10 s"}, drain},
		{act{name: "kill-controller", title: "the controller is killed for 10 s, and a backend in us-1 with it", kills: true, disturbs: true}, killController},
		{act{name: "return", title: "everything returns"}, comeBack},
	}
}

// Run puts the play on. The report is good as far as it goes also when there
// is an error.
func Run(ctx context.Context, o Options) (report *Report, err error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.Rate == 0 {
		o.Rate = 200
	}
	scenes, err := choose(o.Steps)
	if err != nil {
		return nil, err
	}
	l, err := lab.New(ctx, lab.Options{Binaries: o.Binaries})
	if err != nil {
		return nil, err
	}
	p := &player{Options: o}
	fmt.Fprintf(o.Out, "Starting three clusters in %s\n", l.Dir)
	p.stage, err = setUp(ctx, l, func(format string, args ...any) { fmt.Fprintf(o.Out, "   "+format+"\n", args...) })
	defer func() {
		if cerr := p.stage.close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("tidying up: %w", cerr))
		}
	}()
	if err != nil {
		return &p.report, errors.Join(err, p.logs(err))
	}
	if err := p.perform(ctx, scenes); err != nil {
		return &p.report, errors.Join(err, p.logs(err))
	}
	if o.Keep {
		p.keep(ctx)
	}
	return &p.report, nil
}

// choose picks the scenes by their names.
func choose(names []string) ([]scene, error) {
	all := script()
	if len(names) == 0 {
		return all, nil
	}
	var out []scene
	for _, n := range names {
		if !slices.Contains(StepNames(), n) {
			return nil, fmt.Errorf("no step %q; there are %s", n, strings.Join(StepNames(), ", "))
		}
	}
	for _, s := range all { // in their own order: each builds on those before
		if slices.Contains(names, s.name) {
			out = append(out, s)
		}
	}
	return out, nil
}

// perform plays the scenes under load and judges them.
func (p *player) perform(ctx context.Context, scenes []scene) error {
	address, err := p.stage.address(ctx, payments, paymentsPort)
	if err != nil {
		return err
	}
	echoAddress, err := p.stage.address(ctx, echo, echoPort)
	if err != nil {
		return err
	}
	playing, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	p.load = newLoad("http://payments.shop.svc.clusterset.local/", address, p.Rate, 5*time.Second)
	p.echo, err = openEcho(playing, echoAddress)
	if err != nil {
		return err
	}
	fmt.Fprintf(p.Out, "Clients in eu-1: %d requests/s to %s (%s), and one echo stream to %s: %s\n", p.Rate, payments, address, eu2, p.echo.greeting)
	wg.Go(func() { p.load.run(playing) })
	if p.Terminal {
		wg.Go(func() { p.live(playing) })
	}
	for i, sc := range scenes {
		if err := p.scene(playing, i+1, sc); err != nil {
			return err
		}
	}
	stop()
	wg.Wait()
	return p.finish(ctx)
}

func (p *player) scene(ctx context.Context, number int, sc scene) error {
	p.print("%s %s\n", p.bold(fmt.Sprintf("Step %d (%s):", number, sc.name)), sc.title)
	p.setPhase(sc.name)
	mark, began := p.load.mark(), time.Now()
	faults, err := sc.play(ctx, p)
	if err != nil {
		return fmt.Errorf("step %s: %w", sc.name, err)
	}
	took := time.Since(began)
	step := judge(sc.act, p.load.since(mark), faults, took)
	if sc.name == "drain" {
		if lines, err := p.echo.state(); err != nil {
			step.fail("the echo stream broke: %v", err)
		} else if lines == 0 {
			step.fail("the echo stream is silent")
		}
	}
	step.Why, _, err = p.stage.lab.Weft(ctx, "why", payments, "--from", eu1)
	if err != nil {
		step.fail("%v", err)
	}
	p.report.Steps = append(p.report.Steps, step)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clearLine()
	step.write(p.Out, p.Terminal)
	return ctx.Err()
}

func steady(ctx context.Context, _ *player) ([]lab.Death, error) {
	return nil, rest(ctx, steadyFor)
}

func killLocal(ctx context.Context, p *player) ([]lab.Death, error) {
	faults, err := p.stage.killBackends(eu1, 0, 1)
	if err != nil {
		return nil, err
	}
	return faults, rest(ctx, afterKill)
}

func drain(ctx context.Context, p *player) ([]lab.Death, error) {
	if _, _, err := p.stage.lab.Weft(ctx, "drain", eu2, "--over", drainOver.String(), "--timeout", "30s"); err != nil {
		return nil, err
	}
	return nil, rest(ctx, afterDrain)
}

func killController(ctx context.Context, p *player) ([]lab.Death, error) {
	killed, err := p.stage.controller.Kill()
	if err != nil {
		return nil, err
	}
	if err := rest(ctx, controlOff/4); err != nil {
		return nil, err
	}
	faults, err := p.stage.killBackends(us1, 0)
	if err != nil {
		return nil, err
	}
	if err := rest(ctx, time.Until(killed.Sent.Add(controlOff))); err != nil {
		return nil, err
	}
	if err := p.stage.controller.Start(); err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := p.stage.controller.Ready(wait); err != nil {
		return nil, err
	}
	return faults, p.until(ctx, "eu-1's agent to be back", func(w why) bool { return !w.Predicted })
}

func comeBack(ctx context.Context, p *player) ([]lab.Death, error) {
	if !p.stage.controller.Running() {
		return nil, errors.New("the controller is not back")
	}
	for cluster, backends := range p.stage.backends {
		for n, b := range backends {
			if !b.Running() {
				if err := p.stage.startBackends(cluster, n); err != nil {
					return nil, err
				}
			}
		}
	}
	if _, _, err := p.stage.lab.Weft(ctx, "undrain", eu2); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := p.until(ctx, "eu-1 to serve itself again", func(w why) bool { return w.share(eu1) == 1000 && w.acked() }); err != nil {
		return nil, err
	}
	return nil, rest(ctx, returnFor-time.Since(began))
}

// errNotYet: the plan is there, and is not what is waited for.
var errNotYet = errors.New("the plan is another")

// until waits until the plan of payments from eu-1 is as it should be.
func (p *player) until(ctx context.Context, what string, good func(why) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		w, err := p.stage.why(ctx, payments)
		if err == nil && good(w) {
			return nil
		}
		if rest(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("waited in vain for %s: %w, %+v", what, cmp.Or(err, errNotYet), w.Plan.Verdicts)
		}
	}
}

// rest waits, or returns ctx's error.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keep leaves the mesh running for a person to play with.
func (p *player) keep(ctx context.Context) {
	fmt.Fprintf(p.Out, "The mesh goes on until you press Ctrl-C. In another terminal:\n   export WEFT_CONTEXTS=%s\n   weft get clusters\n   weft why %s --from %s\n", p.stage.lab.Contexts, payments, eu1)
	<-ctx.Done()
}

// logs is the end of what the processes printed that are not well.
func (p *player) logs(cause error) error {
	if errors.Is(cause, context.Canceled) {
		return nil
	}
	var b strings.Builder
	for _, proc := range p.stage.lab.Processes() {
		if strings.Contains(proc.Name, "backend") {
			continue
		}
		fmt.Fprintf(&b, "--- %s\n%s\n", proc.Name, proc.Tail(5))
	}
	return fmt.Errorf("the processes' last words:\n%s", b.String())
}
