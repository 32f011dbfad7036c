package tunnel

import (
	"sync"
	"time"

	"github.com/weftmesh/weft/federation/clock"
)

// ALPN is the protocol's name in TLS; both ends must have negotiated it.
const ALPN = "weft/1"

const (
	frameHeader = 9
	// maxFrame is the largest DATA payload that this side takes and sends: with
	// its header it fills four TLS records of 16 KiB.
	maxFrame = chunkLarge - frameHeader
	// What RFC 9113 lets a peer assume until it has read our SETTINGS, and us
	// until we have read its.
	defaultFrame      = 16384
	defaultWindow     = 65535
	defaultStreams    = 100
	maxWindow         = 1<<31 - 1
	maxStreamID       = 1<<31 - 1
	maxQueued         = 256 << 10 // DATA bytes queued for the connection before its writers wait
	maxQueuedControl  = 1 << 20   // bytes of other frames that may wait for a peer that does not read
	headerTable       = 4096
	maxHeaderFragment = 16 // frames in one header block

	// settingCredit is a setting of our own (value 1): the sender returns the
	// connection's credit at receipt. Peers that do not know it pass over it, as
	// RFC 9113 wants.
	settingCredit = 0x5745
)

// Config is what both ends of a tunnel need. The zero value of every field but
// Clock means the default beside it.
type Config struct {
	Clock clock.Clock // default: the machine's

	// MaxStreams is how many streams may be open at once (1024). A server
	// announces it; a client obeys the smaller of its own and the server's.
	MaxStreams int
	// LateStreams is a client's MaxStreams (the same, if 0) in a tunnel to a
	// server that returns the connection's credit only when bytes are read, as
	// Envoy does: more streams than its connection window holds stream windows
	// could stop each other there.
	LateStreams int
	// StreamWindow and ConnWindow are the bytes that the peer may send ahead of
	// the reader on one stream (1 MiB) and on all (64 MiB).
	StreamWindow, ConnWindow int
	// MaxHeaderBytes bounds one header list, as RFC 9113 counts it (16 KiB).
	MaxHeaderBytes int
	// SettingsTimeout is how long the peer may take to send its preface and
	// SETTINGS (5 s), and to take our last words when the tunnel fails.
	SettingsTimeout time.Duration

	// AbuseBurst and AbuseRate bound the frames that cost work and carry
	// nothing (PING, SETTINGS, empty DATA, unknown types): a burst (2000) and so
	// many a second after it (500). Of streams that are reset before their
	// answer ten times as many are taken: callers who lose patience while the
	// backends are slow are no attack, and a tunnel that is given up cuts others.
	AbuseBurst, AbuseRate int

	// Buffers is shared between the tunnels of a process; nil means own ones.
	Buffers *Buffers
}

func (c Config) withDefaults() Config {
	if c.Clock == nil {
		c.Clock = clock.Real()
	}
	if c.Buffers == nil {
		c.Buffers = NewBuffers()
	}
	if c.SettingsTimeout <= 0 {
		c.SettingsTimeout = 5 * time.Second
	}
	for _, f := range []struct {
		v        *int
		def, max int
	}{
		{&c.MaxStreams, 1024, maxStreamID},
		{&c.StreamWindow, 1 << 20, maxWindow},
		{&c.ConnWindow, 64 << 20, maxWindow},
		{&c.MaxHeaderBytes, 16 << 10, 1 << 20},
		{&c.AbuseBurst, 2000, 1 << 30},
		{&c.AbuseRate, 500, 1 << 30},
	} {
		if *f.v <= 0 {
			*f.v = f.def
		}
		*f.v = min(*f.v, f.max)
	}
	if c.LateStreams <= 0 || c.LateStreams > c.MaxStreams {
		c.LateStreams = c.MaxStreams
	}
	// The connection's window can only be raised from RFC 9113's initial one.
	c.ConnWindow = max(c.ConnWindow, defaultWindow)
	return c
}

const (
	chunkSmall  = 2 << 10
	chunkMedium = 16 << 10
	chunkLarge  = 64 << 10
)

// Buffers lends the memory that bytes rest in between two sockets. It is safe
// for concurrent use; one for a whole process keeps idle memory low.
type Buffers struct{ small, medium, large sync.Pool }

// NewBuffers is an empty pool.
func NewBuffers() *Buffers { return &Buffers{} }

// chunk is a borrowed buffer; b[r:w] is what it holds. Whoever has it owns it.
type chunk struct {
	b    []byte
	r, w int
}

func (c *chunk) spare() int    { return len(c.b) - c.w }
func (c *chunk) bytes() []byte { return c.b[c.r:c.w] }

// get lends the smallest buffer that holds n bytes, at most chunkLarge.
func (p *Buffers) get(n int) *chunk {
	pool, size := &p.large, chunkLarge
	switch {
	case n <= chunkSmall:
		pool, size = &p.small, chunkSmall
	case n <= chunkMedium:
		pool, size = &p.medium, chunkMedium
	}
	if c, _ := pool.Get().(*chunk); c != nil {
		return c
	}
	return &chunk{b: make([]byte, size)}
}

func (p *Buffers) put(c *chunk) {
	c.r, c.w = 0, 0
	switch len(c.b) {
	case chunkSmall:
		p.small.Put(c)
	case chunkMedium:
		p.medium.Put(c)
	case chunkLarge:
		p.large.Put(c)
	}
}
