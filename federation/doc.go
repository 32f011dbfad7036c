// Package federation is Weft's core: the words of the mesh and its decisions.
//
// Members offer services (Export); Merge joins the offers of all of them into
// one immutable Catalog; Plan says where one caller's traffic for one service
// goes, with a reason for every candidate, used or not; Diff says what differs
// between two catalogs. Everything here is a pure function of its arguments:
// no I/O, no goroutines, no clock, no logger. Whoever calls it owns what it
// passes in until the call returns, and shares what comes back: catalogs,
// worlds and plans are never changed after they have been made.
package federation
