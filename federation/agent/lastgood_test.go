package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

func sampleState() *lastGood {
	return &lastGood{
		TrustDomain: "weft.test", Cluster: "eu-1",
		Revision:  federation.Revision{Incarnation: "i", Number: 42},
		Documents: []savedDocument{{File: "a.yaml", YAML: serviceYAML("payments", "127.0.0.1:80")}},
		Resolved:  map[string][]string{"gw.example": {"10.0.0.1"}},
		Records: []*federationv1.Record{
			federationv1.DenialRecord(federation.Denial{Cluster: "bad", Generation: 1}),
			federationv1.MemberRecord(member("eu-2", "10.0.0.2:15443")),
		},
	}
}

func sameState(t *testing.T, got, want *lastGood) {
	t.Helper()
	a, errA := got.encode()
	b, errB := want.encode()
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("%+v (%v)\nwant %+v (%v)", got, errA, want, errB)
	}
}

func TestLastGoodIsReadBack(t *testing.T) {
	dir := t.TempDir()
	if l, err := loadLastGood(dir, "weft.test", "eu-1", time.Now()); l != nil || err != nil {
		t.Fatalf("an empty folder holds %v, %v", l, err)
	}
	b, err := sampleState().encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, lastGoodName)
	if err := writeFile(path, b); err != nil {
		t.Fatal(err)
	}
	l, err := loadLastGood(dir, "weft.test", "eu-1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sameState(t, l, sampleState())
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 {
		t.Errorf("a write leaves %v", entries)
	}
}

// Every truncation and every flipped bit is noticed: a damaged file is set
// aside, with its content, and never loads in part.
func TestDamagedStateIsSetAside(t *testing.T) {
	whole, err := sampleState().encode()
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		if _, err := decodeLastGood(whole[:n]); err == nil {
			t.Fatalf("the first %d of %d bytes load", n, len(whole))
		}
		flipped := bytes.Clone(whole)
		flipped[n] ^= 1 << (n % 8)
		if _, err := decodeLastGood(flipped); err == nil {
			t.Fatalf("with a flipped bit in byte %d it loads", n)
		}
	}
	if _, err := decodeLastGood(append(bytes.Clone(whole), 0)); err == nil {
		t.Fatal("with a byte behind it it loads")
	}

	foreign := sampleState()
	foreign.Cluster = "us-1"
	other, err := foreign.encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"cut":     whole[:len(whole)/2],
		"empty":   {},
		"text":    []byte("hello"),
		"foreign": other,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, lastGoodName)
			now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			for i := range asideKept + 2 {
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Fatal(err)
				}
				l, err := loadLastGood(dir, "weft.test", "eu-1", now.Add(time.Duration(i)*time.Second))
				if l != nil || err == nil || !strings.Contains(err.Error(), "it is kept as") {
					t.Fatalf("it loads as %v, %v", l, err)
				}
			}
			if _, err := os.Stat(path); err == nil {
				t.Error("it is still in its place")
			}
			aside, _ := filepath.Glob(path + ".unusable-*")
			if len(aside) != asideKept {
				t.Fatalf("%d files are kept, want %d", len(aside), asideKept)
			}
			if b, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(b, content) {
				t.Errorf("what is kept is not what was there: %v", err)
			}
		})
	}
}

// A file of the wrong kind in the state's place hangs nobody.
func TestStateThatIsNoFile(t *testing.T) {
	for name, make := range map[string]func(string) error{
		"fifo":   func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"folder": func(p string) error { return os.Mkdir(p, 0o700) },
		"device": func(p string) error { return os.Symlink("/dev/zero", p) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := make(filepath.Join(dir, lastGoodName)); err != nil {
				t.Fatal(err)
			}
			if _, err := loadLastGood(dir, "weft.test", "eu-1", time.Now()); err == nil {
				t.Error("it loads")
			}
		})
	}
}

// A write that a crash cut short leaves the file before it in place.
func TestCrashInMidWrite(t *testing.T) {
	dir := t.TempDir()
	b, err := sampleState().encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(dir, lastGoodName), b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "."+lastGoodName+".tmp"), b[:10], 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := loadLastGood(dir, "weft.test", "eu-1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sameState(t, l, sampleState())
	if err := writeFile(filepath.Join(dir, lastGoodName), b); err != nil {
		t.Errorf("the next write: %v", err)
	}
}

// An agent whose state is damaged starts all the same, and says so.
func TestAgentWithDamagedState(t *testing.T) {
	h := newHub(t, "eu-1")
	h.remote("eu-2", payments, "10.0.0.2:15443", "127.9.0.1", 2)
	c := h.config(t)
	a := start(t, c)
	eventually(t, "eu-2 serves", func() bool { return a.first(payments) == "eu-2" })
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.StateDir, lastGoodName)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	h.stop()
	a = start(t, c)
	if a.inForce.Load() != nil {
		t.Error("without memory and controller, proxies are told something")
	}
	if f := a.findings.of("last-good"); len(f) != 1 || f[0].Code != federation.CodeLastGoodUnusable {
		t.Errorf("findings %v", f)
	}
	h.restart()
	eventually(t, "eu-2 serves again", func() bool { return a.first(payments) == "eu-2" })
	eventually(t, "the finding is reported", func() bool {
		return h.record("finding/eu-1/"+string(federation.CodeLastGoodUnusable)+"/cluster/eu-1") != nil
	})
}

func FuzzLastGood(f *testing.F) {
	whole, err := sampleState().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:lastGoodHeader])
	f.Add([]byte(lastGoodMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := decodeLastGood(b)
		if err != nil {
			return
		}
		again, err := l.encode()
		if err != nil {
			return // text that is no UTF-8 cannot be written anew
		}
		m, err := decodeLastGood(again)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Records) != len(l.Records) {
			t.Fatal("records were lost")
		}
		for i := range m.Records {
			if !proto.Equal(m.Records[i], l.Records[i]) {
				t.Fatal("a record changed")
			}
		}
	})
}
