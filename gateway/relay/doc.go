// Package relay carries bytes between two connections and tells how that ended.
// It also reads a TLS ClientHello without taking part in the handshake, which is
// all that a gateway needs to pass TLS through by name.
//
// Two plain TCP sockets are joined by splice(2) when they move bulk: a relay
// begins with small copies, and borrows a pipe only while bytes are in flight,
// so that an idle connection costs two descriptors, two goroutines and no
// buffer. Everything else is copied through borrowed buffers, or through the
// faster ways that the connections offer themselves (io.ReaderFrom, io.WriterTo).
//
// Half-close is kept in both directions, and a reset on one side becomes a reset
// on the other: an application never mistakes a crash for the end of the data.
package relay
