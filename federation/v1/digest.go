package federationv1

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"slices"

	"google.golang.org/protobuf/proto"
)

// Buckets is how many parts a digest has.
const Buckets = 64

// Sums is the digest of a set of records, kept up one record at a time: two
// sides that compare theirs know which parts of the set differ, and exchange
// only those. Each bucket is the sum (mod 2^64) of the hashes of its records,
// so the order in which they came does not matter. It tells honest sets apart;
// it does not guard against somebody who makes records to collide.
type Sums [Buckets]uint64

// Bucket is the bucket of a record: FNV-1a 64 of its key, mod Buckets.
func Bucket(key string) uint32 {
	h := fnv.New64a()
	h.Write([]byte(key))
	return uint32(h.Sum64() % Buckets)
}

// Hash of a record: the first 8 bytes, big endian, of SHA-256 over its key, a
// zero byte, and its value as Value encodes it.
func Hash(key string, value []byte) uint64 {
	h := sha256.New()
	h.Write([]byte(key))
	h.Write([]byte{0})
	h.Write(value)
	var sum [sha256.Size]byte
	return binary.BigEndian.Uint64(h.Sum(sum[:0]))
}

// Add counts a record in. A record that replaces another of the same key needs
// a Remove of the old value first.
func (s *Sums) Add(key string, value []byte) { s[Bucket(key)] += Hash(key, value) }

// Remove takes out a record that Add counted in with the same value.
func (s *Sums) Remove(key string, value []byte) { s[Bucket(key)] -= Hash(key, value) }

// Differing lists the buckets, in rising order, in which s and o differ.
func (s Sums) Differing(o Sums) []uint32 {
	var d []uint32
	for i := range s {
		if s[i] != o[i] {
			d = append(d, uint32(i))
		}
	}
	return d
}

// Encode makes the message.
func (s Sums) Encode() *Digest { return &Digest{Buckets: slices.Clone(s[:])} }

// Decode checks and reads a digest. No digest at all is that of the empty set.
func (d *Digest) Decode() (Sums, error) {
	switch n := len(d.GetBuckets()); n {
	case 0:
		return Sums{}, nil
	case Buckets:
		return Sums(d.Buckets), nil
	default:
		return Sums{}, fmt.Errorf("digest: %d buckets instead of %d", n, Buckets)
	}
}

// Value is the record as it is stored under its key: the message without the
// key, marshalled deterministically. It fails only for text that is not UTF-8.
func (r *Record) Value() ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(&Record{Body: r.GetBody()})
}

// RecordOf puts a stored value under its key again. It checks the encoding
// only; DecodeRecord checks what the record says.
func RecordOf(key string, value []byte) (*Record, error) {
	r := new(Record)
	if err := proto.Unmarshal(value, r); err != nil {
		return nil, fmt.Errorf("record %q: %w", clip(key), err)
	}
	r.Key = key
	return r, nil
}
