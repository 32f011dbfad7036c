package controller

import (
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that frames wraps
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Field numbers of sync.proto that frames are built with; TestFrames compares
// the result with what the generated code makes.
const (
	fieldResponseUpdate = 2 // SyncResponse.update
	fieldUpdateRevision = 1
	fieldUpdatePuts     = 2
	fieldUpdateDeletes  = 3
	fieldUpdateFull     = 4
)

// maxFrame is about how many bytes of records one message carries: agents
// accept messages of 4 MiB.
const maxFrame = 1 << 20

// frame is an encoded SyncResponse, in parts that streams share.
type frame [][]byte

// encodePut encodes a record as an Update holds it.
func encodePut(r *federationv1.Record) ([]byte, error) {
	msg, err := proto.Marshal(r)
	if err != nil {
		return nil, err
	}
	b := protowire.AppendTag(make([]byte, 0, len(msg)+8), fieldUpdatePuts, protowire.BytesType)
	return protowire.AppendBytes(b, msg), nil
}

// frames encodes an update as one message or more. Only the last has a
// revision: what the others hold is a part of the same state.
func (u update) frames() []frame {
	var out []frame
	var body frame
	size := 0
	flush := func() {
		head := protowire.AppendTag(nil, fieldResponseUpdate, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(size))
		out = append(out, append(frame{head}, body...))
		body, size = nil, 0
	}
	add := func(part []byte) {
		if size > 0 && size+len(part) > maxFrame {
			flush()
		}
		body = append(body, part)
		size += len(part)
	}
	for _, e := range u.puts {
		add(e.wire)
	}
	for _, key := range u.deletes {
		add(protowire.AppendString(protowire.AppendTag(nil, fieldUpdateDeletes, protowire.BytesType), key))
	}
	add(u.tail())
	flush()
	return out
}

// tail is the revision and the full marker.
func (u update) tail() []byte {
	var b []byte
	if u.revision != (federation.Revision{}) {
		// A message of two scalars: it cannot fail to marshal.
		msg, _ := proto.Marshal(federationv1.EncodeRevision(u.revision))
		b = protowire.AppendTag(b, fieldUpdateRevision, protowire.BytesType)
		b = protowire.AppendBytes(b, msg)
	}
	if u.full {
		b = protowire.AppendTag(b, fieldUpdateFull, protowire.VarintType)
		b = protowire.AppendVarint(b, 1)
	}
	return b
}

// codec is the protobuf codec that passes frames through as they are.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(frame)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	out := make(mem.BufferSlice, 0, len(f))
	for _, part := range f {
		out = append(out, mem.SliceBuffer(part))
	}
	return out, nil
}
