package store

import "errors"

// Errors that callers decide on; each comes wrapped in what happened to what.
var (
	// ErrNotFound: there is no such object.
	ErrNotFound = errors.New("not found")
	// ErrExists: the name is taken.
	ErrExists = errors.New("already exists")
	// ErrConflict: the target is not what the write was decided on. Read it
	// again and decide anew.
	ErrConflict = errors.New("changed meanwhile")
	// ErrStale: the writer has lost its standing (its session was taken over,
	// the cluster's generation or state changed, the authority was replaced, the
	// store was restored). Nothing it wants to write counts any more.
	ErrStale = errors.New("stale writer")
	// ErrNotLeader: the term has ended; another process may lead.
	ErrNotLeader = errors.New("not the leader any more")
	// ErrToken: the join token is unknown, expired, or used by another key. It
	// does not say which.
	ErrToken = errors.New("join token is not valid: unknown, used or expired; make a new one with 'weft cluster token'")
	// ErrTooSoon: the name or the quarantine must wait until the longest old
	// leaf has expired.
	ErrTooSoon = errors.New("too soon")
	// ErrForbidden: the writer may not write this key, whatever its value.
	ErrForbidden = errors.New("not allowed")
	// ErrTooLarge: a record is larger than MaxRecordBytes.
	ErrTooLarge = errors.New("record too large")
	// ErrUnknown: etcd did not say whether the write happened. Calling the same
	// method again is safe.
	ErrUnknown = errors.New("outcome unknown: etcd did not answer")
	// ErrFull: etcd has reached its quota and takes no writes until space is
	// made (docs/format/etcd.md, "Out of space").
	ErrFull = errors.New("etcd is out of space")
	// ErrLocked: another process uses the data directory.
	ErrLocked = errors.New("data directory is in use by another process")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store is closed")
)
