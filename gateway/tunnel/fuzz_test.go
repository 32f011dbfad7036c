package tunnel

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// FuzzPeer gives a server, and a client with an open stream, whatever bytes a
// peer might send. Neither may crash, hang, or run on after the connection.
func FuzzPeer(f *testing.F) {
	frames := func(do func(fr *http2.Framer, block func(...string) []byte)) []byte {
		var out, hb bytes.Buffer
		fr := http2.NewFramer(&out, nil)
		fr.AllowIllegalWrites = true
		enc := hpack.NewEncoder(&hb)
		do(fr, func(kv ...string) []byte {
			hb.Reset()
			for i := 0; i < len(kv); i += 2 {
				enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
			}
			return hb.Bytes()
		})
		return out.Bytes()
	}
	f.Add(true, frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "CONNECT", ":authority", "x"), EndHeaders: true})
		fr.WriteData(1, false, []byte("hello"))
		fr.WriteDataPadded(1, true, []byte("bye"), make([]byte, 9))
		fr.WriteWindowUpdate(1, 1000)
		fr.WritePing(false, [8]byte{1})
		fr.WriteGoAway(0, 0, nil)
	}))
	f.Add(true, frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings()
		b := block(":method", "CONNECT", ":authority", "x", "a", "b")
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3]})
		fr.WriteContinuation(1, true, b[3:])
		fr.WriteRSTStream(1, http2.ErrCodeCancel)
		fr.WriteData(1, false, []byte("late"))
	}))
	f.Add(false, frames(func(fr *http2.Framer, block func(...string) []byte) {
		fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":status", "200"), EndHeaders: true})
		fr.WriteData(1, false, []byte("hello"))
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block("trailer-x", "y"), EndHeaders: true, EndStream: true})
	}))
	f.Fuzz(func(t *testing.T, server bool, data []byte) {
		near, far := net.Pipe()
		go io.Copy(io.Discard, far)
		cfg := Config{MaxStreams: 8, StreamWindow: 1 << 16, SettingsTimeout: time.Second}
		var tun *Tunnel
		if server {
			tun = Serve(near, cfg, func(in *Incoming) {
				if s, err := in.Accept(nil); err == nil {
					io.Copy(io.Discard, s)
				}
			})
			far.Write([]byte(http2.ClientPreface))
		} else {
			tun = Client(near, cfg)
			s, err := tun.Start(Request{Authority: "x"})
			if err == nil {
				s.Write([]byte("early"))
			}
		}
		far.SetWriteDeadline(time.Now().Add(5 * time.Second))
		_, err := far.Write(data)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Error("the tunnel stopped reading")
		}
		far.Close()
		select {
		case <-tun.Done():
		case <-time.After(10 * time.Second):
			t.Fatal("the tunnel outlived its connection")
		}
		if n := tun.Stats().Active; n != 0 {
			t.Errorf("%d streams outlived the tunnel", n)
		}
	})
}
