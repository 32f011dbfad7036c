package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

const (
	recordHeader    = 5
	recordHandshake = 22
	recordMost      = 1 << 14
	messageHeader   = 4
	clientHello     = 1
	extServerName   = 0
	extALPN         = 16
)

// HelloFault is why no name could be read from the beginning of a connection.
type HelloFault int

// Plain: the first bytes are no TLS. Silent: too little came in time. TooLarge:
// the hello is longer than the limit. Malformed: TLS, but no sound ClientHello.
// Nameless: a sound one without a server name. Cut: the connection ended first.
const (
	Plain HelloFault = iota + 1
	Silent
	TooLarge
	Malformed
	Nameless
	Cut
)

func (f HelloFault) String() string {
	switch f {
	case Plain:
		return "plain bytes"
	case Silent:
		return "silence"
	case TooLarge:
		return "hello too large"
	case Malformed:
		return "malformed hello"
	case Nameless:
		return "no server name"
	case Cut:
		return "cut short"
	}
	return fmt.Sprintf("HelloFault(%d)", int(f))
}

// HelloError is the error of ReadClientHello.
type HelloError struct {
	Fault HelloFault
	Err   error // what lies under it, or nil
}

func (e *HelloError) Error() string {
	if e.Err == nil {
		return "client hello: " + e.Fault.String()
	}
	return fmt.Sprintf("client hello: %v: %v", e.Fault, e.Err)
}

func (e *HelloError) Unwrap() error { return e.Err }

// HelloLimits bound what a connection may cost before it has named its goal.
type HelloLimits struct {
	Bytes int           // default 16 KiB, the handshake's records included
	Time  time.Duration // default 5 s, of the machine's time as a socket's deadline is
}

// Hello is what a ClientHello asks for.
type Hello struct {
	ServerName string   // as sent; DNS names match without regard to case
	ALPN       []string // in the client's order
	Raw        []byte   // all bytes read so far, to be forwarded unchanged
}

// ReadClientHello reads just enough of c to know the server's name, however
// many segments and TLS records it takes, and clears c's read deadline. Its
// error is a *HelloError; nothing has been written to c in any case.
func ReadClientHello(c net.Conn, limits HelloLimits) (*Hello, error) {
	if limits.Bytes <= 0 {
		limits.Bytes = 16 << 10
	}
	if limits.Time <= 0 {
		limits.Time = 5 * time.Second
	}
	if err := c.SetReadDeadline(time.Now().Add(limits.Time)); err != nil {
		return nil, &HelloError{Cut, err}
	}
	defer func() { _ = c.SetReadDeadline(time.Time{}) }()
	p := helloParser{limit: limits.Bytes}
	buf := make([]byte, 0, 2<<10)
	for {
		if len(buf) == cap(buf) {
			if len(buf) >= limits.Bytes {
				return nil, &HelloError{Fault: TooLarge}
			}
			buf = append(make([]byte, 0, min(2*cap(buf), limits.Bytes)), buf...)
		}
		n, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		done, fault := p.feed(buf)
		if fault != 0 {
			return nil, &HelloError{Fault: fault}
		}
		if done {
			h, fault := parseHello(p.message)
			if fault != 0 {
				return nil, &HelloError{Fault: fault}
			}
			h.Raw = buf
			return h, nil
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, &HelloError{Fault: Silent}
		case errors.Is(err, io.EOF):
			return nil, &HelloError{Fault: Cut}
		case err != nil:
			return nil, &HelloError{Cut, err}
		}
	}
}

// helloParser puts a handshake message together from records as they come. It
// looks at each byte once, whatever the segments.
type helloParser struct {
	limit   int
	at      int // in the connection's bytes: the record that is not yet taken
	message []byte
}

// feed takes the connection's bytes so far, of which it has seen a part.
func (p *helloParser) feed(all []byte) (done bool, _ HelloFault) {
	for {
		rest := all[p.at:]
		// Judge as early as possible: a client that speaks something else may wait
		// for an answer before it sends more.
		if len(rest) > 0 && rest[0] != recordHandshake {
			if p.at == 0 {
				return false, Plain
			}
			return false, Malformed
		}
		if len(rest) > 1 && rest[1] != 3 {
			return false, Plain
		}
		if len(rest) < recordHeader {
			return false, 0
		}
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if n == 0 || n > recordMost {
			return false, Malformed
		}
		if p.at+recordHeader+n > p.limit {
			return false, TooLarge
		}
		if len(rest) > recordHeader && p.at == 0 && rest[recordHeader] != clientHello {
			return false, Malformed
		}
		if len(rest) < recordHeader+n {
			return false, 0
		}
		p.message = append(p.message, rest[recordHeader:recordHeader+n]...)
		p.at += recordHeader + n
		if len(p.message) < messageHeader {
			continue
		}
		want := messageHeader + int(p.message[1])<<16 + int(p.message[2])<<8 + int(p.message[3])
		switch {
		case want > p.limit:
			return false, TooLarge
		case len(p.message) > want: // nothing may follow a hello in its record
			return false, Malformed
		case len(p.message) == want:
			return true, 0
		}
	}
}

// reader takes length-prefixed fields from the front of a message.
type reader []byte

func (r *reader) bytes(n int) ([]byte, bool) {
	if n > len(*r) {
		return nil, false
	}
	b := (*r)[:n]
	*r = (*r)[n:]
	return b, true
}

// vector reads a field whose length stands before it in size bytes.
func (r *reader) vector(size int) (reader, bool) {
	b, ok := r.bytes(size)
	if !ok {
		return nil, false
	}
	n := 0
	for _, x := range b {
		n = n<<8 | int(x)
	}
	v, ok := r.bytes(n)
	return v, ok
}

// parseHello reads a whole ClientHello message.
func parseHello(msg []byte) (*Hello, HelloFault) {
	if len(msg) < messageHeader || msg[0] != clientHello {
		return nil, Malformed
	}
	r := reader(msg[messageHeader:])
	_, ok1 := r.bytes(2 + 32) // version, random
	_, ok2 := r.vector(1)     // session
	_, ok3 := r.vector(2)     // ciphers
	_, ok4 := r.vector(1)     // compression
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return nil, Malformed
	}
	if len(r) == 0 {
		return nil, Nameless
	}
	extensions, ok := r.vector(2)
	if !ok || len(r) > 0 {
		return nil, Malformed
	}
	h := &Hello{}
	seen := map[uint16]bool{}
	for len(extensions) > 0 {
		t, ok1 := extensions.bytes(2)
		body, ok2 := extensions.vector(2)
		if !ok1 || !ok2 {
			return nil, Malformed
		}
		kind := binary.BigEndian.Uint16(t)
		if seen[kind] {
			return nil, Malformed
		}
		seen[kind] = true
		switch kind {
		case extServerName:
			h.ServerName, ok = serverName(body)
		case extALPN:
			h.ALPN, ok = protocols(body)
		}
		if !ok {
			return nil, Malformed
		}
	}
	if h.ServerName == "" {
		return nil, Nameless
	}
	return h, 0
}

func serverName(body reader) (name string, ok bool) {
	list, ok := body.vector(2)
	if !ok || len(body) > 0 || len(list) == 0 {
		return "", false
	}
	for len(list) > 0 {
		kind, ok1 := list.bytes(1)
		value, ok2 := list.vector(2)
		if !ok1 || !ok2 || len(value) == 0 {
			return "", false
		}
		if kind[0] != 0 {
			continue
		}
		if name != "" || value[len(value)-1] == '.' {
			return "", false
		}
		name = string(value)
	}
	return name, true
}

func protocols(body reader) (names []string, ok bool) {
	list, ok := body.vector(2)
	if !ok || len(body) > 0 || len(list) == 0 {
		return nil, false
	}
	for len(list) > 0 {
		name, ok := list.vector(1)
		if !ok || len(name) == 0 {
			return nil, false
		}
		names = append(names, string(name))
	}
	return names, true
}
