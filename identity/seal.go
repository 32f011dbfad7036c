package identity

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// Errors of opening what was sealed; test for them with errors.Is.
var (
	// ErrWrongKey says that another key-encryption key sealed the data.
	ErrWrongKey = errors.New("sealed under another key-encryption key")
	// ErrSealBroken says that the key is right, and the data is not: it was
	// changed, cut, or belongs to another record.
	ErrSealBroken = errors.New("sealed data is damaged or belongs to another record")
)

const (
	kekSize   = 32
	dekSize   = 32
	kekIDSize = 8
	nonceSize = 12
	tagSize   = 16
	sealMagic = "weftseal\x01"
)

// KEK is a key-encryption key. It seals records in an envelope: each record
// is encrypted by AES-256-GCM under a fresh key of its own, and that key under
// the KEK, so that the KEK encrypts 32 random bytes per record and nothing
// else. A KEK is kept apart from what it seals and from backups of it. It is
// immutable, safe for concurrent use, and never prints.
type KEK struct {
	aead cipher.AEAD
	id   [kekIDSize]byte
}

// NewKEK uses 32 secret bytes as a key-encryption key.
func NewKEK(secret []byte) (*KEK, error) {
	if len(secret) != kekSize {
		return nil, fmt.Errorf("identity: a key-encryption key has %d bytes, not %d", kekSize, len(secret))
	}
	aead, err := newGCM(secret)
	if err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte("weft key-encryption key id"))
	k := &KEK{aead: aead}
	copy(k.id[:], mac.Sum(nil))
	return k, nil
}

// LoadKEK reads a key file: 32 bytes, readable by its owner only. A missing
// file is fs.ErrNotExist: where sealed records exist already, that is the
// error to show, for a new key would open none of them.
func LoadKEK(path string) (*KEK, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("identity: read the key-encryption key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("identity: read the key-encryption key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("identity: key-encryption key %s is not a regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("identity: key-encryption key %s is open to others (mode %04o): chmod 600 it, and think about who may have read it", path, info.Mode().Perm())
	}
	secret, err := io.ReadAll(io.LimitReader(f, kekSize+1))
	if err != nil {
		return nil, fmt.Errorf("identity: read the key-encryption key: %w", err)
	}
	if len(secret) != kekSize {
		return nil, fmt.Errorf("identity: key-encryption key %s has not exactly %d bytes: restore it from where you keep it", path, kekSize)
	}
	return NewKEK(secret)
}

// LoadOrCreateKEK reads a key file, or makes it with a random key if there is
// none. Several processes may do so at once: all end with the same key.
func LoadOrCreateKEK(path string) (*KEK, error) {
	k, err := LoadKEK(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	secret := make([]byte, kekSize)
	if _, err := rand.Read(secret); err != nil {
		return nil, fmt.Errorf("identity: make a key-encryption key: %w", err)
	}
	// The key is written whole before it gets its name, and Link never
	// replaces: a crash leaves no short key, and of two creators one wins.
	tmp, err := writeTemp(filepath.Dir(path), ".kek-*", secret)
	if err != nil {
		return nil, fmt.Errorf("identity: create key-encryption key %s: %w", path, err)
	}
	defer os.Remove(tmp)
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("identity: create key-encryption key %s: %w", path, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("identity: create key-encryption key %s: %w", path, err)
	}
	return LoadKEK(path)
}

// ID names the key in logs and errors: a keyed hash that says nothing of it.
func (k *KEK) ID() string { return hex.EncodeToString(k.id[:]) }

// String is the key's ID.
func (k *KEK) String() string { return "key-encryption key " + k.ID() }

// GoString keeps %#v from printing the key.
func (k *KEK) GoString() string { return k.String() }

// LogValue logs the key's ID.
func (k *KEK) LogValue() slog.Value { return slog.StringValue(k.ID()) }

// MarshalJSON writes the key's ID.
func (k *KEK) MarshalJSON() ([]byte, error) { return []byte(`"` + k.ID() + `"`), nil }

// Seal encrypts plaintext for the record that is named: its path with its slot
// or epoch. The name is bound to the data and needed to open it, so that a
// sealed key copied to another record's place does not open there.
//
// The result is magic, KEK id, nonce, wrapped record key, nonce, ciphertext.
func (k *KEK) Seal(record string, plaintext []byte) ([]byte, error) {
	var random [dekSize + 2*nonceSize]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, fmt.Errorf("identity: seal %s: %w", record, err)
	}
	dek, keyNonce, dataNonce := random[:dekSize], random[dekSize:dekSize+nonceSize], random[dekSize+nonceSize:]
	defer clear(dek)
	inner, err := newGCM(dek)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, sealOverhead+len(plaintext))
	out = append(out, sealMagic...)
	out = append(out, k.id[:]...)
	out = append(out, keyNonce...)
	out = k.aead.Seal(out, keyNonce, dek, sealAAD("key", record))
	out = append(out, dataNonce...)
	return inner.Seal(out, dataNonce, plaintext, sealAAD("data", record)), nil
}

const sealOverhead = len(sealMagic) + kekIDSize + nonceSize + dekSize + tagSize + nonceSize + tagSize

// Open decrypts what Seal made for the same record. The error is ErrWrongKey
// or ErrSealBroken.
func (k *KEK) Open(record string, sealed []byte) ([]byte, error) {
	broken := func(what string) ([]byte, error) {
		return nil, fmt.Errorf("identity: open %s: %s: %w: restore it from a backup", record, what, ErrSealBroken)
	}
	if len(sealed) < sealOverhead {
		return broken("it is too short")
	}
	if string(sealed[:len(sealMagic)]) != sealMagic {
		return broken("it does not start like sealed data")
	}
	rest := sealed[len(sealMagic):]
	id, rest := rest[:kekIDSize], rest[kekIDSize:]
	if !hmac.Equal(id, k.id[:]) {
		return nil, fmt.Errorf("identity: open %s: %w: it names key %x, the key given is %s: give the key file that this data was written with", record, ErrWrongKey, id, k.ID())
	}
	keyNonce, rest := rest[:nonceSize], rest[nonceSize:]
	wrapped, rest := rest[:dekSize+tagSize], rest[dekSize+tagSize:]
	dataNonce, ciphertext := rest[:nonceSize], rest[nonceSize:]
	dek, err := k.aead.Open(nil, keyNonce, wrapped, sealAAD("key", record))
	if err != nil {
		return broken("its key does not open")
	}
	defer clear(dek)
	inner, err := newGCM(dek)
	if err != nil {
		return nil, err
	}
	plaintext, err := inner.Open(nil, dataNonce, ciphertext, sealAAD("data", record))
	if err != nil {
		return broken("its content does not open")
	}
	return plaintext, nil
}

func sealAAD(part, record string) []byte { return []byte(sealMagic + part + "\x00" + record) }

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("identity: AES-256: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("identity: AES-256-GCM: %w", err)
	}
	return aead, nil
}

// replaceFile writes a file so that a crash leaves the old content or the new,
// readable by its owner only.
func replaceFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	tmp, err := writeTemp(dir, "."+filepath.Base(path)+"-*", data)
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(dir)
}

// writeTemp makes a file of mode 0600 with data in it, on the disk.
func writeTemp(dir, pattern string, data []byte) (path string, err error) {
	f, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
