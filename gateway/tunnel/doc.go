// Package tunnel is the protocol weft/1: many byte streams inside one
// connection, each opened by an HTTP/2 CONNECT request. It speaks to another
// Weft engine or to Envoy, in either role, over any established net.Conn; in
// production that is a *tls.Conn whose handshake is done and whose ALPN and
// peer the caller has checked. See Wire for what belongs below TLS.
//
// Status 200 on a stream means that a backend is connected. Any other answer,
// a reset or a GOAWAY is a typed error that says whether the caller may try the
// next candidate. Half-close is kept in both directions.
//
// # Flow control and memory
//
// A stream may have StreamWindow bytes under way, the connection ConnWindow.
// The connection's credit is returned when bytes arrive, a stream's when its
// reader takes them: streams that nobody reads cost at most StreamWindow bytes
// each and never stop the others. The memory of a tunnel is thus bounded by
// MaxStreams times StreamWindow, and at most 2 MiB of its own. The goroutine
// that reads the connection never waits for one that writes it, so two tunnels
// whose peers are both slow cannot block each other.
//
// Bytes to send are queued in frames of at most 64 KiB, in the order in which
// the streams came, and written by one goroutine, as much in one system call as
// there is: small frames of many streams share TLS records, and every stream
// that has bytes gets one frame per turn.
//
// # When a process ends
//
// A tunnel has no state outside its connection. A crash of either end closes
// the socket, or DetectDeadPeer does within its limit; every stream then ends
// with an error, never with a clean end of file.
package tunnel
