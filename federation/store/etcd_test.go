package store

import (
	"testing"
	"time"
)

// forEachEtcd runs a test against every kind of etcd.
func forEachEtcd(t *testing.T, test func(*testing.T, *Store)) {
	t.Run("embedded", func(t *testing.T) { test(t, open(t, embeddedConfig(t))) })
}

// eventually waits for a state.
func eventually(t testing.TB, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come to that")
		}
	}
}
