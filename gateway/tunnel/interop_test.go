package tunnel

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// TestClientSpeaksToAnotherServer runs this client against x/net's server.
func TestClientSpeaksToAnotherServer(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		c, s := connPair(t, secure)
		served := make(chan struct{})
		go func() {
			defer close(served)
			(&http2.Server{}).ServeConn(s, &http2.ServeConnOpts{Handler: http.HandlerFunc(connectEcho)})
		}()
		client := Client(c, Config{})
		st, resp, err := client.Open(t.Context(), Request{Authority: "echo", Header: Header{{"weft-caller", "me"}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.Header.Get("weft-caller"); got != "me" {
			t.Errorf("header: %q", got)
		}
		roundTrip(t, st, st, st.CloseWrite)
		_, _, err = client.Open(t.Context(), Request{Authority: "refuse"})
		if r, ok := err.(*Refusal); !ok || r.Status != 503 {
			t.Errorf("refusal: %v", err)
		}
		client.Close()
		<-served
	})
}

func connectEcho(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Host != "echo" {
		http.Error(w, "no", 503)
		return
	}
	w.Header().Set("weft-caller", r.Header.Get("weft-caller"))
	w.WriteHeader(200)
	w.(http.Flusher).Flush()
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Body.Read(buf)
		w.Write(buf[:n])
		w.(http.Flusher).Flush()
		if err != nil {
			return
		}
	}
}

// roundTrip sends a few megabytes through an echo, in pieces of several sizes.
func roundTrip(t *testing.T, w io.Writer, r io.Reader, end func() error) {
	t.Helper()
	piece := strings.Repeat("warp and weft ", 10_000)
	go func() {
		for i := range 40 {
			io.WriteString(w, piece[:len(piece)/(1+i)])
		}
		end()
	}()
	want := 0
	for i := range 40 {
		want += len(piece) / (1 + i)
	}
	b, err := io.ReadAll(r)
	if err != nil || len(b) != want {
		t.Fatalf("%d of %d bytes came back, %v", len(b), want, err)
	}
	at := 0
	for i := range 40 {
		n := len(piece) / (1 + i)
		if string(b[at:at+n]) != piece[:n] {
			t.Fatalf("piece %d came back different", i)
		}
		at += n
	}
}

// TestServerServesAnotherClient runs x/net's transport against this server.
func TestServerServesAnotherClient(t *testing.T) {
	both(t, func(t *testing.T, secure bool) {
		c, s := connPair(t, secure)
		server := Serve(s, Config{}, func(in *Incoming) {
			if in.Authority != "echo" {
				in.Refuse(503, nil)
				return
			}
			st, _ := in.Accept(Header{{"weft-caller", in.Header.Get("weft-caller")}})
			if _, err := st.ReadFrom(st); err == nil {
				st.CloseWrite()
			}
		})
		cc, err := (&http2.Transport{AllowHTTP: true}).NewClientConn(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := cc.Ping(context.Background()); err != nil {
			t.Error(err)
		}
		connect := func(authority string, body io.ReadCloser) *http.Response {
			resp, err := cc.RoundTrip(&http.Request{
				Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
				Header: http.Header{"Weft-Caller": {"me"}}, Body: body, ContentLength: -1,
			})
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		pr, pw := io.Pipe()
		resp := connect("echo", pr)
		if resp.StatusCode != 200 || resp.Header.Get("weft-caller") != "me" {
			t.Errorf("answer: %v", resp)
		}
		roundTrip(t, pw, resp.Body, pw.Close)
		if resp := connect("other", http.NoBody); resp.StatusCode != 503 {
			t.Errorf("refusal: %v", resp.Status)
		}
		server.Drain()
		within(t, "the drain's end", server.Done())
		cc.Close()
	})
}
