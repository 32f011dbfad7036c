package identity_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/weftmesh/weft/identity"
)

func TestSealedDataOpensForItsRecordAndKeyOnly(t *testing.T) {
	kek := must(identity.NewKEK(bytes.Repeat([]byte{1}, 32)))(t)
	other := must(identity.NewKEK(bytes.Repeat([]byte{2}, 32)))(t)
	for _, plain := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("key "), 500)} {
		sealed := must(kek.Seal("authority/eu/a", plain))(t)
		if got := must(kek.Open("authority/eu/a", sealed))(t); !bytes.Equal(got, plain) {
			t.Errorf("got %q", got)
		}
		if len(plain) > 1 && bytes.Contains(sealed, plain[:4]) {
			t.Error("it is readable")
		}
		if again := must(kek.Seal("authority/eu/a", plain))(t); bytes.Equal(again, sealed) {
			t.Error("sealed twice, it is the same")
		}
		if _, err := other.Open("authority/eu/a", sealed); !errors.Is(err, identity.ErrWrongKey) || errors.Is(err, identity.ErrSealBroken) {
			t.Errorf("another key: %v", err)
		} else if !strings.Contains(err.Error(), kek.ID()) || !strings.Contains(err.Error(), other.ID()) {
			t.Errorf("the error does not name both keys: %v", err)
		}
		for _, record := range []string{"authority/eu/b", "authority/us/a", "", "authority/eu/a\x00"} {
			if _, err := kek.Open(record, sealed); !errors.Is(err, identity.ErrSealBroken) {
				t.Errorf("record %q: %v", record, err)
			}
		}
		for i := range sealed {
			bad := bytes.Clone(sealed)
			bad[i]++
			if _, err := kek.Open("authority/eu/a", bad); !errors.Is(err, identity.ErrSealBroken) && !errors.Is(err, identity.ErrWrongKey) {
				t.Fatalf("byte %d changed: %v", i, err)
			}
			if _, err := kek.Open("authority/eu/a", sealed[:i]); !errors.Is(err, identity.ErrSealBroken) {
				t.Fatalf("cut after %d: %v", i, err)
			}
		}
	}
	for _, n := range []int{0, 16, 31, 33} {
		if _, err := identity.NewKEK(make([]byte, n)); err == nil {
			t.Errorf("a key of %d bytes", n)
		}
	}
}

func TestAKeyFileIsMadeOnceAndKeptPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kek")
	if _, err := identity.LoadKEK(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	ids := make([]string, 50)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() { ids[i] = must(identity.LoadOrCreateKEK(path))(t).ID() })
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("two keys: %s and %s", id, ids[0])
		}
	}
	if got := must(identity.LoadKEK(path))(t).ID(); got != ids[0] {
		t.Errorf("loaded %s", got)
	}
	info := must(os.Stat(path))(t)
	if info.Mode().Perm() != 0o600 || info.Size() != 32 {
		t.Errorf("mode %o, %d bytes", info.Mode().Perm(), info.Size())
	}
	if left := must(os.ReadDir(filepath.Dir(path)))(t); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.LoadKEK(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	if _, err := identity.LoadOrCreateKEK(path); err == nil {
		t.Error("such a key is used")
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{0, 31, 33} {
		if err := os.Truncate(path, n); err != nil {
			t.Fatal(err)
		}
		if _, err := identity.LoadOrCreateKEK(path); err == nil || !strings.Contains(err.Error(), "32 bytes") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, err := identity.LoadKEK(t.TempDir()); err == nil {
		t.Error("a folder is a key")
	}
}

func TestAuthoritiesAreStoredAndOpened(t *testing.T) {
	m := newMesh(t, t0)
	kek := must(identity.NewKEK(bytes.Repeat([]byte{1}, 32)))(t)
	other := must(identity.NewKEK(bytes.Repeat([]byte{2}, 32)))(t)
	for path, a := range map[string]*identity.Authority{"authority/root/a": m.root, "authority/eu/a": m.region, "authority/operators/a": m.operators} {
		stored := must(must(a.Seal(kek, path))(t).Marshal())(t)
		if bytes.Contains(stored, []byte("PRIVATE")) {
			t.Errorf("%s holds a key in clear", path)
		}
		record := must(identity.ParseAuthorityRecord(stored))(t)
		certs := must(record.Certificates())(t)
		if !certs[0].Equal(a.Certificate()) || !certs[len(certs)-1].Equal(a.Root()) {
			t.Errorf("%s: other certificates", path)
		}
		opened := must(identity.OpenAuthority(record, kek, path))(t)
		if opened.Kind() != a.Kind() || opened.Region() != a.Region() || opened.TrustDomain() != td || opened.Serial() != a.Serial() || opened.String() != a.String() {
			t.Errorf("%v opens as %v", a, opened)
		}
		if a.Kind() == identity.KindRegion { // and signs
			key := must(identity.NewKey())(t)
			must(opened.SignLeaf(identity.Admitted{ID: must(identity.AgentID(td, "eu-1"))(t), Key: &key.PublicKey}, m.lifetimes, t0))(t)
		}
		if _, err := identity.OpenAuthority(record, other, path); !errors.Is(err, identity.ErrWrongKey) {
			t.Errorf("another key: %v", err)
		}
		if _, err := identity.OpenAuthority(record, kek, path+"b"); !errors.Is(err, identity.ErrSealBroken) {
			t.Errorf("another slot: %v", err)
		}
	}

	// Nothing that is stored in clear can be exchanged.
	record := must(m.region.Seal(kek, "p"))(t)
	twin := must(must(m.root.NewRegion("eu", m.lifetimes, t0))(t).Seal(kek, "p"))(t)
	rootRecord := must(m.root.Seal(kek, "p"))(t)
	peopleRecord := must(m.operators.Seal(kek, "p"))(t)
	foreign := newMesh(t, t0)
	for name, change := range map[string]func(*identity.AuthorityRecord){
		"another certificate": func(r *identity.AuthorityRecord) { r.Chain = twin.Chain },
		"another key":         func(r *identity.AuthorityRecord) { r.SealedKey = twin.SealedKey },
		"another region":      func(r *identity.AuthorityRecord) { r.Region = "us" },
		"no region":           func(r *identity.AuthorityRecord) { r.Region = "" },
		"another kind":        func(r *identity.AuthorityRecord) { r.Kind = "root" },
		"the operators' kind": func(r *identity.AuthorityRecord) { r.Kind = "operators"; r.Region = "" },
		"no such kind":        func(r *identity.AuthorityRecord) { r.Kind = "queen" },
		"no kind":             func(r *identity.AuthorityRecord) { r.Kind = "" },
		"another domain":      func(r *identity.AuthorityRecord) { r.TrustDomain = "other.example" },
		"no root":             func(r *identity.AuthorityRecord) { r.Chain = string(identity.EncodePEM(certs(m.region)[:1])) },
		"another root": func(r *identity.AuthorityRecord) {
			r.Chain = string(identity.EncodePEM(append(certs(m.region), foreign.root.Root())))
		},
		"a chain of junk":      func(r *identity.AuthorityRecord) { r.Chain += "junk" },
		"a root's record":      func(r *identity.AuthorityRecord) { *r = rootRecord; r.Kind = "region"; r.Region = "eu" },
		"a root as operators'": func(r *identity.AuthorityRecord) { *r = rootRecord; r.Kind = "operators" },
		"operators' as a root": func(r *identity.AuthorityRecord) { *r = peopleRecord; r.Kind = "root" },
		"a key that was sealed for it by mistake": func(r *identity.AuthorityRecord) {
			der := must(x509.MarshalPKCS8PrivateKey(must(identity.NewKey())(t)))(t)
			r.SealedKey = must(kek.Seal(identity.SealName("p", m.region.Certificate()), der))(t)
		},
	} {
		changed := record
		change(&changed)
		if a, err := identity.OpenAuthority(changed, kek, "p"); err == nil {
			t.Errorf("%s: opens as %v", name, a)
		}
	}
	for _, bad := range []string{"", "{}", "[]", `{"version":2}`, `{"version":1,"extra":1}`} {
		if _, err := identity.ParseAuthorityRecord([]byte(bad)); err == nil {
			t.Errorf("parsed %q", bad)
		}
	}
}

// Whatever is stored as an authority's record: no panic, and what opens has the
// key of its own certificate and signs what its certificate may.
func FuzzOpenAuthority(f *testing.F) {
	m := newMesh(f, t0)
	kek := must(identity.NewKEK(bytes.Repeat([]byte{1}, 32)))(f)
	for _, a := range []*identity.Authority{m.root, m.region, m.operators} {
		f.Add(must(must(a.Seal(kek, "p"))(f).Marshal())(f))
	}
	f.Add([]byte(`{"version":1,"kind":"root","trustDomain":"mesh.example","chain":"-----BEGIN CERTIFICATE-----","sealedKey":"d2VmdHNlYWwB"}`))
	key := must(identity.NewKey())(f)
	f.Fuzz(func(t *testing.T, stored []byte) {
		record, err := identity.ParseAuthorityRecord(stored)
		if err != nil {
			return
		}
		a, err := identity.OpenAuthority(record, kek, "p")
		if err != nil {
			return
		}
		var signed *x509.Certificate
		switch a.Kind() {
		case identity.KindRoot:
			signed = must(a.NewRegion("eu", m.lifetimes, t0))(t).Certificate()
		case identity.KindRegion:
			signed = must(a.SignLeaf(identity.Admitted{ID: must(identity.AgentID(td, "eu-1"))(t), Key: &key.PublicKey}, m.lifetimes, t0))(t)[0]
		case identity.KindOperators:
			signed = must(a.SignLeaf(identity.Admitted{ID: must(identity.OperatorID(td, "ada"))(t), Key: &key.PublicKey}, m.lifetimes, t0))(t)[0]
		}
		if err := signed.CheckSignatureFrom(must(record.Certificates())(t)[0]); err != nil {
			t.Errorf("%v: %v", a, err)
		}
	})
}
