package tunnel

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Header is an ordered list of fields. Names are lower case.
type Header []Field

// Field is one header field.
type Field struct{ Name, Value string }

// Get is the value of the first field with that lower-case name, or "".
func (h Header) Get(name string) string {
	for _, f := range h {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

func (h Header) check() error {
	for _, f := range h {
		if f.Name == "" || strings.ToLower(f.Name) != f.Name || !httpguts.ValidHeaderFieldName(f.Name) {
			return fmt.Errorf("header name %q is not a lower-case token", f.Name)
		}
		if !httpguts.ValidHeaderFieldValue(f.Value) {
			return fmt.Errorf("header %s has a value that HTTP does not allow", f.Name)
		}
	}
	return nil
}

// Request asks for a stream.
type Request struct {
	Authority string // what to connect to, as the far side names it
	Header    Header
	// Within is how long the answer may take; 0 leaves that to the context.
	Within time.Duration
}

// Response is the far side's answer with status 200.
type Response struct{ Header Header }

// block is a received header list. A list that is broken in form, but whose
// compression state is sound, has malformed set: it costs its stream only.
type block struct {
	method, authority, status string
	scheme, path, protocol    bool // present
	header                    Header
	malformed                 string
	tooLarge                  bool
	seen                      int
}

func (b *block) take(f hpack.HeaderField, limit int) {
	b.seen += int(f.Size())
	if b.seen > limit {
		b.tooLarge, b.header = true, nil
		return
	}
	if !httpguts.ValidHeaderFieldValue(f.Value) {
		b.malformed = "a field value that HTTP does not allow"
		return
	}
	if !strings.HasPrefix(f.Name, ":") {
		if f.Name == "" || strings.ToLower(f.Name) != f.Name || !httpguts.ValidHeaderFieldName(f.Name) {
			b.malformed = "a field name that HTTP/2 does not allow"
			return
		}
		b.header = append(b.header, Field{f.Name, f.Value})
		return
	}
	if len(b.header) > 0 {
		b.malformed = "a pseudo-header after a field"
		return
	}
	twice := false
	switch f.Name {
	case ":method":
		twice, b.method = b.method != "", f.Value
	case ":authority":
		twice, b.authority = b.authority != "", f.Value
	case ":status":
		twice, b.status = b.status != "", f.Value
	case ":scheme":
		twice, b.scheme = b.scheme, true
	case ":path":
		twice, b.path = b.path, true
	case ":protocol":
		twice, b.protocol = b.protocol, true
	default:
		b.malformed = "an unknown pseudo-header"
		return
	}
	if twice {
		b.malformed = "a repeated pseudo-header"
	}
}

// readBlock gathers the frames of a header block that begins with h and decodes
// it. Its error is the connection's: the compression state of the two ends would
// differ from here on.
func (t *Tunnel) readBlock(h *http2.HeadersFrame) (*block, error) {
	b := &block{}
	t.hdec.SetEmitFunc(func(f hpack.HeaderField) { b.take(f, t.cfg.MaxHeaderBytes) })
	defer t.hdec.SetEmitFunc(func(hpack.HeaderField) {})
	fragment, ended := h.HeaderBlockFragment(), h.HeadersEnded()
	for n, size := 1, len(fragment); ; n++ {
		if _, err := t.hdec.Write(fragment); err != nil {
			return nil, violation(http2.ErrCodeCompression, "header block: %w", err)
		}
		if ended {
			break
		}
		fh, err := t.framer.ReadFrameHeader()
		if err != nil {
			return nil, err
		}
		size += int(fh.Length)
		if n == maxHeaderFragment || size > 2*t.cfg.MaxHeaderBytes {
			return nil, violation(http2.ErrCodeEnhanceYourCalm, "header block of over %d frames or %d bytes", maxHeaderFragment, 2*t.cfg.MaxHeaderBytes)
		}
		f, err := t.framer.ReadFrameForHeader(fh)
		if err != nil {
			return nil, err
		}
		// The framer lets nothing else follow an unfinished block.
		c := f.(*http2.ContinuationFrame)
		fragment, ended = c.HeaderBlockFragment(), c.HeadersEnded()
	}
	if err := t.hdec.Close(); err != nil {
		return nil, violation(http2.ErrCodeCompression, "header block: %w", err)
	}
	return b, nil
}

// connect reports why a request is not a CONNECT that this side can carry: a
// malformed one is a stream error, an unsupported one an HTTP status.
func (b *block) connect() (status int, malformed string) {
	switch {
	case b.malformed != "":
		return 0, b.malformed
	case b.tooLarge:
		return 431, ""
	case b.status != "":
		return 0, "a request with a status"
	case b.method == "":
		return 0, "a request without a method"
	case b.method != "CONNECT":
		return 405, ""
	case b.protocol:
		return 501, ""
	case b.scheme || b.path:
		return 0, "a CONNECT with a scheme or path"
	case b.authority == "":
		return 0, "a CONNECT without an authority"
	}
	return 0, ""
}

// answer is a response's status.
func (b *block) answer() (status int, malformed string) {
	switch {
	case b.malformed != "":
		return 0, b.malformed
	case b.tooLarge:
		return 0, "a response with too many headers"
	case b.method != "" || b.authority != "" || b.scheme || b.path || b.protocol:
		return 0, "a response with a request's pseudo-header"
	}
	n, err := strconv.Atoi(b.status)
	if err != nil || n < 100 || n > 999 || len(b.status) != 3 {
		return 0, fmt.Sprintf("a response with status %q", b.status)
	}
	return n, ""
}
