package serve

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weftmesh/weft/federation/clock"
)

// Program is one binary.
type Program struct {
	Name    string // of the binary: "weft-controller"
	Summary string // what it does, for --help
	Version string // set by the linker; empty means what the build recorded
	Admin   string // default of --admin
}

// Task is one thing that a process runs. Run returns when ctx ends, after it
// has put its own affairs in order, or earlier: with nil when its work is
// done, with an error when the process cannot go on.
type Task struct {
	Name string
	Run  func(ctx context.Context) error
}

// Wire builds a program's tasks once its settings are known. ctx ends when the
// process is told to stop. An error made by Usagef means that the settings are
// wrong.
type Wire func(ctx context.Context, p *Process) ([]Task, error)

// Process is what Wire builds with.
type Process struct {
	Log     *slog.Logger
	Metrics prometheus.Registerer
	Ready   *Ready
	Clock   clock.Clock
	Version string
}

// In names the cluster and the region that the process belongs to, empty where
// there is none: what is logged through Log and registered with Metrics from
// then on carries them.
func (p *Process) In(cluster, region string) {
	labels := prometheus.Labels{}
	if cluster != "" {
		labels["cluster"] = cluster
		p.Log = p.Log.With("cluster", cluster)
	}
	if region != "" {
		labels["region"] = region
		p.Log = p.Log.With("region", region)
	}
	p.Metrics = prometheus.WrapRegistererWith(labels, p.Metrics)
}

// UsageError says that the settings are wrong: the process exits with 2.
type UsageError struct{ err error }

func (e *UsageError) Error() string { return e.err.Error() }
func (e *UsageError) Unwrap() error { return e.err }

// Usagef makes a UsageError; it formats as fmt.Errorf does.
func Usagef(format string, args ...any) error {
	return &UsageError{err: fmt.Errorf(format, args...)}
}

// Names of the settings that every program has.
const (
	flagConfig      = "config"
	flagPrintConfig = "print-config"
	flagVersion     = "version"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// Main runs the program and exits. define registers the program's own flags
// and returns what builds its tasks from their values.
func Main(prog Program, define func(*Flags) Wire) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	os.Exit(run(prog, define, world{
		args:    os.Args[1:],
		getenv:  os.LookupEnv,
		read:    os.ReadFile,
		stdout:  os.Stdout,
		stderr:  os.Stderr,
		signals: signals,
		exit:    os.Exit,
	}))
}

// world is what a process has from the machine.
type world struct {
	args           []string
	getenv         func(string) (string, bool)
	read           func(path string) ([]byte, error)
	stdout, stderr io.Writer
	signals        <-chan os.Signal
	exit           func(code int) // does not return
}

func run(prog Program, define func(*Flags) Wire, w world) int {
	flags := newFlags(prog.Name)
	var (
		config       = flags.String(flagConfig, "", "YAML `file` with settings of the same names")
		printConfig  = flags.Bool(flagPrintConfig, false, "print the settings in effect, secrets left out, and exit")
		printVersion = flags.Bool(flagVersion, false, "print the version and exit")
		logFormat    = flags.String("log-format", "text", "`text` or json")
		logLevel     = flags.String("log-level", "info", "`level` to log from: debug, info, warn or error")
		admin        = flags.String("admin", prog.Admin, "loopback `address` of metrics, health and profiles; empty for none")
		drain        = flags.Duration("drain-timeout", 20*time.Second, "how long a stop may take before it is cut short")
	)
	_ = config // read by load
	wire := define(flags)

	fail := func(err error) int {
		fmt.Fprintf(w.stderr, "%s: %v\n", prog.Name, err)
		if usage := (*UsageError)(nil); errors.As(err, &usage) {
			return exitUsage
		}
		return exitFailed
	}
	if err := flags.load(w.args, w.getenv, w.read); errors.Is(err, flag.ErrHelp) {
		flags.help(w.stdout, prog.Summary)
		return exitOK
	} else if err != nil {
		return fail(err)
	}
	version := prog.Version
	if version == "" {
		version = builtVersion()
	}
	if *printVersion {
		fmt.Fprintln(w.stdout, prog.Name, version)
		return exitOK
	}
	if *printConfig {
		if err := flags.print(w.stdout); err != nil {
			return fail(err)
		}
		return exitOK
	}
	log, err := newLogger(w.stderr, *logFormat, *logLevel)
	if err != nil {
		return fail(err)
	}
	log = log.With("component", prog.Name)

	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	done := make(chan struct{})
	defer close(done)
	go func() {
		var first time.Time
		for {
			select {
			case <-done:
				return
			case s := <-w.signals:
				if first.IsZero() {
					first = time.Now()
					log.Info("stopping", "signal", s.String(), "drain", *drain)
					stop(errSignal)
				} else if time.Since(first) > sameSignal {
					fmt.Fprintf(w.stderr, "%s: second signal (%v): ending at once\n", prog.Name, s)
					w.exit(exitFailed)
				}
			}
		}
	}()

	registry := newRegistry(prog.Name, version)
	ready := &Ready{}
	tasks := []Task{}
	if *admin != "" {
		task, err := adminTask(ctx, *admin, registry, ready, log)
		if err != nil {
			return fail(err)
		}
		tasks = append(tasks, task)
	}
	own, err := wire(ctx, &Process{
		Log: log, Metrics: registry, Ready: ready, Clock: clock.Real(), Version: version,
	})
	if err != nil {
		if errors.Is(context.Cause(ctx), errSignal) {
			return exitOK
		}
		return fail(err)
	}
	log.Info("starting", "version", version)
	if err := runTasks(ctx, append(tasks, own...), *drain, ready, notifier(w.getenv, log), log); err != nil {
		log.Error("stopped", "error", err)
		return exitFailed
	}
	log.Info("stopped")
	return exitOK
}

// sameSignal is how close to the first a signal still counts as the first: a
// supervisor that tells the process, and then its whole group, means it once.
const sameSignal = 200 * time.Millisecond

var errSignal = errors.New("told to stop by a signal")

// builtVersion is what the Go build recorded of the module.
func builtVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (version == "" || version == "(devel)") {
			version = s.Value
		}
	}
	if version == "" {
		return "unknown"
	}
	return version
}

func newLogger(w io.Writer, format, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, Usagef("--log-level %q: must be debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, Usagef("--log-format %q: must be text or json", format)
}
