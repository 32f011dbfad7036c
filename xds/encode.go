package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// typePrefix precedes the full name of a message in a type URL.
const typePrefix = "type.googleapis.com/"

// deterministic makes equal messages equal bytes, so that a version is a hash
// of the content alone.
var deterministic = proto.MarshalOptions{Deterministic: true}

// encoder packs messages and keeps the first thing that is wrong with one of
// them, so that building reads as a plain expression.
type encoder struct{ err error }

// any packs m, which must satisfy the constraints that its schema states:
// Envoy would refuse it otherwise.
func (e *encoder) any(m proto.Message) *anypb.Any {
	return &anypb.Any{TypeUrl: typePrefix + string(m.ProtoReflect().Descriptor().FullName()), Value: e.bytes(m)}
}

func (e *encoder) bytes(m proto.Message) []byte {
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil && e.err == nil {
			e.err = err
		}
	}
	b, err := deterministic.Marshal(m)
	if err != nil && e.err == nil {
		e.err = err
	}
	return b
}

// resource encodes m under a version that is the hash of its content. What a
// nested message did wrong counts, too.
func (e *encoder) resource(t Type, name string, m proto.Message) (*Resource, error) {
	body := e.bytes(m)
	if e.err != nil {
		return nil, fmt.Errorf("%s %s cannot be encoded: %w", t, name, e.err)
	}
	return &Resource{Name: Name{t, name}, Version: contentVersion(body), Body: body}, nil
}

// contentVersion is short enough to travel with every resource, and long
// enough (96 bits) that two contents never share it.
func contentVersion(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:12])
}

func seconds(d time.Duration) *durationpb.Duration { return durationpb.New(d) }
func u32(n uint32) *wrapperspb.UInt32Value         { return wrapperspb.UInt32(n) }

var errNoTrustRoots = errors.New("members without a root certificate: nobody could be verified; the last good roots stay")
