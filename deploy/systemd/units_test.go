package systemd_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The units by file name, with the binary and the configuration of each.
var units = map[string][2]string{
	"weft-controller.service": {"weft-controller", "controller"},
	"weft-agent.service":      {"weft-agent", "agent"},
	"weft-gateway.service":    {"weft-gateway", "gateway"},
	"weft-proxy@.service":     {"weft-proxy", "proxy-%i"},
}

func TestEveryUnitIsKnown(t *testing.T) {
	files, err := filepath.Glob("*.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if _, ok := units[file]; !ok {
			t.Errorf("%s has no line in units, so nothing checks it", file)
		}
	}
	if len(files) != len(units) {
		t.Errorf("got %d units, want %d", len(files), len(units))
	}
}

func TestUnits(t *testing.T) {
	for file, want := range units {
		t.Run(file, func(t *testing.T) {
			unit, err := parse(file)
			if err != nil {
				t.Fatal(err)
			}
			exec := fmt.Sprintf("/usr/bin/%s --config /etc/weft/%s.yaml", want[0], want[1])
			for setting, value := range map[string]string{
				"Service.Type":            "notify",
				"Service.ExecStart":       exec,
				"Service.User":            want[0],
				"Service.KillSignal":      "SIGTERM",
				"Service.LimitCORE":       "0",
				"Service.NoNewPrivileges": "true",
				"Service.ProtectSystem":   "strict",
				"Service.Restart":         "on-failure",
				"Service.StateDirectory":  "weft/" + want[1],
				"Service.TimeoutStopSec":  "30s", // longer than drain-timeout
				"Install.WantedBy":        "multi-user.target",
			} {
				if got := unit[setting]; !slices.Equal(got, []string{value}) {
					t.Errorf("%s is %q, want %q", setting, got, value)
				}
			}
			users, err := os.ReadFile("weft.sysusers.conf")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(users), "\nu "+want[0]+" ") {
				t.Errorf("weft.sysusers.conf does not make the user %s", want[0])
			}
		})
	}
}

// TestSystemdAcceptsUnits asks systemd itself where there is one: it knows every
// setting's name and the values that it takes.
func TestSystemdAcceptsUnits(t *testing.T) {
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze on this machine to ask")
	}
	for file := range units {
		t.Run(file, func(t *testing.T) {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// It insists that the program exists, and that a template is an instance.
			unit := strings.Replace(string(content), "ExecStart=/usr/bin/weft-", "ExecStart=/bin/true ", 1)
			copied := filepath.Join(t.TempDir(), strings.Replace(file, "@.", "@payments.", 1))
			if err := os.WriteFile(copied, []byte(unit), 0o600); err != nil {
				t.Fatal(err)
			}
			// It exits with 0 after mere warnings, and it may warn of this
			// machine's own units.
			out, err := exec.Command(verify, "verify", copied).CombinedOutput()
			if err != nil || strings.Contains(string(out), filepath.Base(copied)) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, bad := range []string{"A=1\n", "[Unit]\nA\n", "[Unit]\n = 1\n", "[Unit\nA=1\n"} {
		file := filepath.Join(t.TempDir(), "bad.service")
		if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if unit, err := parse(file); err == nil {
			t.Errorf("%q: got %q, want an error", bad, unit)
		}
	}
}

// parse reads a unit file into its values by "Section.Setting".
func parse(file string) (map[string][]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	unit := make(map[string][]string)
	section := ""
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[' && strings.HasSuffix(line, "]"):
			section = line[1 : len(line)-1]
		default:
			setting, value, ok := strings.Cut(line, "=")
			if !ok || section == "" || setting == "" || strings.ContainsAny(setting, " []") {
				return nil, fmt.Errorf("%s:%d: %q is no setting of a section", file, n, line)
			}
			unit[section+"."+setting] = append(unit[section+"."+setting], value)
		}
	}
	return unit, lines.Err()
}
