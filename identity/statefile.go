package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrStateDamaged says that a state file was cut or changed on the disk. (A
// crash does not do that: the file is replaced whole.)
var ErrStateDamaged = errors.New("the state file is damaged")

const (
	stateMagic   = "weft-svid-state 1\n"
	maxStateFile = 1 << 20
)

// StateFile keeps a Source's SVID, key and bundle on the process's own disk,
// sealed under a key-encryption key, so that it starts again while its issuer
// is away. The file is magic, the SHA-256 of the rest, and the sealed state;
// it is of mode 0600 and replaced atomically.
type StateFile struct {
	path string
	kek  *KEK
}

// NewStateFile names the file; nothing is read or written yet. Its folder must
// exist.
func NewStateFile(path string, kek *KEK) *StateFile { return &StateFile{path: path, kek: kek} }

// savedState is what is sealed.
type savedState struct {
	Key     []byte          `json:"key,omitempty"`   // PKCS #8
	Chain   [][]byte        `json:"chain,omitempty"` // DER
	Bundle  json.RawMessage `json:"bundle,omitempty"`
	Pending []byte          `json:"pending,omitempty"` // PKCS #8
}

func (f *StateFile) save(id spiffeid.ID, state sourceState) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("identity: save the state of %s in %s: %w", id, f.path, err)
		}
	}()
	var saved savedState
	defer func() { clear(saved.Key); clear(saved.Pending) }()
	if state.svid != nil {
		if saved.Key, err = x509.MarshalPKCS8PrivateKey(state.svid.PrivateKey); err != nil {
			return err
		}
		saved.Chain = RawChain(state.svid.Certificates)
	}
	if state.pending != nil {
		if saved.Pending, err = x509.MarshalPKCS8PrivateKey(state.pending); err != nil {
			return err
		}
	}
	if state.bundle != nil {
		if saved.Bundle, err = state.bundle.Marshal(); err != nil {
			return err
		}
	}
	plain, err := json.Marshal(saved)
	if err != nil {
		return err
	}
	defer clear(plain)
	sealed, err := f.kek.Seal(stateRecord(id), plain)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(sealed)
	return replaceFile(f.path, append(append([]byte(stateMagic), sum[:]...), sealed...))
}

func (f *StateFile) load(id spiffeid.ID) (state sourceState, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("identity: restore the state of %s from %s: %w", id, f.path, err)
		}
	}()
	file, err := os.Open(f.path)
	if err != nil {
		return sourceState{}, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxStateFile+1))
	if err != nil {
		return sourceState{}, err
	}
	rest, ok := bytes.CutPrefix(data, []byte(stateMagic))
	if !ok || len(rest) < sha256.Size || len(data) > maxStateFile {
		return sourceState{}, fmt.Errorf("%w: it does not look like one: remove it and enrol again", ErrStateDamaged)
	}
	sealed := rest[sha256.Size:]
	if sum := sha256.Sum256(sealed); !bytes.Equal(sum[:], rest[:sha256.Size]) {
		return sourceState{}, fmt.Errorf("%w: its checksum is wrong: remove it and enrol again", ErrStateDamaged)
	}
	plain, err := f.kek.Open(stateRecord(id), sealed)
	if err != nil {
		return sourceState{}, err
	}
	defer clear(plain)
	var saved savedState
	if err := json.Unmarshal(plain, &saved); err != nil {
		return sourceState{}, fmt.Errorf("%w: %w", ErrStateDamaged, err)
	}
	defer func() { clear(saved.Key); clear(saved.Pending) }()
	return saved.parse(id)
}

func (saved savedState) parse(id spiffeid.ID) (state sourceState, err error) {
	if len(saved.Bundle) > 0 {
		if state.bundle, err = ParseBundle(id.TrustDomain(), saved.Bundle); err != nil {
			return sourceState{}, err
		}
	}
	if len(saved.Pending) > 0 {
		if state.pending, err = parseECKey(saved.Pending); err != nil {
			return sourceState{}, err
		}
	}
	if len(saved.Chain) > 0 {
		chain, err := ParseRawChain(saved.Chain)
		if err != nil {
			return sourceState{}, err
		}
		key, err := parseECKey(saved.Key)
		if err != nil {
			return sourceState{}, err
		}
		if got, err := x509svid.IDFromCert(chain[0]); err != nil || got != id || !key.PublicKey.Equal(chain[0].PublicKey) {
			return sourceState{}, fmt.Errorf("%w: its SVID is not this process's", ErrStateDamaged)
		}
		state.svid = &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
	}
	return state, nil
}

func parseECKey(pkcs8 []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fmt.Errorf("%w: a key in it: %w", ErrStateDamaged, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%w: a key in it is a %T", ErrStateDamaged, key)
	}
	return ec, nil
}

// stateRecord binds the seal to the identity: a process's state opens for no
// other one, though they share a key file.
func stateRecord(id spiffeid.ID) string { return "svid-state\x00" + id.String() }
