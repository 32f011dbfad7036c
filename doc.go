// Package weft is the root of the module; it holds no code.
//
// Weft joins many clusters into one service mesh. The vocabulary and every
// decision are in [github.com/weftmesh/weft/federation]; start reading there.
// The tests of this package check rules that hold for the whole tree: which
// way imports point, where each big dependency lives, what may be kept at
// package level. Each says why it exists when it fails.
package weft
