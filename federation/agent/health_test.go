package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// One failure makes nobody unready, and one success nobody ready again, where
// the check asks for more; the first outcome counts at once.
func TestChecksCountInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var states []string
		outcomes := []bool{false, true, true, false, true, false, false, false, true, false, true, true}
		var n atomic.Int32
		c := newChecker(clock.Real(), func(_ string, h health, why string) {
			if (h == healthFailing) != (why != "") {
				t.Errorf("%v: %q", h, why)
			}
			states = append(states, h.String())
		})
		c.probe = func(context.Context, check) error {
			i := int(n.Add(1)) - 1
			if i >= len(outcomes) || outcomes[i] {
				return nil
			}
			return errors.New("no")
		}
		ctx, cancel := context.WithCancel(t.Context())
		c.set(ctx, map[string]check{"a": {interval: time.Second, timeout: time.Second, unhealthyAfter: 3, healthyAfter: 2}})
		time.Sleep(30 * time.Second)
		synctest.Wait()
		cancel()
		c.wait()
		want := "failing ready failing ready"
		if got := strings.Join(states, " "); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if k := n.Load(); k < 27 || k > 34 {
			t.Errorf("%d checks in 30 s at one a second", k)
		}
	})
}

// A check that is not answered is a failure after its timeout; only so many run
// at once; one that is taken away reports no more.
func TestChecksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		failing, running, most := 0, 0, 0
		c := newChecker(clock.Real(), func(_ int, h health, why string) {
			if h == healthFailing && strings.Contains(why, "no answer in time") {
				failing++
			}
		})
		c.probe = func(ctx context.Context, _ check) error {
			mu.Lock()
			running++
			most = max(most, running)
			mu.Unlock()
			<-ctx.Done()
			mu.Lock()
			running--
			mu.Unlock()
			return checkError(ctx, ctx.Err())
		}
		want := make(map[int]check)
		for i := range 3 * checksAtOnce {
			want[i] = check{interval: time.Minute, timeout: time.Second, unhealthyAfter: 1, healthyAfter: 1}
		}
		ctx, cancel := context.WithCancel(t.Context())
		c.set(ctx, want)
		time.Sleep(3500 * time.Millisecond)
		synctest.Wait()
		if failing != len(want) || most != checksAtOnce {
			t.Errorf("%d of %d failed; %d ran at once, want %d", failing, len(want), most, checksAtOnce)
		}
		c.set(ctx, nil)
		time.Sleep(time.Hour)
		synctest.Wait()
		if failing != len(want) {
			t.Error("a check that was taken away reports")
		}
		cancel()
		c.wait()
	})
}

// Against real servers, each with its own way of failing.
func TestProbes(t *testing.T) {
	redirected := make(chan bool, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
		case "/moved":
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		case "/elsewhere":
			redirected <- true
		case "/bad":
			w.WriteHeader(http.StatusInternalServerError)
		case "/slow":
			<-r.Context().Done()
		case "/endless":
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	defer s.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	at := s.Listener.Addr().String()
	for name, tt := range map[string]struct {
		check check
		want  string
	}{
		"tcp":                  {check{address: at}, ""},
		"tcp, nobody listens":  {check{address: closed.Addr().String()}, "refused"},
		"http":                 {check{http: true, address: at, path: "/ok"}, ""},
		"http, a redirect":     {check{http: true, address: at, path: "/moved"}, ""},
		"http, an error":       {check{http: true, address: at, path: "/bad"}, "500"},
		"http, no answer":      {check{http: true, address: at, path: "/slow"}, "no answer in time"},
		"http, no end":         {check{http: true, address: at, path: "/endless"}, ""},
		"http, a silent port":  {check{http: true, address: silent.Addr().String(), path: "/"}, "no answer in time"},
		"http, nobody listens": {check{http: true, address: closed.Addr().String(), path: "/"}, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := withTimeout(t.Context(), clock.Real(), 300*time.Millisecond)
			defer cancel()
			err := probe(ctx, tt.check)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	select {
	case <-redirected:
		t.Error("a redirect was followed")
	default:
	}
}

// A backend that dies takes its cluster's share away, here and at the
// controller; the first one that is back brings it back.
func TestChecksMoveTraffic(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	backend := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	address := backend.Listener.Addr().String()
	c := h.config(t)
	write(t, c, "a.yaml", serviceYAML("payments", address)+"  healthCheck: {http: {path: /}, interval: 20ms, unhealthyAfter: 2}\n")
	a := start(t, c)
	ready := func() int { return int(h.record("ready/eu-1/shop/payments").GetReadiness().GetReady()) }
	eventually(t, "the own endpoint is ready", func() bool { return ready() == 1 && a.first(payments) == "eu-1" })
	backend.Close()
	eventually(t, "eu-2 takes over", func() bool { return a.first(payments) == "eu-2" && ready() == 0 })
	if f := a.findings.of("checks"); len(f) != 1 || f[0].Code != federation.CodeHealthCheckFailing {
		t.Errorf("findings %v", f)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	back := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}}
	back.Start()
	defer back.Close()
	eventually(t, "it is back", func() bool { return a.first(payments) == "eu-1" && ready() == 1 })
	eventually(t, "the finding is over", func() bool { return len(a.findings.of("checks")) == 0 })
}
