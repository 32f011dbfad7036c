package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// The last-good file: what a restarted agent serves from while the controller
// is away. Layout: lastGoodMagic, then a big-endian uint32 of the format's
// version, a uint64 of the payload's length, the payload's SHA-256, and the
// payload: a JSON head (length-prefixed) and the records, each a marshalled
// Record (length-prefixed), in the order of their keys.
const (
	lastGoodName    = "last-good"
	lastGoodMagic   = "weft last-good\n\x00"
	lastGoodVersion = 1
	lastGoodHeader  = len(lastGoodMagic) + 4 + 8 + sha256.Size
	// lastGoodLimit bounds what is read back, in bytes: some hundred times the
	// state of a large mesh.
	lastGoodLimit = 1 << 30
	// asideKept bounds how many files that could not be used are kept for a
	// person to look at.
	asideKept = 3
)

// lastGood is the state that an agent persists.
type lastGood struct {
	TrustDomain string               `json:"trustDomain"`
	Cluster     federation.ClusterID `json:"cluster"`
	Revision    federation.Revision  `json:"revision"`
	// Documents are those of the source as they were last accepted, in
	// the order of their names, so that a restarted agent can serve its own
	// cluster's endpoints before, or without, its source.
	Documents []savedDocument `json:"documents,omitempty"`
	// Resolved are the last good answers for the gateways' host names.
	Resolved map[string][]string `json:"resolved,omitempty"`
	// Records are what the agent holds of the catalog, denials and bundle included.
	Records []*federationv1.Record `json:"-"`
}

// encode is the content of a last-good file.
func (l *lastGood) encode() ([]byte, error) {
	head, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	payload := protowire.AppendBytes(nil, head)
	marshal := proto.MarshalOptions{Deterministic: true}
	for _, r := range l.Records {
		payload = protowire.AppendVarint(payload, uint64(marshal.Size(r)))
		if payload, err = marshal.MarshalAppend(payload, r); err != nil {
			return nil, fmt.Errorf("record %s: %w", r.GetKey(), err)
		}
	}
	sum := sha256.Sum256(payload)
	b := make([]byte, 0, lastGoodHeader+len(payload))
	b = append(b, lastGoodMagic...)
	b = binary.BigEndian.AppendUint32(b, lastGoodVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(len(payload)))
	b = append(b, sum[:]...)
	return append(b, payload...), nil
}

// decodeLastGood reads what encode writes, and refuses everything else: the
// checksum covers every byte behind it, so a torn or damaged file never loads
// in part.
func decodeLastGood(b []byte) (*lastGood, error) {
	if len(b) < lastGoodHeader || string(b[:len(lastGoodMagic)]) != lastGoodMagic {
		return nil, errors.New("not a last-good file")
	}
	rest := b[len(lastGoodMagic):]
	if v := binary.BigEndian.Uint32(rest); v != lastGoodVersion {
		return nil, fmt.Errorf("version %d of the format, this agent reads %d", v, lastGoodVersion)
	}
	size, sum, payload := binary.BigEndian.Uint64(rest[4:]), rest[12:12+sha256.Size], b[lastGoodHeader:]
	if uint64(len(payload)) != size {
		return nil, fmt.Errorf("%d bytes instead of %d: the file is cut short or has something behind it", len(payload), size)
	}
	if got := sha256.Sum256(payload); !bytes.Equal(got[:], sum) {
		return nil, errors.New("the checksum does not match: the file is damaged")
	}
	head, n := protowire.ConsumeBytes(payload)
	if n < 0 {
		return nil, errors.New("the head does not parse")
	}
	l := new(lastGood)
	if err := json.Unmarshal(head, l); err != nil {
		return nil, fmt.Errorf("the head does not parse: %w", err)
	}
	for payload = payload[n:]; len(payload) > 0; payload = payload[n:] {
		var body []byte
		if body, n = protowire.ConsumeBytes(payload); n < 0 {
			return nil, fmt.Errorf("record %d does not parse", len(l.Records))
		}
		r := new(federationv1.Record)
		if err := proto.Unmarshal(body, r); err != nil {
			return nil, fmt.Errorf("record %d does not parse: %w", len(l.Records), err)
		}
		l.Records = append(l.Records, r)
	}
	return l, nil
}

// loadLastGood reads the file in dir. A missing file is (nil, nil). A file that
// cannot be used, because it is damaged or of another cluster, is set aside
// under another name; aside then says where and why, and the agent starts from
// nothing.
func loadLastGood(dir, trustDomain string, cluster federation.ClusterID, now time.Time) (l *lastGood, aside error) {
	path := filepath.Join(dir, lastGoodName)
	b, err := readRegular(path, lastGoodLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		l, err = decodeLastGood(b)
	}
	if err == nil && (l.TrustDomain != trustDomain || l.Cluster != cluster) {
		err = fmt.Errorf("it is of cluster %s in trust domain %s", l.Cluster, l.TrustDomain)
	}
	if err == nil {
		return l, nil
	}
	to := path + ".unusable-" + now.UTC().Format("20060102T150405.000000000")
	if mv := os.Rename(path, to); mv != nil {
		return nil, fmt.Errorf("last good state %s: %w; and it cannot be set aside: %w", path, err, mv)
	}
	if old, _ := filepath.Glob(path + ".unusable-*"); len(old) > asideKept {
		slices.Sort(old) // their names sort by time
		for _, p := range old[:len(old)-asideKept] {
			_ = os.RemoveAll(p)
		}
	}
	return nil, fmt.Errorf("last good state %s: %w; it is kept as %s", path, err, filepath.Base(to))
}

// writeFile replaces path by content, durably: a temporary file beside it is
// written and synced, renamed, and the folder is synced.
func writeFile(path string, content []byte) (err error) {
	dir, base := filepath.Split(path)
	// A fixed name: what a crash leaves behind is overwritten by the next write.
	tmp := filepath.Join(dir, "."+base+".tmp")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		_ = os.Remove(tmp)
		return err
	}
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Reasons for which a file is not read.
var (
	errNotRegular = errors.New("not a regular file")
	errTooLarge   = errors.New("too large")
)

// readRegular reads a file of at most limit bytes. Devices, sockets and FIFOs
// are refused without waiting for anybody at their other end.
func readRegular(path string, limit int64) ([]byte, error) {
	// Opening some devices does something, so the type is asked first; and once
	// more when the file is open, since it may have been replaced.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, errNotRegular)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", path, errNotRegular)
	}
	// One byte more than allowed, in case that it grows while it is read.
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", path, errTooLarge, limit)
	}
	return b, nil
}
