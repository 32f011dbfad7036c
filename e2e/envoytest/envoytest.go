// Package envoytest finds the pinned Envoy for tests that run one.
//
// Such a test is skipped, with one line that says why, on a machine without
// Envoy; under CI=true it fails instead, so that a green run has run it.
package envoytest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Version is the release that the tests are written against; tools/envoy.txt
// pins the same one.
const Version = "1.40.0"

// Binary returns the path of an Envoy to run: $WEFT_ENVOY, or the one that
// `make envoy` keeps in the user's cache. It fetches nothing.
func Binary(t testing.TB) string {
	t.Helper()
	file, err := find(os.Getenv)
	switch {
	case err == nil:
		return file
	case os.Getenv("CI") == "true":
		t.Fatalf("%v", err)
	default:
		t.Skipf("%v", err)
	}
	return "" // not reached
}

func find(getenv func(string) string) (string, error) {
	if file := getenv("WEFT_ENVOY"); file != "" {
		if err := executable(file); err != nil {
			return "", fmt.Errorf("no Envoy at WEFT_ENVOY: %w; correct or unset it", err)
		}
		return file, nil
	}
	cache := getenv("XDG_CACHE_HOME")
	if cache == "" {
		cache = filepath.Join(getenv("HOME"), ".cache")
	}
	file := filepath.Join(cache, "weft", "envoy", Version, "envoy")
	if err := executable(file); err != nil {
		return "", fmt.Errorf("no Envoy %s: %w; fetch it with `make envoy`, or set WEFT_ENVOY", Version, err)
	}
	return file, nil
}

func executable(file string) error {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s does not exist", file)
	case err != nil:
		return err
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("%s is not an executable file", file)
	}
	return nil
}
