// Package gateway is the built-in data path: a cluster's east-west gateway, and
// the same engine beside a workload as its proxy.
//
// An Engine has no configuration but the resources that its agent serves (an
// xds.Config, step by step through Apply). It opens their listeners and does
// two things with a connection. On an import listener it asks the cluster's
// balancer for candidates, one after the other, until one answers 200 on a
// stream of a weft/1 tunnel, or takes a plain connection; then it relays bytes.
// On the east-west listener it reads the ClientHello and either passes the
// connection on to the service's own proxies, or ends the TLS and serves the
// streams of the tunnel from this cluster's own endpoints.
//
// What it promises:
//
//   - Shares are exact: new connections follow the weights of a tier one by one,
//     not on average. A candidate that refuses, is late, breaks before its first
//     byte or answers other than 200 is passed over at once, and set aside for a
//     while when it fails again and again.
//   - No byte reaches a backend, or comes back from it, for a peer whose
//     identity is not verified and allowed: checked at each handshake and for
//     each stream.
//   - A stream that was received is connected to this cluster's own endpoints
//     only, never to another gateway.
//   - An established connection is cut by its ends, a drain's deadline, a dead
//     peer or a change of trust, never by a change of configuration.
//
// After a crash nothing is left behind; a new process serves as soon as its
// agent has told it what.
package gateway
