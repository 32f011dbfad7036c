// Package store keeps the mesh's state in etcd, which it alone knows: embedded
// in this process, or external behind endpoints.
//
// Facts are federationv1 messages under the keys of docs/format/etcd.md. Every
// method that writes is one transaction (or a row of them, where it says so)
// that compares what it was decided on, so that of two writers one wins and
// the other is told; each also compares the key meta, so that nothing which
// was decided before a restore from a backup is written after it.
// Transactions that change the catalog put the key head: its modification
// number is the catalog's revision.
//
// # Unknown outcomes
//
// When etcd does not answer a write, it may have happened, may still happen,
// or never will. Every transaction therefore puts one value that names its
// writer and operation (head, or a State of its own), and compares a key that
// it changes: after a lost reply the store looks for its own name in that
// key's history, and otherwise sends the same transaction again, of which at
// most one can succeed. A caller sees ErrUnknown only when etcd stays away, or
// its own context ends; then calling the method again is always safe, and each
// method says what it returns if the first call had succeeded.
//
// # Reading
//
// One watch per process follows the whole prefix. Watch hands every consumer
// an ordered stream of Batches, one for each revision of the store, or fewer
// when the consumer is slow; see Batch.
package store
