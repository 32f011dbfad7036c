package store

import (
	"bytes"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
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
	want, n := key, 0 // the key that fits, and how many parts it has
	switch b := r.GetBody().(type) {
	case *federationv1.Record_Member:
		want, n = dirCluster+b.Member.GetCluster(), 2
	case *federationv1.Record_Export:
		want, n = dirExport+b.Export.GetCluster()+"/"+b.Export.GetNamespace()+"/"+b.Export.GetName(), 4
	case *federationv1.Record_Policy:
		want, n = policyKey(b.Policy.GetOrigin(), b.Policy.GetNamespace(), b.Policy.GetName()), 4
	case *federationv1.Record_Denial:
		want, n = denyKey(federation.ClusterID(b.Denial.GetCluster()), b.Denial.GetGeneration()), 3
	case *federationv1.Record_Bundle:
		want, n = keyBundle, 1
	case *federationv1.Record_Readiness:
		want, n = inDir(key, dirReady), 4
	case *federationv1.Record_Silence:
		want, n = inDir(key, dirLiveness), 2
	case *federationv1.Record_Drain:
		want, n = inDir(key, dirDrain), 2
	case *federationv1.Record_Vip:
		want, n = inDir(key, dirVip), 4
	case *federationv1.Record_Finding:
		// Its subject may hold slashes.
		want, n = inDir(key, dirFinding), max(4, len(parts))
	}
	if want != key || n != len(parts) {
		return fmt.Errorf("key %q does not fit its record (%T): %w", key, r.GetBody(), ErrForbidden)
	}
	for _, p := range parts {
		if !checkPart(p) {
			return fmt.Errorf("key %q: each part must have 1 to 253 characters, none of them a control character, and no slash: %w", key, ErrForbidden)
		}
	}
	return nil
}

// inDir is key where it lies below dir, else nothing.
func inDir(key, dir string) string {
	if dirOf(key) != dir {
		return ""
	}
	return key
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
