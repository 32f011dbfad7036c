package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// shellBlocks are the commands that a document shows.
func shellBlocks(t *testing.T, file string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", file))
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(string(data), -1) {
		blocks = append(blocks, m[1])
	}
	if len(blocks) == 0 {
		t.Fatalf("%s shows no command", file)
	}
	return blocks
}

// TestReadmeCommands: what README tells people to make is there to be made. The
// demo and the tests have runs of their own.
func TestReadmeCommands(t *testing.T) {
	help, err := exec.Command("make", "--no-print-directory", "-C", "..", "help").CombinedOutput()
	if err != nil {
		t.Fatalf("make help: %v\n%s", err, help)
	}
	for _, block := range shellBlocks(t, "README.md") {
		for line := range strings.Lines(block) {
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "make" {
				t.Errorf("%q is no make target: run it here", line)
				continue
			}
			if out, err := exec.Command("make", "-C", "..", "--dry-run", words[1]).CombinedOutput(); err != nil {
				t.Errorf("make %s: %v\n%s", words[1], err, out)
			}
			if !strings.Contains(string(help), words[1]+" ") {
				t.Errorf("make help does not tell of %s:\n%s", words[1], help)
			}
		}
	}
}

// TestQuickstart types the quickstart's commands, in their order, into one
// shell.
func TestQuickstart(t *testing.T) {
	root := t.TempDir()
	if err := os.Symlink(os.Getenv(binariesEnv), filepath.Join(root, "bin")); err != nil {
		t.Fatal(err)
	}
	script := "set -euo pipefail\n" + strings.Join(shellBlocks(t, "docs/quickstart.md"), "\n")
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	shell := exec.CommandContext(ctx, "bash", "-c", script)
	shell.Dir = root
	shell.Env = append(os.Environ(), "TMPDIR="+root)
	// A group of its own: whatever the commands start ends with it.
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	shell.Cancel = func() error { return syscall.Kill(-shell.Process.Pid, syscall.SIGKILL) }
	said := filepath.Join(root, "said")
	out, err := os.Create(said)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	shell.Stdout, shell.Stderr = out, out
	err = shell.Run()
	text, readErr := os.ReadFile(said)
	if err != nil || readErr != nil {
		_ = syscall.Kill(-shell.Process.Pid, syscall.SIGKILL) // what it left running
		t.Fatalf("the quickstart's commands: %v\n%s", err, text)
	}
	for _, want := range []string{"named in step 1 of the order", "endpoint 127.7.2.10:8080", `{"cluster":"eu-1","backend":"hello"}`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the quickstart does not show %q:\n%s", want, text)
		}
	}
	left, err := filepath.Glob(filepath.Join(root, "tmp.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("the quickstart leaves %v behind, %v", left, err)
	}
}
