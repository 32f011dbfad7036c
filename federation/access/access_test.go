package access_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftmesh/weft/federation/access"
)

func TestConfigKeepsItsContexts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft", "config.yaml")
	c, err := access.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Context(""); err == nil || !strings.Contains(err.Error(), "no context yet") {
		t.Errorf("empty config: got %v", err)
	}
	a := access.Context{Name: "a", TrustDomain: "one.example", Controllers: []string{"127.0.0.1:1"}, CA: "root a", Operator: "admin", Certificate: "cert", Key: "key"}
	if err := c.Put(a); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(path); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v; want 0600", info.Mode(), err)
	}
	again, err := access.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(c, again); diff != "" {
		t.Errorf("after a round trip (-want +got):\n%s", diff)
	}
	if got, err := again.Context(""); err != nil || got.Name != "a" {
		t.Errorf("current context: %v, %v", got, err)
	}
	if _, err := again.Context("b"); err == nil || !strings.Contains(err.Error(), `["a"]`) {
		t.Errorf("unknown context: got %v", err)
	}
}

func TestPutNeverOverwritesAnotherMesh(t *testing.T) {
	c := &access.Config{}
	if err := c.Put(access.Context{Name: "x", TrustDomain: "one.example", CA: "1"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Put(access.Context{Name: "x", TrustDomain: "one.example", CA: "2"}); err == nil {
		t.Error("a context of another mesh was overwritten")
	}
	if err := c.Put(access.Context{Name: "x", TrustDomain: "one.example", CA: "1", Operator: "ann"}); err != nil {
		t.Error(err)
	}
}

func TestLoadRefusesWhatItDoesNotKnow(t *testing.T) {
	for name, text := range map[string]string{
		"unknown field": "apiVersion: weft.dev/v1\nkind: Config\ncolour: red\n",
		"another kind":  "apiVersion: v1\nkind: Config\n",
	} {
		path := filepath.Join(t.TempDir(), "c.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := access.Load(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want an error that names the file", name, err)
		}
	}
}

func TestSecretHidesItself(t *testing.T) {
	k := access.Secret("TOPSECRET")
	if s := fmt.Sprintf("%v %s %#v %+v", k, k, k, access.Context{Key: k}); strings.Contains(s, "TOPSECRET") {
		t.Errorf("printed: %s", s)
	}
}
