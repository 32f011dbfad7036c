// Package federation is Weft's core: the words of the mesh and its decisions.
//
// Members offer services (Export); Merge joins the offers of all of them into
// one immutable Catalog, and Apply makes the next one of an event; Plan says
// where one caller's traffic for one service goes, with a verdict and a Reason
// for every candidate, used or not; Diff says what differs between two
// catalogs, and whose plans may. What changes often (readiness, silence,
// probes, drains) is kept apart from the catalog, in a World. What is wrong, and
// how to mend it, is a Finding with a documented Code.
//
// Everything here is a pure function of its arguments: no I/O, no goroutines,
// no clock, no logger. Whoever calls it owns what it passes in until the call
// returns, and shares what comes back: catalogs, worlds and plans are never
// changed after they have been made. A change costs O(log n), however many
// clusters offer a service, since versions share whatever they have in common.
//
// The scripts in testdata show what is decided, and why; testdata/README.md
// describes their language.
package federation
