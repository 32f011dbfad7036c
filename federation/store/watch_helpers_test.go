package store

import (
	"testing"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// records is what a consumer knows: the sum of its batches.
type records map[string]*federationv1.Record

// next takes one batch in.
func (r records) next(t testing.TB, w *Watch) Batch {
	t.Helper()
	b, err := w.Next(timeout(t))
	if err != nil {
		t.Fatal(err)
	}
	r.take(b)
	return b
}

func (r records) take(b Batch) {
	if b.Full {
		clear(r)
	}
	for _, k := range b.Deletes {
		delete(r, k)
	}
	for _, p := range b.Puts {
		r[p.GetKey()] = p
	}
}
