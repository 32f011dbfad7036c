package identity_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weftmesh/weft/identity"
)

func TestASourceStartsFromItsDiskWhileTheIssuerIsAway(t *testing.T) {
	m := newMesh(t, t0)
	dir := t.TempDir()
	kek := must(identity.LoadOrCreateKEK(filepath.Join(dir, "kek")))(t)
	path := filepath.Join(dir, "svid")
	start := func(now time.Time, id string, kek *identity.KEK) (*identity.Source, *office) {
		o := newOffice(t, m, at(now), id)
		o.away = errors.New("away")
		return newSource(t, o, id, func(c *identity.SourceConfig) { c.State = identity.NewStateFile(path, kek) }), o
	}

	s, o := start(t0, agentEU, kek)
	if err := s.Restore(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
	o.set(func(o *office) { o.away = nil })
	if err := s.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	was := must(s.GetX509SVID())(t)
	if info := must(os.Stat(path))(t); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %o", info.Mode().Perm())
	}

	s, _ = start(t0.Add(time.Hour), agentEU, kek)
	if err := s.Restore(); err != nil {
		t.Fatal(err)
	}
	svid := must(s.GetX509SVID())(t)
	if !svid.Certificates[0].Equal(was.Certificates[0]) || !s.Bundle().Equal(m.bundle) {
		t.Error("another state than was saved")
	}
	// It works: a server with it is accepted.
	v := identity.NewVerifier(identity.VerifierConfig{Clock: at(t0.Add(time.Hour)), Mesh: s})
	got := meet(t, v.Server(identity.ServerConfig{SVID: s, Authorize: identity.AllowAny()}), v.Client(identity.ClientConfig{SVID: s, Authorize: identity.AllowAgentOf("eu-1")}))
	if got.client != nil || got.server != nil {
		t.Errorf("client %v, server %v", got.client, got.server)
	}

	// An expired one is restored, to prove who renews, and not served.
	s, _ = start(t0.Add(48*time.Hour), agentEU, kek)
	if err := s.Restore(); err != nil {
		t.Error(err)
	}
	if _, err := s.GetX509SVID(); !errors.Is(err, identity.ErrExpired) {
		t.Errorf("got %v", err)
	}

	saved := must(os.ReadFile(path))(t)
	if bytes.Contains(saved, []byte("cluster/eu-1")) || bytes.Contains(saved, []byte("key")) {
		t.Error("the state file is readable")
	}
	other := must(identity.NewKEK(bytes.Repeat([]byte{7}, 32)))(t)
	s, _ = start(t0, agentEU, other)
	if err := s.Restore(); !errors.Is(err, identity.ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	s, _ = start(t0, gatewayEU, kek)
	if err := s.Restore(); !errors.Is(err, identity.ErrSealBroken) {
		t.Errorf("another process's file: %v", err)
	}
	for i := range saved {
		if i%7 != 0 && i > 100 {
			continue // every byte of the head, every seventh of the body
		}
		bad := bytes.Clone(saved)
		bad[i] ^= 0x40
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, _ = start(t0, agentEU, kek)
		if err := s.Restore(); !errors.Is(err, identity.ErrStateDamaged) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
	for _, n := range []int{0, 1, 30, 60, len(saved) - 1} {
		if err := os.WriteFile(path, saved[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		s, _ = start(t0, agentEU, kek)
		if err := s.Restore(); !errors.Is(err, identity.ErrStateDamaged) {
			t.Errorf("cut after %d: %v", n, err)
		}
	}
}

// A crash between the request and its answer must not burn the join token: the
// same key asks again.
func TestEnrolmentAsksAgainWithTheSameKey(t *testing.T) {
	m := newMesh(t, t0)
	dir := t.TempDir()
	state := identity.NewStateFile(filepath.Join(dir, "svid"), must(identity.LoadOrCreateKEK(filepath.Join(dir, "kek")))(t))
	o := newOffice(t, m, at(t0), agentEU)
	o.asker = identity.TokenAsks("eu-1")
	withState := func(c *identity.SourceConfig) { c.State = state }
	lost := identity.IssuerFunc(func(ctx context.Context, csr []byte) (identity.Issued, error) {
		_, _ = o.Issue(ctx, csr)
		return identity.Issued{}, errors.New("connection reset")
	})
	if err := newSource(t, o, agentEU, withState).Enrol(t.Context(), lost); err == nil {
		t.Fatal("enrolled by nothing")
	}
	s := newSource(t, o, agentEU, withState)
	if err := s.Restore(); err != nil {
		t.Fatal(err)
	}
	if err := s.Enrol(t.Context(), lost); err == nil {
		t.Fatal("enrolled by nothing")
	}
	if err := s.Enrol(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if len(o.keys) != 1 {
		t.Errorf("three attempts used %d keys", len(o.keys))
	}
	// The next enrolment is another one, with a key of its own.
	if err := s.Enrol(t.Context(), o); err != nil || len(o.keys) != 2 {
		t.Errorf("%v, %d keys", err, len(o.keys))
	}
	// Without a place to keep the key, nothing is asked for.
	asked := len(o.askedAt())
	gone := newSource(t, o, agentEU, func(c *identity.SourceConfig) {
		c.State = identity.NewStateFile(filepath.Join(dir, "no", "such", "folder"), must(identity.LoadKEK(filepath.Join(dir, "kek")))(t))
	})
	if err := gone.Enrol(t.Context(), o); !errors.Is(err, fs.ErrNotExist) || len(o.askedAt()) != asked {
		t.Errorf("%v", err)
	}
	// A renewal that cannot be saved is used, and counted.
	reg := prometheus.NewRegistry()
	gone = newSource(t, o, agentEU, func(c *identity.SourceConfig) {
		c.State = identity.NewStateFile(filepath.Join(dir, "no", "such", "folder"), must(identity.LoadKEK(filepath.Join(dir, "kek")))(t))
		c.Metrics = reg
	})
	if err := gone.Renew(t.Context()); err != nil {
		t.Error(err)
	}
	if got := gauge(t, reg, "weft_svid_state_write_failures_total"); got != 1 {
		t.Errorf("%v write failures", got)
	}
}

func TestASourceNeverPrintsItsKey(t *testing.T) {
	m := newMesh(t, t0)
	o := newOffice(t, m, at(t0), agentEU)
	s := newSource(t, o, agentEU)
	if err := s.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "source", s, "subject", peer(t, agentEU).Subject)
	printed := log.String() + fmt.Sprintf("%v %+v %#v %s", s, s, s, s)
	if want := "source of " + agentEU; strings.Count(printed, want) != 4 || strings.Contains(printed, "ecdsa") || strings.Contains(printed, "svid:") {
		t.Error(printed)
	}
	if !strings.Contains(log.String(), `"source":"`+agentEU+`"`) || !strings.Contains(log.String(), `"subject":"`+agentEU+`"`) {
		t.Error(log.String())
	}
}
