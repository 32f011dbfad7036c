package relay

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// capture is the ClientHello that crypto/tls sends with this configuration.
func capture(tb testing.TB, cfg *tls.Config) []byte {
	tb.Helper()
	near, far := net.Pipe()
	cfg.InsecureSkipVerify = true // nothing is ever shaken
	go tls.Client(near, cfg).Handshake()
	defer near.Close()
	defer far.Close()
	buf := make([]byte, 32<<10)
	n, err := far.Read(buf)
	if err != nil {
		tb.Fatal(err)
	}
	return buf[:n]
}

const name = "8080.payments.shop.eu-1.example.p.weft"

func postQuantum(tb testing.TB) []byte {
	return capture(tb, &tls.Config{ServerName: name, NextProtos: []string{"weft/1", "h2"}, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519}})
}

// records cuts the one record of a hello into several.
func records(hello []byte, size int) []byte {
	var out []byte
	for body := hello[recordHeader:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, hello[0], hello[1], hello[2], byte(n>>8), byte(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

// read feeds bytes in segments of a size to ReadClientHello.
func read(tb testing.TB, p []byte, segment int, l HelloLimits) (*Hello, error) {
	tb.Helper()
	near, far := net.Pipe()
	go func() {
		for len(p) > 0 {
			n := min(segment, len(p))
			if _, err := near.Write(p[:n]); err != nil {
				break
			}
			p = p[n:]
		}
	}()
	defer near.Close()
	defer far.Close()
	return ReadClientHello(far, l)
}

func fault(err error) HelloFault {
	if he, ok := errors.AsType[*HelloError](err); ok {
		return he.Fault
	}
	return 0
}

func TestHelloInAnyPieces(t *testing.T) {
	pq := postQuantum(t)
	if len(pq) < 1400 {
		t.Fatalf("a post-quantum hello of only %d bytes", len(pq))
	}
	classic := capture(t, &tls.Config{ServerName: name, NextProtos: []string{"weft/1", "h2"}, CurvePreferences: []tls.CurveID{tls.X25519}})
	for _, hello := range [][]byte{pq, classic, records(pq, 100), records(pq, 1), records(classic, 7)} {
		for _, segment := range []int{1 << 20, 1448, 100, 1} {
			h, err := read(t, hello, segment, HelloLimits{})
			if err != nil {
				t.Fatalf("segments of %d: %v", segment, err)
			}
			if h.ServerName != name || !slices.Equal(h.ALPN, []string{"weft/1", "h2"}) || !bytes.Equal(h.Raw, hello) {
				t.Errorf("segments of %d: %q, %q, %d bytes of %d", segment, h.ServerName, h.ALPN, len(h.Raw), len(hello))
			}
		}
	}
}

func TestBytesBehindTheHelloAreKept(t *testing.T) {
	hello := append(postQuantum(t), "early data"...)
	h, err := read(t, hello, 1<<20, HelloLimits{})
	if err != nil || !bytes.Equal(h.Raw, hello[:len(h.Raw)]) || len(h.Raw) < len(hello)-10 {
		t.Errorf("%v", err)
	}
}

func TestHelloFaults(t *testing.T) {
	pq := postQuantum(t)
	padded := func(n int) []byte { // a hello with an unknown extension of n bytes
		body := append([]byte{}, pq[recordHeader+messageHeader:]...)
		at := 2 + 32
		at += 1 + int(body[at])
		at += 2 + int(binary.BigEndian.Uint16(body[at:]))
		at += 1 + int(body[at])
		binary.BigEndian.PutUint16(body[at:], binary.BigEndian.Uint16(body[at:])+uint16(4+n))
		body = append(body, 0xfa, 0xfa, byte(n>>8), byte(n))
		body = append(body, make([]byte, n)...)
		msg := append([]byte{clientHello, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
		return records(append([]byte{recordHandshake, 3, 1, 0, 0}, msg...), recordMost)
	}
	if h, err := read(t, padded(12000), 999, HelloLimits{}); err != nil || h.ServerName != name {
		t.Errorf("a hello of 13 KB: %v", err)
	}
	cut := append([]byte{}, pq...)
	cut[recordHeader+messageHeader+2+32] = 255 // session id of 255 bytes: everything behind it shifts
	for what, c := range map[string]struct {
		bytes []byte
		want  HelloFault
	}{
		"http":             {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), Plain},
		"one plain byte":   {[]byte("S"), Plain},
		"http/2 preface":   {[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Plain},
		"ssl 2":            {[]byte{0x16, 0x02, 0, 0, 10, 1}, Plain},
		"nothing":          {nil, Silent},
		"half":             {pq[:500], Silent},
		"no name":          {capture(t, &tls.Config{}), Nameless},
		"too large":        {padded(17000), TooLarge},
		"claims too much":  {[]byte{22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff}, TooLarge},
		"not a hello":      {[]byte{22, 3, 1, 0, 4, 2, 0, 0, 0}, Malformed},
		"empty record":     {[]byte{22, 3, 1, 0, 0}, Malformed},
		"shifted":          {cut, Malformed},
		"alert in between": {append(records(pq[:recordHeader+100], 100), 21, 3, 3, 0, 2, 2, 40), Malformed},
		"empty hello":      {[]byte{22, 3, 1, 0, 4, 1, 0, 0, 0}, Malformed},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := read(t, c.bytes, 1<<20, HelloLimits{Time: 100 * time.Millisecond})
			if fault(err) != c.want {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	near, far := net.Pipe()
	go func() { near.Write(pq[:100]); near.Close() }()
	if _, err := ReadClientHello(far, HelloLimits{}); fault(err) != Cut {
		t.Errorf("closed: %v", err)
	}
}

// TestHelloIsForwardedUnchanged shakes hands through a relay that has read the
// hello from single-byte segments.
func TestHelloIsForwardedUnchanged(t *testing.T) {
	app, client := tcpPair(t)
	backend, server := tcpPair(t)
	r := newRelay(t)
	ended := make(chan Result, 1)
	go func() {
		h, err := ReadClientHello(client, HelloLimits{})
		if err != nil {
			t.Error(err)
			return
		}
		ended <- r.Join(context.Background(), client, backend, Options{Prefix: h.Raw})
	}()
	cert := selfSigned(t)
	go func() {
		s := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{cert}})
		io.Copy(s, s)
		s.Close()
	}()
	c := tls.Client(app, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	text := strings.Repeat("through the eye of the needle ", 20000)
	go func() { io.WriteString(c, text); c.CloseWrite() }()
	b, err := io.ReadAll(c)
	if err != nil || string(b) != text {
		t.Errorf("%d bytes back, %v", len(b), err)
	}
	c.Close()
	<-ended
}

// FuzzClientHello has crypto/tls for a judge: what it takes for a ClientHello
// with a name must give the same name here, in any segmentation.
func FuzzClientHello(f *testing.F) {
	f.Add(postQuantum(f), 100)
	f.Add(records(postQuantum(f), 50), 7)
	f.Add(capture(f, &tls.Config{}), 1)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), 3)
	f.Add([]byte{22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff}, 1)
	f.Fuzz(func(t *testing.T, data []byte, segment int) {
		if segment < 1 || segment > 1<<15 || len(data) > 1<<15 {
			return
		}
		p := helloParser{limit: 16 << 10}
		var h *Hello
		var bad HelloFault
		for n := 0; n < len(data) && bad == 0; {
			n = min(n+segment, len(data))
			done, f := p.feed(data[:n])
			if bad = f; done {
				h, bad = parseHello(p.message)
				break
			}
		}
		var judged *tls.ClientHelloInfo
		cfg := &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
			judged = i
			return nil, errors.New("seen")
		}}
		tls.Server(script{bytes.NewReader(data)}, cfg).Handshake()
		switch {
		case judged == nil || bad == TooLarge || bad == Plain:
			// crypto/tls takes longer hellos, and records of other major versions.
		case judged.ServerName != "" && h == nil:
			// crypto/tls looks at what follows the hello in its record later.
			if want := messageLength(p.message); bad != Malformed || len(p.message) <= want {
				t.Errorf("crypto/tls reads the name %q, here: %v", judged.ServerName, bad)
			}
		case h != nil && (h.ServerName != judged.ServerName || !slices.Equal(h.ALPN, judged.SupportedProtos)):
			t.Errorf("%q %q here, %q %q in crypto/tls", h.ServerName, h.ALPN, judged.ServerName, judged.SupportedProtos)
		}
	})
}

// messageLength is what a message's header says.
func messageLength(m []byte) int {
	if len(m) < messageHeader {
		return messageHeader
	}
	return messageHeader + int(m[1])<<16 + int(m[2])<<8 + int(m[3])
}

// script is a connection that has said everything.
type script struct{ *bytes.Reader }

func (script) Write(p []byte) (int, error)      { return len(p), nil }
func (script) Close() error                     { return nil }
func (script) LocalAddr() net.Addr              { return nil }
func (script) RemoteAddr() net.Addr             { return nil }
func (script) SetDeadline(time.Time) error      { return nil }
func (script) SetReadDeadline(time.Time) error  { return nil }
func (script) SetWriteDeadline(time.Time) error { return nil }
