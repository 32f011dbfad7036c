package demo

import (
	"bytes"
	"io"
	"net"
	"testing"
)

func TestRecorderForwardsAndHearsPlainRequests(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	got := make(chan []byte, 1)
	serve := func() {
		c, err := target.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		data, _ := io.ReadAll(c)
		_, _ = c.Write([]byte("bye"))
		got <- data
	}
	r, err := record(t.Context(), "127.0.0.1:0", target.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()

	send := func(parts ...[]byte) {
		t.Helper()
		go serve()
		c, err := net.Dial("tcp", r.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var want []byte
		for _, p := range parts {
			want = append(want, p...)
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.(*net.TCPConn).CloseWrite()
		if reply, err := io.ReadAll(c); err != nil || string(reply) != "bye" {
			t.Errorf("reply after half-close: %q, %v", reply, err)
		}
		if data := <-got; !bytes.Equal(data, want) {
			t.Errorf("forwarded %d bytes that differ from the %d sent", len(data), len(want))
		}
	}
	tls := append([]byte{0x16, 3, 1}, bytes.Repeat([]byte{0}, 200<<10)...)
	send(tls)
	if r.leaks.Load() != 0 || r.notTLS.Load() != 0 {
		t.Fatalf("TLS: %d leaks, %d not TLS", r.leaks.Load(), r.notTLS.Load())
	}
	// A request that two reads share must be heard all the same.
	half := len(marker) / 2
	send([]byte("GET / HTTP/1.1\r\n"+markerHeader+": "+marker[:half]), []byte(marker[half:]+"\r\n\r\n"))
	if r.leaks.Load() == 0 || r.notTLS.Load() != 1 {
		t.Errorf("plain request: %d leaks, %d not TLS; want at least 1 and 1", r.leaks.Load(), r.notTLS.Load())
	}
}
