// Package controller is the global part of a mesh: it lets clusters in, signs
// their identities, takes their reports, keeps the catalog, and sends every
// agent what its cluster may see.
//
// Any number of controllers run over one store. Each serves everything: the
// services Enroll, Issue, Sync and Admin of docs/format/wire.md. What only one
// of them may do at a time (liveness, drains, clusterset addresses, the
// rotation of authorities, sweeping) is the elected leader's, whose every write
// compares its election.
//
// A change's way through a controller: a session (session.go) reads an agent's
// report, a judge decides what of it is taken, the store writes it, and the
// store's watch brings it, to every controller alike, into the state (state.go):
// the catalog, the world, and the views, from which every stream takes what
// changed since its last update.
package controller
