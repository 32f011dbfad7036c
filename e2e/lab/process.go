package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is one program that the lab runs. It can be killed, paused and
// started again with the same arguments.
type Process struct {
	Name  string
	Admin string // HOST:PORT of its admin listener, or ""

	path string
	args []string
	env  []string
	log  string // file with what it prints; appended to by every start

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
	err    error         // how it ended
}

// Log is the file that holds what the process printed.
func (p *Process) Log() string { return p.log }

// Start runs the process. It is an error if it runs already.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		return fmt.Errorf("%s runs already", p.Name)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()                                                   // the child has its own descriptor
	cmd := exec.CommandContext(context.Background(), p.path, p.args...) // it ends by Stop or Kill
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), p.env...)
	// A group of its own, so that a Ctrl-C at the terminal reaches only us; and
	// no orphan if we are killed. The death signal follows the thread that
	// forked, so the fork happens on one that never ends while the child runs.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	exited := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		p.mu.Lock()
		p.cmd, p.err = nil, err
		p.mu.Unlock()
		close(exited)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	p.cmd, p.exited, p.err = cmd, exited, nil
	return nil
}

// exitText is how a process ended, for people.
func exitText(err error) string {
	if err == nil {
		return "with exit code 0"
	}
	return err.Error()
}

// Running reports whether the process runs.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd != nil
}

// Pid is the process id, or 0 if it does not run.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Signal sends a signal; it does nothing if the process does not run.
func (p *Process) Signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return nil
	}
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Death is when a process was killed: from the signal until the system had
// taken it apart. Until then its sockets still take connections, which then
// die with it.
type Death struct{ Sent, Gone time.Time }

// Kill ends the process without a warning, and waits until it is gone.
func (p *Process) Kill() (Death, error) {
	d := Death{Sent: time.Now()}
	err := p.Signal(syscall.SIGKILL)
	if !p.wait(10 * time.Second) {
		err = errors.Join(err, fmt.Errorf("%s (pid %d) is still there 10 s after it was killed", p.Name, p.Pid()))
	}
	d.Gone = time.Now()
	return d, err
}

// Stop asks the process to end, and kills it after the grace time.
func (p *Process) Stop(grace time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if p.wait(grace) {
		return nil
	}
	_, err := p.Kill()
	return errors.Join(fmt.Errorf("%s did not stop within %s and was killed", p.Name, grace), err)
}

// wait reports whether the process has ended within d.
func (p *Process) wait(d time.Duration) bool {
	p.mu.Lock()
	exited := p.exited
	p.mu.Unlock()
	if exited == nil {
		return true
	}
	select {
	case <-exited:
		return true
	case <-time.After(d):
		return false
	}
}

// Ready waits until /readyz says so, the process ends, or ctx does. Its error
// holds what the process printed last.
func (p *Process) Ready(ctx context.Context) error {
	var last string
	for {
		p.mu.Lock()
		running, exit := p.cmd != nil, p.err
		p.mu.Unlock()
		if !running {
			return fmt.Errorf("%s ended while it was starting (%s):\n%s", p.Name, exitText(exit), p.Tail(15))
		}
		ok, text := p.ask(ctx, "/readyz?verbose")
		if ok {
			return nil
		}
		if text != "" {
			last = text
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %s\n%s", p.Name, strings.TrimSpace(last), p.Tail(15))
		case <-time.After(25 * time.Millisecond):
		}
	}
}

func (p *Process) ask(ctx context.Context, path string) (bool, string) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Admin+path, http.NoBody)
	if err != nil {
		return false, err.Error()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false, ""
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.StatusCode == http.StatusOK, string(body)
}

// Tail is the last lines that the process printed.
func (p *Process) Tail(lines int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return "  " + strings.Join(all, "\n  ")
}

// Binaries finds Weft's programs: in dir, else beside the running program,
// else on PATH.
func Binaries(dir string, names ...string) (map[string]string, error) {
	if dir == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		dir = filepath.Dir(self)
	}
	found := make(map[string]string, len(names))
	for _, n := range names {
		path := filepath.Join(dir, n)
		if info, err := os.Stat(path); err != nil || info.IsDir() {
			path, err = exec.LookPath(n)
			if err != nil {
				return nil, fmt.Errorf("no program %s, neither in %s nor on PATH: build them all with 'make build'", n, dir)
			}
		}
		found[n] = path
	}
	return found, nil
}

// Metrics is what the process tells Prometheus.
func (p *Process) Metrics(ctx context.Context) (string, error) {
	ok, text := p.ask(ctx, "/metrics")
	if !ok {
		return "", fmt.Errorf("%s shows no metrics: %s", p.Name, text)
	}
	return text, nil
}
