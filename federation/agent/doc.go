// Package agent is one cluster's part of the control plane. It reports what its
// cluster offers, keeps what the controller says of all others, and tells the
// cluster's gateways and proxies what follows.
//
// What comes in, and from where:
//
//   - folder.go, source.go: a folder of YAML, read as a whole after each change;
//     health.go: active checks of the endpoints; offer.go: both together
//   - sync.go: the one Sync stream with a controller; held.go: the records it
//     brought, and when one may be removed; report.go: what is reported, and when
//   - enrol.go: the agent's own identity, from a join token on
//   - proxies.go: what the attached gateways see
//   - resolve.go: the addresses behind the gateways' host names
//
// mesh.go and own.go lay the own truth over the records and make one catalog
// and one world of them; what goes out follows from a scene of these (scene.go):
//
//   - drive.go: plans, and through package xds the proxies' resources
//   - dns.go: clusterset.local
//   - local.go, proxies.go: identities, and whom to believe
//   - questions.go: why, and a call through the mesh
//   - lastgood.go: the state on disk
//
// A fault of the controller, or a restart, takes nothing away: what the agent
// holds is removed only when a controller says in a complete set, or in the
// session after it, that it is gone. A crash at any point leaves the state
// folder as it was before or after a write.
package agent
