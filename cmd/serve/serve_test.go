package serve

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

// TestMain runs this test binary as a server process where a test asks for it.
func TestMain(m *testing.M) {
	switch os.Getenv("SERVE_TEST_PROGRAM") {
	case "drains":
		Main(Program{Name: "weft-test", Admin: "127.0.0.1:0"}, drains(false))
	case "sticks":
		Main(Program{Name: "weft-test", Admin: "127.0.0.1:0"}, drains(true))
	}
	goleak.VerifyTestMain(m)
}

// drains is a program whose one task says when it is told to stop, and then
// stops, or never does.
func drains(sticks bool) func(*Flags) Wire {
	return func(*Flags) Wire {
		return func(context.Context, *Process) ([]Task, error) {
			return []Task{{Name: "work", Run: func(ctx context.Context) error {
				os.Stdout.WriteString("working\n")
				<-ctx.Done()
				os.Stdout.WriteString("draining\n")
				if sticks {
					select {}
				}
				return nil
			}}}, nil
		}
	}
}

type settings struct {
	name    string
	count   int
	wait    time.Duration
	token   string
	peers   []string
	sockets []map[string]string
}

func (s *settings) define(f *Flags) Wire {
	f.StringVar(&s.name, "name", "unnamed", "name")
	f.IntVar(&s.count, "count", 3, "count")
	f.DurationVar(&s.wait, "wait", time.Second, "wait")
	f.StringVar(&s.token, "join-token", "", "token")
	f.Secret("join-token")
	f.Strings(&s.peers, "peers", []string{"a:1"}, "peers")
	f.Records(&s.sockets, "socket", []string{"path", "identity"}, "sockets")
	return func(context.Context, *Process) ([]Task, error) { return nil, nil }
}

func testWorld(t *testing.T, env map[string]string, files map[string]string, args ...string) (world, *bytes.Buffer, *bytes.Buffer) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	return world{
		args:   args,
		getenv: func(k string) (string, bool) { v, ok := env[k]; return v, ok },
		read: func(path string) ([]byte, error) {
			if text, ok := files[path]; ok {
				return []byte(text), nil
			}
			return nil, os.ErrNotExist
		},
		stdout:  &stdout,
		stderr:  &syncWriter{w: &stderr},
		signals: make(chan os.Signal),
		exit:    func(int) { t.Error("exit called") },
	}, &stdout, &stderr
}

type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *syncWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

func TestPrecedence(t *testing.T) {
	var s settings
	w, _, stderr := testWorld(t,
		map[string]string{"WEFT_TEST_COUNT": "5", "WEFT_COUNT": "6", "WEFT_NAME": "from-env", "WEFT_PEERS": "b:1, c:1"},
		map[string]string{"/c.yaml": `
name: from-file
count: 9
wait: 7s
socket:
- {path: /run/a, identity: gateway}
- path: /run/b
`},
		"--config", "/c.yaml", "--name", "from-flag")
	if code := run(Program{Name: "weft-test"}, s.define, w); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	want := settings{
		name: "from-flag", count: 5, wait: 7 * time.Second, peers: []string{"b:1", "c:1"},
		sockets: []map[string]string{{"path": "/run/a", "identity": "gateway"}, {"path": "/run/b"}},
	}
	if diff := cmp.Diff(want, s, cmp.AllowUnexported(settings{})); diff != "" {
		t.Errorf("settings (-want +got):\n%s", diff)
	}
}

func TestPrintConfigIsAConfigFileWithoutSecrets(t *testing.T) {
	var s settings
	w, stdout, _ := testWorld(t, nil, nil, "--print-config", "--join-token", "hush", "--peers", "x:1", "--peers", "y:1",
		"--socket", "path=/run/a,identity=gateway", "--wait", "2s")
	if code := run(Program{Name: "weft-test"}, s.define, w); code != 0 {
		t.Fatalf("exit %d", code)
	}
	out := stdout.String()
	if strings.Contains(out, "hush") || !strings.Contains(out, "join-token: (redacted)") {
		t.Errorf("the secret must be left out:\n%s", out)
	}
	var again settings
	w, _, stderr := testWorld(t, nil, map[string]string{"/c": out}, "--config", "/c")
	if code := run(Program{Name: "weft-test"}, again.define, w); code != 0 {
		t.Fatalf("exit %d: %s\nfile:\n%s", code, stderr, out)
	}
	again.token, s.token = "", ""
	if diff := cmp.Diff(s, again, cmp.AllowUnexported(settings{})); diff != "" {
		t.Errorf("read again (-first +second):\n%s", diff)
	}
}

func TestWrongSettingsAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		env  map[string]string
		file string
		want string // part of what is said
	}{
		{name: "unknown flag", args: []string{"--nmae", "x"}, want: `unknown flag --nmae; did you mean "name"?`},
		{name: "nothing near", args: []string{"--zzzzzzzz", "x"}, want: `--help lists`},
		{name: "bad value", args: []string{"--count", "many"}, want: `invalid value "many" for flag -count`},
		{name: "argument", args: []string{"serve"}, want: `unexpected argument "serve"`},
		{name: "environment", env: map[string]string{"WEFT_TEST_WAIT": "soon"}, want: "environment WEFT_TEST_WAIT"},
		{name: "unknown key", file: "cuont: 1", want: `unknown setting "cuont"; did you mean "count"?`},
		{name: "all keys", file: "cuont: 1\nnaem: 1", want: `unknown setting "naem"; did you mean "name"?`},
		{name: "twice", file: "count: 1\ncount: 2", want: `already set`},
		{name: "list for one", file: "count: [1]", want: "count: must be one value, not a list"},
		{name: "map for one", file: "count: {a: 1}", want: "count: must be one value, not a map"},
		{name: "no value", file: "count:", want: "count: has no value"},
		{name: "unknown record key", file: "socket: [{pth: a}]", want: `unknown key "pth" (keys: path, identity)`},
		{name: "no map", file: "- 1", want: "must be a map of settings"},
		{name: "no YAML", file: "a: [", want: "config file /c.yaml"},
		{name: "huge", file: strings.Repeat("#", maxConfigBytes+1), want: "the limit is"},
		{name: "no file", args: []string{"--config", "/absent"}, want: "cannot read the config file"},
		{name: "level", args: []string{"--log-level", "loud"}, want: "must be debug, info, warn or error"},
		{name: "format", args: []string{"--log-format", "xml"}, want: "must be text or json"},
		{name: "public admin", args: []string{"--admin", "0.0.0.0:0"}, want: "must be a loopback address"},
		{name: "no port", args: []string{"--admin", "127.0.0.1"}, want: "write it as 127.0.0.1:PORT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{}
			if tt.file != "" {
				files["/c.yaml"] = tt.file
				tt.args = append(tt.args, "--config", "/c.yaml")
			}
			var s settings
			w, _, stderr := testWorld(t, tt.env, files, tt.args...)
			if code := run(Program{Name: "weft-test"}, s.define, w); code != exitUsage {
				t.Errorf("exit %d, want %d", code, exitUsage)
			}
			if !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("said %q, want it to hold %q", stderr, tt.want)
			}
		})
	}
}

func TestBusyPortNamesTheFlag(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var s settings
	w, _, stderr := testWorld(t, nil, nil, "--admin", ln.Addr().String())
	if code := run(Program{Name: "weft-test"}, s.define, w); code != exitFailed {
		t.Errorf("exit %d, want %d", code, exitFailed)
	}
	if got := stderr.String(); !strings.Contains(got, ln.Addr().String()) || !strings.Contains(got, "--admin") {
		t.Errorf("said %q, want the address and the flag", got)
	}
}

func TestHelpListsEverySetting(t *testing.T) {
	var s settings
	w, stdout, _ := testWorld(t, nil, nil, "--help")
	if code := run(Program{Name: "weft-test", Summary: "is tested"}, s.define, w); code != 0 {
		t.Errorf("exit %d", code)
	}
	for _, want := range []string{"is tested", "--join-token", "--socket", "--config", "--admin", "WEFT_TEST_LOG_LEVEL"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("help does not hold %q:\n%s", want, stdout)
		}
	}
}

func TestTasksStopInReverseOrder(t *testing.T) {
	var (
		mu    sync.Mutex
		order []string
	)
	task := func(name string) Task {
		return Task{Name: name, Run: func(ctx context.Context) error {
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			order = append(order, name)
			return ctx.Err()
		}}
	}
	w, _, stderr := testWorld(t, nil, nil)
	signals := make(chan os.Signal)
	w.signals = signals
	started := make(chan struct{})
	wire := func(context.Context, *Process) ([]Task, error) {
		return []Task{
			task("store"), task("sessions"),
			{Name: "once", Run: func(context.Context) error { return nil }},
			{Name: "listener", Run: func(ctx context.Context) error {
				close(started)
				return task("listener").Run(ctx)
			}},
		}, nil
	}
	go func() {
		<-started
		signals <- syscall.SIGTERM
	}()
	if code := run(Program{Name: "weft-test"}, func(*Flags) Wire { return wire }, w); code != 0 {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if diff := cmp.Diff([]string{"listener", "sessions", "store"}, order); diff != "" {
		t.Errorf("stopped in this order (-want +got):\n%s", diff)
	}
}

func TestAFailedTaskStopsTheOthers(t *testing.T) {
	w, _, stderr := testWorld(t, nil, nil)
	stopped := false
	wire := func(context.Context, *Process) ([]Task, error) {
		return []Task{
			{Name: "healthy", Run: func(ctx context.Context) error { <-ctx.Done(); stopped = true; return nil }},
			{Name: "broken", Run: func(context.Context) error { return errors.New("disk on fire") }},
		}, nil
	}
	if code := run(Program{Name: "weft-test"}, func(*Flags) Wire { return wire }, w); code != exitFailed {
		t.Errorf("exit %d, want %d", code, exitFailed)
	}
	if !stopped {
		t.Error("the healthy task was not stopped")
	}
	if !strings.Contains(stderr.String(), "broken: disk on fire") {
		t.Errorf("said %q, want the task and its error", stderr)
	}
}

func TestAStuckTaskIsNamed(t *testing.T) {
	w, _, stderr := testWorld(t, nil, nil, "--drain-timeout", "10ms")
	release := make(chan struct{})
	wire := func(context.Context, *Process) ([]Task, error) {
		return []Task{
			{Name: "stuck", Run: func(context.Context) error { <-release; return nil }},
			{Name: "broken", Run: func(context.Context) error { return errors.New("no") }},
		}, nil
	}
	code := run(Program{Name: "weft-test"}, func(*Flags) Wire { return wire }, w)
	close(release)
	if code != exitFailed || !strings.Contains(stderr.String(), "not stopped after 10ms: stuck") {
		t.Errorf("exit %d, said %q; want the stuck task named", code, stderr)
	}
}

func TestAdmin(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	w, _, stderr := testWorld(t, nil, nil, "--admin", addr)
	signals := make(chan os.Signal)
	w.signals = signals
	var down sync.Map // whether the dependency is down
	wire := func(_ context.Context, p *Process) ([]Task, error) {
		p.In("eu-1", "eu")
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "weft_test_things_total", Help: "Things."})
		p.Metrics.MustRegister(c)
		p.Ready.Add("controller", func(context.Context) error {
			if _, ok := down.Load("it"); ok {
				return errors.New("no route")
			}
			return nil
		})
		return []Task{{Name: "work", Run: func(ctx context.Context) error { <-ctx.Done(); return nil }}}, nil
	}
	exited := make(chan int, 1)
	go func() {
		exited <- run(Program{Name: "weft-test", Version: "v9"}, func(*Flags) Wire { return wire }, w)
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path, host string) (int, string) {
		req, err := http.NewRequest("GET", "http://"+addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if host != "" {
			req.Host = host
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	for code := 0; code == 0; { // until it listens
		code, _ = get("/healthz", "")
	}
	if code, body := get("/metrics", ""); code != 200 ||
		!strings.Contains(body, `weft_build_info{component="weft-test",go="go`) ||
		!strings.Contains(body, `weft_test_things_total{cluster="eu-1",region="eu"} 0`) ||
		!strings.Contains(body, "go_goroutines") {
		t.Errorf("metrics: %d\n%s", code, body)
	}
	if code, body := get("/readyz?verbose", ""); code != 200 || !strings.Contains(body, "[+] controller: ok") {
		t.Errorf("ready: %d %s", code, body)
	}
	down.Store("it", true)
	if code, body := get("/readyz", ""); code != 503 || !strings.Contains(body, "[-] controller: no route") {
		t.Errorf("not ready: %d %s", code, body)
	}
	if code, _ := get("/debug/pprof/goroutine?debug=1", ""); code != 200 {
		t.Errorf("pprof: %d", code)
	}
	if code, _ := get("/metrics", "attacker.example:80"); code != 403 {
		t.Errorf("asked by a foreign name: %d, want 403", code)
	}
	signals <- syscall.SIGTERM
	if code := <-exited; code != 0 {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	w, _, stderr := testWorld(t, map[string]string{"NOTIFY_SOCKET": path}, nil)
	if code := run(Program{Name: "weft-test"}, func(*Flags) Wire {
		return func(context.Context, *Process) ([]Task, error) { return nil, nil }
	}, w); code != 0 {
		t.Fatalf("exit %d: %s", code, stderr)
	}
	for _, want := range []string{"READY=1", "STOPPING=1"} {
		buf := make([]byte, 64)
		n, err := conn.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("heard %q, %v; want %q", buf[:n], err, want)
		}
	}
}

// A signal asks for a clean stop; another one, later, does not wait for it.
func TestSignalsOfARealProcess(t *testing.T) {
	for _, tt := range []struct {
		program string
		signals int
		code    int
	}{
		{program: "drains", signals: 1, code: 0},
		{program: "sticks", signals: 2, code: 1},
	} {
		t.Run(tt.program, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "SERVE_TEST_PROGRAM="+tt.program)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			expect(t, out, "working\n")
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			expect(t, out, "draining\n")
			exited := make(chan struct{})
			go func() { // signals that follow the first closely count as the first
				defer close(exited)
				for tt.signals == 2 && cmd.Process.Signal(syscall.SIGTERM) == nil {
					time.Sleep(10 * time.Millisecond)
				}
			}()
			_ = cmd.Wait()
			<-exited
			if got := cmd.ProcessState.ExitCode(); got != tt.code {
				t.Errorf("exit %d, want %d", got, tt.code)
			}
		})
	}
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	buf := make([]byte, len(want))
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != want {
		t.Fatalf("read %q, %v; want %q", buf, err, want)
	}
}
