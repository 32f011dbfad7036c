package controller

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// From nothing to a service that another cluster sees.
func TestAServiceReachesAnotherCluster(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	eu1, eu2 := m.join(c, "eu-1"), m.join(c, "eu-2")
	a := m.mustConnect(eu1, c.Address(), nil)
	b := m.mustConnect(eu2, c.Address(), nil)
	a.until("a full set", func() bool { return a.full })

	if result := a.reportFull(offer("eu-1", "payments", 2)...); len(result.GetRefused()) != 0 {
		t.Fatalf("refused: %v", result.GetRefused())
	}
	b.until("the export", func() bool { return b.have["export/eu-1/shop/payments"] != nil })
	b.until("its readiness", func() bool { return b.have["ready/eu-1/shop/payments"].GetReadiness().GetReady() == 2 })
	b.until("an address of its own for it", func() bool { return b.have["vip/eu-2/shop/payments"].GetVip().GetAddress() != "" })
	if b.hold("vip/eu-1/shop/payments") != nil {
		t.Error("eu-2 sees an address of eu-1")
	}
	if got := b.hold("export/eu-1/shop/payments").GetExport().GetAccepted(); got == 0 {
		t.Error("the export has no revision of its acceptance")
	}

	a.report(&federationv1.Report{Deletes: []string{"export/eu-1/shop/payments"}})
	b.until("the export gone", func() bool {
		return b.have["export/eu-1/shop/payments"] == nil && b.have["ready/eu-1/shop/payments"] == nil
	})
	list, err := m.adminClient(c).List(timeout(t), &federationv1.ListRequest{Kind: federationv1.Kind_KIND_CLUSTER})
	if err != nil || len(list.GetObjects()) != 2 {
		t.Fatalf("clusters: %v, %v", list, err)
	}
	if got := list.GetObjects()[0].GetCluster(); got.GetMember().GetCluster() != "eu-1" || got.GetSession() != "one" || got.GetLiveness() != "fresh" {
		t.Errorf("cluster: %v", got)
	}
}

func TestTheFirstStartWritesACredential(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	info, err := os.Stat(m.admin)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("credential: %v, %v", info, err)
	}
	status, err := m.adminClient(c).GetStatus(timeout(t), &federationv1.GetStatusRequest{})
	if err != nil || status.GetTrustDomain() != m.td.Name() || len(status.GetControllers()) != 1 || status.GetStore().GetVersion() == "" {
		t.Errorf("status: %v, %v", status, err)
	}
	trust, err := m.adminClient(c).GetTrust(timeout(t), &federationv1.GetTrustRequest{})
	if err != nil || len(trust.GetAuthorities()) != 3 || !strings.HasPrefix(trust.GetCaHash(), "sha256:") {
		t.Errorf("trust: %v, %v", trust, err)
	}
	before, _ := os.ReadFile(m.admin)
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	again := m.start("one")
	after, _ := os.ReadFile(m.admin)
	if string(before) != string(after) {
		t.Error("a later start has written the credential again")
	}
	if _, err := m.adminClient(again).GetStatus(timeout(t), &federationv1.GetStatusRequest{}); err != nil {
		t.Errorf("the old credential at the new process: %v", err)
	}
}

func TestAnotherMeshsCredentialIsNotOverwritten(t *testing.T) {
	first := newTestMesh(t, clock.Real())
	first.start("one")
	before, _ := os.ReadFile(first.admin)
	second := newTestMesh(t, clock.Real())
	second.td, second.admin = first.td, first.admin
	cfg := second.config("two")
	cfg.Store.Endpoints, cfg.Store.Dir, cfg.Store.NoFsyncForTests = nil, shortDir(t), true
	s, err := Start(timeout(t), cfg)
	if err == nil {
		s.Stop()
		t.Fatal("a mesh of the same name has started over another's context")
	}
	if !strings.Contains(err.Error(), "belongs to another mesh") || !strings.Contains(err.Error(), "--admin-credential") {
		t.Errorf("says %q", err)
	}
	if after, _ := os.ReadFile(first.admin); string(after) != string(before) {
		t.Error("the file has changed")
	}
}

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "weft-ctl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestAWrongKeyRefusesToStart(t *testing.T) {
	m := newTestMesh(t, clock.Real())
	c := m.start("one")
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	right := m.kek
	for _, tt := range []struct {
		name, file, want string
	}{
		{"another key", filepath.Join(t.TempDir(), "kek"), "another key-encryption key"},
		{"no key", filepath.Join(t.TempDir(), "absent"), "there is none at"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "another key" {
				if err := os.WriteFile(tt.file, []byte(strings.Repeat("k", 32)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			m.kek = tt.file
			s, err := Start(timeout(t), m.config("two"))
			if err == nil {
				s.Stop()
				t.Fatal("it has started")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "--kek-file") {
				t.Errorf("says %q", err)
			}
		})
	}
	m.kek = right
	m.start("three")
}
