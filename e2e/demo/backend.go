package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// Backend serves the demo's two services until ctx ends: HTTP answers that say
// who serves (and /healthz) on httpAddr, and a server-first echo on echoAddr,
// unless that is empty.
func Backend(ctx context.Context, cluster, name, httpAddr, echoAddr string) error {
	var lc net.ListenConfig
	web, err := lc.Listen(ctx, "tcp", httpAddr)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer{Cluster: cluster, Backend: name})
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if echoAddr != "" {
		ln, err := lc.Listen(ctx, "tcp", echoAddr)
		if err != nil {
			return errors.Join(err, web.Close())
		}
		wg.Go(func() { serveEcho(ctx, ln, cluster) })
	}
	if err := srv.Serve(web); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// serveEcho greets first, then sends every line back.
func serveEcho(ctx context.Context, ln net.Listener, cluster string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			if _, err := fmt.Fprintf(c, "hello from %s\n", cluster); err != nil {
				return
			}
			for r := bufio.NewReader(c); ; {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if _, err := c.Write([]byte(line)); err != nil {
					return
				}
			}
		})
	}
}

// echoStream is one long-lived connection to the echo service.
type echoStream struct {
	greeting string

	mu    sync.Mutex
	lines int
	err   error
	done  chan struct{}
}

// openEcho connects through address and waits for the greeting: the server
// speaks first, before the client has sent a byte.
func openEcho(ctx context.Context, address string) (*echoStream, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	r := bufio.NewReader(c)
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	greeting, err := r.ReadString('\n')
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("no greeting from the echo service: %w", err)
	}
	s := &echoStream{greeting: greeting, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer c.Close()
		s.talk(ctx, c, r)
	}()
	return s, nil
}

func (s *echoStream) talk(ctx context.Context, c net.Conn, r *bufio.Reader) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		line := fmt.Sprintf("line %d\n", n)
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err := c.Write([]byte(line))
		var got string
		if err == nil {
			got, err = r.ReadString('\n')
		}
		if err == nil && got != line {
			err = fmt.Errorf("sent %q, got %q", line, got)
		}
		s.mu.Lock()
		if err != nil {
			s.err = err
			s.mu.Unlock()
			return
		}
		s.lines++
		s.mu.Unlock()
	}
}

// state is how many lines came back, and what ended the stream if it ended.
func (s *echoStream) state() (lines int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines, s.err
}
