package store

import (
	"bytes"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// MaxRecordBytes is the largest value that the store takes under one key.
const MaxRecordBytes = 256 << 10

var marshal = proto.MarshalOptions{Deterministic: true}

// encodeRecord is the value stored for r: the record without its key, and
// without the revision of its first acceptance, which etcd keeps itself.
func encodeRecord(r *federationv1.Record) ([]byte, error) {
	c := proto.CloneOf(r)
	c.Key = ""
	switch b := c.GetBody().(type) {
	case *federationv1.Record_Export:
		b.Export.Accepted = 0
	case *federationv1.Record_Policy:
		b.Policy.Accepted = 0
	}
	v, err := marshal.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", r.GetKey(), err)
	}
	if len(v) > MaxRecordBytes {
		return nil, fmt.Errorf("%s has %d bytes, at most %d can be stored: %w", r.GetKey(), len(v), MaxRecordBytes, ErrTooLarge)
	}
	return v, nil
}

// decodeRecord reads the value of key. created is the key's CreateRevision: the
// first acceptance of an export or policy.
func decodeRecord(key string, value []byte, created int64) (*federationv1.Record, error) {
	r := new(federationv1.Record)
	if err := proto.Unmarshal(value, r); err != nil {
		return nil, fmt.Errorf("decode %s: %w", key, err)
	}
	if err := checkBody(key, r); err != nil {
		return nil, err
	}
	r.Key = key
	switch b := r.GetBody().(type) {
	case *federationv1.Record_Export:
		b.Export.Accepted = created
	case *federationv1.Record_Policy:
		b.Policy.Accepted = created
	}
	return r, nil
}

// checkBody reports whether r holds what belongs under key, and names there the
// object that the key names.
func checkBody(key string, r *federationv1.Record) error {
	parts := strings.Split(key, "/")
	want, ok := "", false
	switch b := r.GetBody().(type) {
	case *federationv1.Record_Member:
		want, ok = dirCluster+b.Member.GetCluster(), b.Member != nil
	case *federationv1.Record_Export:
		want, ok = dirExport+b.Export.GetCluster()+"/"+b.Export.GetNamespace()+"/"+b.Export.GetName(), b.Export != nil
	case *federationv1.Record_Policy:
		want, ok = policyKey(b.Policy.GetOrigin(), b.Policy.GetNamespace(), b.Policy.GetName()), b.Policy != nil
	case *federationv1.Record_Denial:
		want, ok = fmt.Sprintf("%s%s/%d", dirDeny, b.Denial.GetCluster(), b.Denial.GetGeneration()), b.Denial != nil
	case *federationv1.Record_Bundle:
		want, ok = keyBundle, b.Bundle != nil
	case *federationv1.Record_Readiness:
		want, ok = key, dirOf(key) == dirReady && len(parts) == 4
	case *federationv1.Record_Silence:
		want, ok = key, dirOf(key) == dirLiveness && len(parts) == 2
	case *federationv1.Record_Drain:
		want, ok = key, dirOf(key) == dirDrain && len(parts) == 2
	case *federationv1.Record_Vip:
		want, ok = key, dirOf(key) == dirVip && len(parts) == 4
	case *federationv1.Record_Finding:
		want, ok = key, dirOf(key) == dirFinding && len(parts) >= 4
	}
	if !ok || want != key {
		return fmt.Errorf("key %q does not fit its record (%T): %w", key, r.GetBody(), ErrForbidden)
	}
	for _, p := range parts {
		if !checkPart(p) {
			return fmt.Errorf("key %q: each part must have 1 to 253 characters, none of them a control character, and no slash: %w", key, ErrForbidden)
		}
	}
	return nil
}

// encodeState is the value of a key of the store's own.
func encodeState(key string, st *federationv1.State) ([]byte, error) {
	v, err := marshal.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", key, err)
	}
	if len(v) > MaxRecordBytes {
		return nil, fmt.Errorf("%s has %d bytes, at most %d can be stored: %w", key, len(v), MaxRecordBytes, ErrTooLarge)
	}
	return v, nil
}

func decodeState(key string, value []byte) (*federationv1.State, error) {
	st := new(federationv1.State)
	if err := proto.Unmarshal(value, st); err != nil {
		return nil, fmt.Errorf("decode %s: %w", key, err)
	}
	return st, nil
}

// entry is one key as etcd has it.
type entry struct {
	value             []byte
	created, modified int64 // revisions; 0 where the key is absent
}

func entryOf(kv *mvccpb.KeyValue) entry {
	return entry{value: kv.Value, created: kv.CreateRevision, modified: kv.ModRevision}
}

func (e entry) exists() bool      { return e.modified != 0 }
func (e entry) same(o entry) bool { return e.modified == o.modified && bytes.Equal(e.value, o.value) }
