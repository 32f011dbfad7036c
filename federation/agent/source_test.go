package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// folder is a source and the folder it reads.
type folder struct {
	*source
	t   *testing.T
	dir string
}

func newFolder(t *testing.T) *folder {
	return &folder{newSource(td, "eu-1"), t, t.TempDir()}
}

func (f *folder) file(name, content string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *folder) remove(name string) {
	f.t.Helper()
	if err := os.RemoveAll(filepath.Join(f.dir, name)); err != nil {
		f.t.Fatal(err)
	}
}

// read loads the folder and says what there is, and what is wrong.
func (f *folder) read() (names, codes string) {
	f.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.load(f.dir, readFolder(f.dir))
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		f.t.Fatal("reading the folder hangs")
	}
	var list, found []string
	for id := range f.services() {
		list = append(list, id.Name)
	}
	for _, x := range f.findings {
		found = append(found, string(x.Code))
	}
	slices.Sort(list)
	slices.Sort(found)
	return strings.Join(list, " "), strings.Join(slices.Compact(found), " ")
}

func (f *folder) expect(names string, codes ...federation.Code) {
	f.t.Helper()
	var want []string
	for _, c := range codes {
		want = append(want, string(c))
	}
	slices.Sort(want)
	got, found := f.read()
	if got != names || found != strings.Join(want, " ") {
		f.t.Fatalf("services %q, findings %q (%v)\nwant %q, %q", got, found, f.findings, names, strings.Join(want, " "))
	}
}

func TestSourceFollowsTheFolder(t *testing.T) {
	f := newFolder(t)
	f.file("a.yaml", serviceYAML("payments", "127.0.0.1:80")+"---\n"+serviceYAML("carts", "127.0.0.1:81"))
	f.file("b.yml", serviceYAML("stock", "127.0.0.1:82"))
	f.file("notes.txt", "not read")
	f.file(".hidden.yaml", "not: [read")
	f.expect("carts payments stock")
	f.remove("b.yml")
	f.expect("carts payments")

	// A bad document is set aside, the last good version of it stays, and all
	// else counts.
	f.file("a.yaml", serviceYAML("payments", "127.0.0.1:80")+"  ports: twice\n---\n"+serviceYAML("carts", "127.0.0.1:99"))
	f.file("c.yaml", serviceYAML("stock", "127.0.0.1:82"))
	got, found := f.read()
	if got != "carts payments stock" || found == "" {
		t.Fatalf("services %q, findings %q", got, found)
	}
	if e := f.services()[federation.ServiceID{Namespace: "shop", Name: "carts"}].endpoints[0]; e.ports[0].plain.Port() != 99 {
		t.Errorf("the good document of the file does not count: %+v", e)
	}
	// A file that cannot be told apart at all keeps everything that it gave.
	f.file("a.yaml", "{{{{")
	f.expect("carts payments stock", federation.CodeFileMalformed)
	// It is mended, without one of its services.
	f.file("a.yaml", serviceYAML("payments", "127.0.0.1:80"))
	f.expect("payments stock")
}

// The first file by name has a service that stands in two.
func TestDuplicateServices(t *testing.T) {
	f := newFolder(t)
	f.file("b.yaml", serviceYAML("payments", "127.0.0.1:2"))
	f.expect("payments")
	f.file("a.yaml", serviceYAML("payments", "127.0.0.1:1"))
	f.expect("payments", federation.CodeDuplicateService)
	if p := f.services()[payments].endpoints[0].ports[0].plain.Port(); p != 1 {
		t.Errorf("the endpoint of b.yaml counts: port %d", p)
	}
	f.remove("a.yaml")
	f.expect("payments")
	if p := f.services()[payments].endpoints[0].ports[0].plain.Port(); p != 2 {
		t.Errorf("b.yaml does not take over: port %d", p)
	}
}

// A folder that is suddenly empty, missing or unreadable withdraws nothing,
// until somebody says that it is meant, or something comes back.
func TestEmptiedFolderWithdrawsNothing(t *testing.T) {
	f := newFolder(t)
	f.expect("", federation.CodeSourceWithout)
	if f.full {
		t.Fatal("a folder that was empty from the start is full")
	}
	f.file("a.yaml", serviceYAML("payments", "127.0.0.1:80"))
	f.file("b.yaml", serviceYAML("carts", "127.0.0.1:81"))
	f.expect("carts payments")
	if !f.full {
		t.Fatal("it is not full")
	}
	f.remove("a.yaml")
	f.remove("b.yaml")
	f.expect("carts payments", federation.CodeSourceEmptied)
	if f.full {
		t.Fatal("an emptied folder is full")
	}
	f.file("b.yaml", "# only a comment\n---\n")
	f.expect("carts payments", federation.CodeSourceEmptied)

	away := f.dir + ".away"
	if err := os.Rename(f.dir, away); err != nil {
		t.Fatal(err)
	}
	f.expect("carts payments", federation.CodeSourceUnreadable)
	if err := os.WriteFile(f.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.expect("carts payments", federation.CodeSourceUnreadable)
	if err := os.Remove(f.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(away, f.dir); err != nil {
		t.Fatal(err)
	}

	f.file("c.yaml", serviceYAML("stock", "127.0.0.1:82"))
	f.expect("stock") // something came back: that is what there is
	f.remove("c.yaml")
	f.expect("stock", federation.CodeSourceEmptied)
	f.file(emptyMarker, "")
	f.expect("")
	if !f.full {
		t.Fatal("an empty folder that is confirmed is not full")
	}
}

// What is no file, too large, or hostile hangs nobody and takes nothing with it.
func TestHostileFolder(t *testing.T) {
	f := newFolder(t)
	f.file("good.yaml", serviceYAML("payments", "127.0.0.1:80"))
	f.file("huge.yaml", serviceYAML("carts", "127.0.0.1:81")+strings.Repeat("# padding\n", sourceFileLimit/10))
	f.expect("payments", federation.CodeFileTooLarge)
	f.remove("huge.yaml")
	if err := syscall.Mkfifo(filepath.Join(f.dir, "fifo.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.expect("payments", federation.CodeFileMalformed)
	f.remove("fifo.yaml")
	for name, to := range map[string]string{"zero.yaml": "/dev/zero", "loop.yaml": "loop.yaml", "nowhere.yaml": "/nowhere", "folder.yaml": "/"} {
		if err := os.Symlink(to, filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
		f.expect("payments", federation.CodeFileMalformed)
		f.remove(name)
	}
	if err := os.Mkdir(filepath.Join(f.dir, "dir.yaml"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.expect("payments")
	for name, content := range map[string]string{
		"bomb":          "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n",
		"deep":          strings.Repeat("[", 10_000),
		"binary":        "\x00\x01\xff\xfe",
		"port":          strings.Replace(serviceYAML("carts", "127.0.0.1:81"), "port: 80", "port: 99999", 1),
		"unknown field": serviceYAML("carts", "127.0.0.1:81") + "  exprot: true\n",
		"documents":     strings.Repeat("---\na: b\n", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			f.file("hostile.yaml", content)
			got, found := f.read()
			if got != "payments" || found == "" {
				t.Errorf("services %q, findings %q", got, found)
			}
			if n := len(f.findings); n > findingsMost {
				t.Errorf("%d findings", n)
			}
		})
	}
}

// Changes are seen when they happen: in place, by rename, by a symbolic link
// that is swapped as Kubernetes does it, and when the folder itself is replaced.
func TestFolderIsWatched(t *testing.T) {
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, v := range []string{"v1", "v2"} {
		must(os.MkdirAll(filepath.Join(root, v), 0o700))
		must(os.WriteFile(filepath.Join(root, v, "a.yaml"), []byte(serviceYAML("payments-"+v, "127.0.0.1:80")), 0o600))
	}
	dir := filepath.Join(root, "services")
	must(os.Mkdir(dir, 0o700))
	must(os.Symlink(filepath.Join(root, "v1"), filepath.Join(dir, "..data")))
	must(os.Symlink(filepath.Join("..data", "a.yaml"), filepath.Join(dir, "a.yaml")))

	s := newSource(td, "eu-1")
	seen := make(chan string, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The rescan would find everything in the end: events must be sooner.
		_ = watchFolder(ctx, dir, slowRescan{clock.Real()}, testLog(t), nil, func() {
			s.load(dir, readFolder(dir))
			var names []string
			for id := range s.services() {
				names = append(names, id.Name)
			}
			slices.Sort(names)
			seen <- fmt.Sprint(names)
		})
	}()
	expect := func(want string) {
		t.Helper()
		late := time.After(20 * time.Second)
		for {
			select {
			case got := <-seen:
				if got == want {
					return
				}
			case <-late:
				t.Fatalf("%s was never seen", want)
			}
		}
	}
	expect("[payments-v1]")
	must(os.Symlink(filepath.Join(root, "v2"), filepath.Join(dir, "..data_tmp")))
	must(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	expect("[payments-v2]")
	must(os.WriteFile(filepath.Join(dir, "b.yaml"), []byte(serviceYAML("carts", "127.0.0.1:81")), 0o600))
	expect("[carts payments-v2]")
	must(os.Remove(filepath.Join(dir, "b.yaml")))
	expect("[payments-v2]")
	next := filepath.Join(root, "next")
	must(os.Mkdir(next, 0o700))
	must(os.WriteFile(filepath.Join(next, "c.yaml"), []byte(serviceYAML("stock", "127.0.0.1:82")), 0o600))
	must(os.Rename(dir, filepath.Join(root, "old")))
	must(os.Rename(next, dir))
	expect("[stock]")
	must(os.WriteFile(filepath.Join(dir, "d.yaml"), []byte(serviceYAML("late", "127.0.0.1:83")), 0o600))
	expect("[late stock]")
	cancel()
	<-done
}

// slowRescan is a clock whose long timers never fire.
type slowRescan struct{ clock.Clock }

func (s slowRescan) NewTimer(d time.Duration) clock.Timer {
	if d >= sourceRescan {
		d = time.Hour
	}
	return slowTimer{s.Clock.NewTimer(d)}
}

type slowTimer struct{ clock.Timer }

func (s slowTimer) Reset(d time.Duration) bool {
	if d >= sourceRescan {
		d = time.Hour
	}
	return s.Timer.Reset(d)
}

// An agent whose folder is emptied, in operation or before a start, goes on
// offering what it had.
func TestAgentWithEmptiedFolder(t *testing.T) {
	h := newHub(t, "eu-1")
	h.put(federationv1.VIPRecord("eu-1", payments, federation.VIP{Address: member("eu-1", "").VIPs.Addr().Next()}))
	c := h.config(t)
	write(t, c, "a.yaml", serviceYAML("payments", "127.0.0.1:8081"))
	a := start(t, c)
	key := "export/eu-1/shop/payments"
	eventually(t, "it is reported", func() bool { return h.record(key) != nil && h.record("ready/eu-1/shop/payments") != nil })
	if err := os.Remove(filepath.Join(c.Source, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	emptied := "finding/eu-1/" + string(federation.CodeSourceEmptied)
	reported := func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		for k := range h.records {
			if strings.HasPrefix(k, emptied) {
				return true
			}
		}
		return false
	}
	eventually(t, "a finding says that the folder is empty", reported)
	if h.record(key) == nil || a.first(payments) != "eu-1" {
		t.Fatal("the service is withdrawn")
	}
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	a = start(t, c)
	eventually(t, "the restarted agent serves", func() bool { return a.first(payments) == "eu-1" })
	h.cut()
	eventually(t, "the next session", h.connected)
	if h.record(key) == nil {
		t.Fatal("the service is withdrawn after a restart")
	}
	if err := os.WriteFile(filepath.Join(c.Source, emptyMarker), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is withdrawn when that is confirmed", func() bool { return h.record(key) == nil })
	eventually(t, "the finding is over", func() bool { return !reported() })
}
