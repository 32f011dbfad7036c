// Package xds turns plans into Envoy resources, serves them, and reads them
// back.
//
//   - Builder is the translation: own cluster, plans and exports in, Envoy
//     resources out, one service at a time. It does no I/O and keeps the version
//     of a resource for as long as its content stays the same.
//   - Server is the ADS and SDS server: delta and state of the world. A view is
//     what one kind of proxy sees; a change costs what changed, and is encoded
//     once per view, whatever the number of streams.
//   - LeafServer is the SDS server of a process that holds a private key, for
//     the Envoy beside it, over a unix socket.
//   - Client is the reading half, for the built-in engine: it decodes the same
//     resources into Config, which knows nothing of Envoy or protobuf, and
//     refuses by name what it would not carry out.
//
// Both engines get the same bytes, so what one of them does can be explained
// by what the other was told. This package is the only home of Envoy's
// protobuf types.
package xds
