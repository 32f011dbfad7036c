package agent

import (
	"context"
	"crypto/x509"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/identity"
)

func TestParseSocket(t *testing.T) {
	got, err := ParseSocket(map[string]string{
		"path": "/run/weft/p.sock", "identity": "ns/shop/sa/payments", "listen": "10.0.0.20:15444", "mode": "0660",
		"outbound": "shop/carts=127.0.0.9 shop/stock=127.0.0.10",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Socket{
		Path: "/run/weft/p.sock", Identity: "ns/shop/sa/payments", Listen: netip.MustParseAddrPort("10.0.0.20:15444"), Mode: 0o660,
		Outbound: map[federation.ServiceID]netip.Addr{
			{Namespace: "shop", Name: "carts"}: netip.MustParseAddr("127.0.0.9"),
			{Namespace: "shop", Name: "stock"}: netip.MustParseAddr("127.0.0.10"),
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	for name, settings := range map[string]map[string]string{
		"no identity":          {"path": "/p"},
		"an agent's identity":  {"path": "/p", "identity": "agent"},
		"a full SPIFFE ID":     {"path": "/p", "identity": "spiffe://weft.test/cluster/eu-2/gateway"},
		"a climbing identity":  {"path": "/p", "identity": "ns/../sa/x"},
		"a listen name":        {"path": "/p", "identity": "gateway", "listen": "localhost:15443"},
		"a listen port 0":      {"path": "/p", "identity": "gateway", "listen": "127.0.0.1:0"},
		"a mode for everybody": {"path": "/p", "identity": "gateway", "mode": "0666"},
		"an outbound elsewhere": {
			"path": "/p", "identity": "ns/shop/sa/payments", "outbound": "shop/carts=10.0.0.1",
		},
		"an outbound of nothing": {"path": "/p", "identity": "ns/shop/sa/payments", "outbound": "=127.0.0.1"},
	} {
		if s, err := ParseSocket(settings); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// Pauses grow from 0.2 s to 5 s and differ from agent to agent.
func TestRetryPauses(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for failures := range 40 {
		for range 50 {
			d := retryAfter(failures)
			if d < syncRetryFirst || d > syncRetryMost {
				t.Fatalf("after %d failures a pause of %v", failures, d)
			}
			if failures > 10 {
				seen[d] = true
			}
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d different pauses", len(seen))
	}
	if d := slices.Max([]time.Duration{retryAfter(0), retryAfter(0), retryAfter(0)}); d > 2*syncRetryFirst {
		t.Errorf("the first pause is %v", d)
	}
}

// A token is good for one key: when the answer of an enrolment is lost, the next
// process asks with the same key.
func TestEnrolmentWhoseAnswerIsLost(t *testing.T) {
	h := newHub(t, "eu-1")
	var keys []string
	h.intercept = func(csr []byte) error {
		r, err := x509.ParseCertificateRequest(csr)
		if err != nil {
			t.Error(err)
			return err
		}
		hash, err := identity.KeyHash(r.PublicKey)
		if err != nil {
			t.Error(err)
			return err
		}
		keys = append(keys, hash)
		if len(keys) == 1 {
			return status.Error(codes.Unavailable, "the answer is lost")
		}
		return nil
	}
	c := h.config(t)
	lost, cancel := context.WithCancel(context.Background())
	first := c
	first.Metrics = h.registry()
	a, err := New(first)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Run(lost) }()
	eventually(t, "a first attempt", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.enrolments > 0
	})
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	start(t, c)
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(keys) < 2 || len(slices.Compact(slices.Clone(keys))) != 1 {
		t.Errorf("the attempts came with the keys %s", strings.Join(keys, ", "))
	}
}
