package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func newRegistry(component, version string) *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "weft_build_info", Help: "What runs here; the value is always 1.",
		ConstLabels: prometheus.Labels{"component": component, "version": version, "go": runtime.Version()},
	})
	info.Set(1)
	r.MustRegister(info, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Ready holds what /readyz asks: named checks, all of which must pass. It is
// safe for concurrent use.
type Ready struct {
	mu       sync.Mutex
	checks   []check
	draining bool
}

type check struct {
	name string
	ask  func(context.Context) error
}

// Add adds a check of a dependency. ask says what is wrong, or nil; it is
// asked from many goroutines, and must return soon.
func (r *Ready) Add(name string, ask func(ctx context.Context) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checks = append(r.checks, check{name: name, ask: ask})
}

// drain makes the process unready for the rest of its life.
func (r *Ready) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// ask runs every check and describes each on a line of its own.
func (r *Ready) ask(ctx context.Context) (ok bool, lines []string) {
	r.mu.Lock()
	checks, draining := r.checks, r.draining
	r.mu.Unlock()
	ok = !draining
	if draining {
		lines = append(lines, "[-] process: is stopping")
	}
	for _, c := range checks {
		if err := c.ask(ctx); err != nil {
			ok = false
			lines = append(lines, fmt.Sprintf("[-] %s: %v", c.name, err))
			continue
		}
		lines = append(lines, fmt.Sprintf("[+] %s: ok", c.name))
	}
	return ok, lines
}

func (r *Ready) serve(w http.ResponseWriter, req *http.Request) {
	ctx, cancel := context.WithTimeout(req.Context(), 2*time.Second)
	defer cancel()
	ok, lines := r.ask(ctx)
	verdict := "ready"
	if !ok {
		verdict = "not ready"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	if req.URL.Query().Has("verbose") || !ok {
		fmt.Fprintln(w, strings.Join(lines, "\n"))
	}
	fmt.Fprintln(w, verdict)
}

// adminTask serves metrics, health and profiles. They need no credential, so
// only a loopback address is taken, and only requests that name one: a page
// in a browser cannot reach them by a DNS name of its own.
func adminTask(ctx context.Context, addr string, metrics *prometheus.Registry, ready *Ready, log *slog.Logger) (Task, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return Task{}, Usagef("--admin %q: write it as 127.0.0.1:PORT", addr)
	}
	if !isLoopback(host) {
		return Task{}, Usagef("--admin %q: metrics and profiles need no credential, so it must be a loopback address such as 127.0.0.1:PORT", addr)
	}
	ln, err := Listen(ctx, "admin", addr)
	if err != nil {
		return Task{}, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError), Registry: metrics,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", ready.serve)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	srv := &http.Server{
		Handler:           onlyLoopback(mux),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      2 * time.Minute, // a CPU profile takes the seconds that it is asked for
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	return Task{Name: "admin", Run: func(ctx context.Context) error {
		log.Info("admin listener", "address", ln.Addr().String())
		stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
		defer stop()
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}}, nil
}

func onlyLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if !isLoopback(strings.Trim(host, "[]")) {
			http.Error(w, "ask by a loopback address", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// Listen opens a TCP listener for the address that a flag gives. Its error
// names the flag, and says what to do about a port that is taken.
func Listen(ctx context.Context, flagName, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err == nil {
		return ln, nil
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("cannot listen on %s: another process has this port; stop it, or choose another with --%s", addr, flagName)
	}
	if errors.Is(err, syscall.EACCES) {
		return nil, fmt.Errorf("cannot listen on %s: this user may not open the port; choose one above 1023 with --%s", addr, flagName)
	}
	return nil, fmt.Errorf("cannot listen on %s (--%s): %w", addr, flagName, err)
}
