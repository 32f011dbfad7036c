package store

import (
	"fmt"

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
// object that the key names. The rest of the body is its reader's to check.
func checkBody(key string, r *federationv1.Record) error {
	k, err := federationv1.ParseKey(key)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	}
	belongs := false
	switch b := r.GetBody().(type) {
	case *federationv1.Record_Member:
		belongs = k == federationv1.MemberKey(federation.ClusterID(b.Member.GetCluster()))
	case *federationv1.Record_Export:
		belongs = k == federationv1.ExportKey(federation.ExportID{
			Cluster: federation.ClusterID(b.Export.GetCluster()),
			Service: federation.ServiceID{Namespace: b.Export.GetNamespace(), Name: b.Export.GetName()},
		})
	case *federationv1.Record_Policy:
		belongs = k == federationv1.PolicyKey(federation.PolicyID{
			Origin: b.Policy.GetOrigin(), Namespace: b.Policy.GetNamespace(), Name: b.Policy.GetName(),
		})
	case *federationv1.Record_Denial:
		belongs = k == federationv1.DenialKey(federation.ClusterID(b.Denial.GetCluster()), b.Denial.GetGeneration())
	case *federationv1.Record_Bundle:
		belongs = k.Kind == federationv1.KindBundle
	case *federationv1.Record_Readiness:
		belongs = k.Kind == federationv1.KindReadiness
	case *federationv1.Record_Silence:
		belongs = k.Kind == federationv1.KindSilence
	case *federationv1.Record_Drain:
		belongs = k.Kind == federationv1.KindDrain
	case *federationv1.Record_Vip:
		belongs = k.Kind == federationv1.KindVIP
	case *federationv1.Record_Finding:
		belongs = k.Kind == federationv1.KindFinding
	}
	if !belongs {
		return fmt.Errorf("key %q does not fit its record (%T): %w", key, r.GetBody(), ErrForbidden)
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

func (e entry) exists() bool { return e.modified != 0 }
