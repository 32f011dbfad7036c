package tunnel

import (
	"encoding/binary"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// segment is a run of whole frames, or of a part of one, in wire order.
type segment struct {
	c    *chunk
	data int  // DATA payload bytes in it
	full bool // holds one large frame in place; nothing may be added
}

// controlQueue is the queue as the writer of the control framer, whose errors
// it cannot have. Its user holds mu.
type controlQueue Tunnel

func (q *controlQueue) Write(p []byte) (int, error) {
	t := (*Tunnel)(q)
	t.queuedOther += len(p)
	t.gather(p)
	return len(p), nil
}

type headerBuffer []byte

func (b *headerBuffer) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}

// gather copies p to the end of the queue. Callers hold mu.
func (t *Tunnel) gather(p []byte) {
	for len(p) > 0 {
		tail := t.tail()
		n := copy(tail.c.b[tail.c.w:], p)
		tail.c.w += n
		p = p[n:]
	}
}

// tail is the last segment, with room for at least one byte. Callers hold mu.
func (t *Tunnel) tail() *segment {
	if n := len(t.queue); n > 0 {
		if last := &t.queue[n-1]; !last.full && last.c.spare() > 0 {
			return last
		}
	}
	t.queue = append(t.queue, segment{c: t.cfg.Buffers.get(chunkLarge)})
	return &t.queue[len(t.queue)-1]
}

func putDataHeader(b []byte, id uint32, n int, flags http2.Flags) {
	b[0], b[1], b[2] = byte(n>>16), byte(n>>8), byte(n)
	b[3], b[4] = byte(http2.FrameData), byte(flags)
	binary.BigEndian.PutUint32(b[5:], id)
}

// gatherData queues a copy of p as one DATA frame. Callers hold mu.
func (t *Tunnel) gatherData(id uint32, p []byte, flags http2.Flags) {
	var h [frameHeader]byte
	putDataHeader(h[:], id, len(p), flags)
	t.gather(h[:])
	t.gather(p)
	t.queue[len(t.queue)-1].data += len(p) // what goes out last accounts for all
	t.queuedData += len(p)
}

// wakeWriter lets the writing goroutine look at the queue.
func (t *Tunnel) wakeWriter() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// write sends the queue until the tunnel has failed and the queue is empty.
func (t *Tunnel) write() {
	for {
		t.mu.Lock()
		batch := t.queue
		t.queue = t.spareQueue[:0]
		t.spareQueue = nil
		t.queuedOther = 0
		ending := t.err != nil
		t.mu.Unlock()
		if len(batch) == 0 {
			t.mu.Lock()
			t.spareQueue = batch
			t.mu.Unlock()
			if ending {
				return
			}
			<-t.kick
			continue
		}
		var err error
		for i := range batch {
			s := batch[i]
			batch[i] = segment{}
			if err == nil {
				_, err = t.conn.Write(s.c.bytes())
			}
			t.cfg.Buffers.put(s.c)
			if s.data > 0 {
				t.bytesOut.Add(uint64(s.data))
				t.mu.Lock()
				t.queuedData -= s.data
				t.wakeNext()
				t.mu.Unlock()
			}
		}
		if err == nil && t.wire != nil {
			err = t.wire.Flush()
		}
		t.mu.Lock()
		t.spareQueue = batch[:0]
		t.mu.Unlock()
		if err != nil {
			t.fail(&LostError{Err: err})
			return
		}
	}
}

// writeHeader queues a header block. Callers hold mu and have checked h.
func (t *Tunnel) writeHeader(id uint32, end bool, pseudo, h Header) {
	t.hbuf = t.hbuf[:0]
	for _, list := range [2]Header{pseudo, h} {
		for _, f := range list {
			t.henc.WriteField(hpack.HeaderField{Name: f.Name, Value: f.Value})
		}
	}
	block := []byte(t.hbuf)
	first := block[:min(len(block), t.peerFrame)]
	block = block[len(first):]
	t.control.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0,
	})
	for len(block) > 0 {
		part := block[:min(len(block), t.peerFrame)]
		block = block[len(part):]
		t.control.WriteContinuation(id, len(block) == 0, part)
	}
}

// allow says how many of n bytes stream s may put into one frame now, and takes
// them from its windows. 0 means that s must wait to be woken. Streams that wait
// for what all share take turns. Callers hold mu.
func (t *Tunnel) allow(s *Stream, n int) int {
	if s.sendWin <= 0 {
		s.pass()
		return 0
	}
	if !t.roomToSend() || (len(t.waiters) > 0 && !s.turn) {
		if !s.queued {
			s.queued = true
			if s.turn { // it had come to its turn: keep it
				t.waiters = append([]*Stream{s}, t.waiters...)
			} else {
				t.waiters = append(t.waiters, s)
			}
			s.turn = false
		}
		return 0
	}
	n = min(n, t.peerFrame, maxFrame, int(min(s.sendWin, t.sendWin)))
	s.sendWin -= int64(n)
	t.sendWin -= int64(n)
	s.wrote = true
	s.pass()
	return n
}

func (t *Tunnel) roomToSend() bool { return t.sendWin > 0 && t.queuedData < maxQueued }

// wakeNext gives the first waiter its turn if there is room. Callers hold mu.
func (t *Tunnel) wakeNext() {
	if len(t.waiters) == 0 || !t.roomToSend() {
		return
	}
	s := t.waiters[0]
	t.waiters[0] = nil
	t.waiters = t.waiters[1:]
	s.queued, s.turn = false, true
	signal(s.writable)
}

// pass ends s's turn, if it had one, and wakes the next. Callers hold mu.
func (s *Stream) pass() {
	s.turn = false
	s.t.wakeNext()
}

// unqueue takes s out of the waiters, when it gives up. Callers hold mu.
func (t *Tunnel) unqueue(s *Stream) {
	if s.queued {
		s.queued = false
		for i, w := range t.waiters {
			if w == s {
				t.waiters = append(t.waiters[:i], t.waiters[i+1:]...)
				break
			}
		}
	}
	s.pass()
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
