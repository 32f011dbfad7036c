package weft_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "github.com/weftmesh/weft"

// A rule holds for the whole tree. Why and mend are printed with each breach,
// so that whoever meets the rule for the first time need not look it up.
type rule struct {
	name  string
	why   string
	mend  string
	check func(*tree) []breach
	// bad maps a file to a content that breaks the rule; good to one that does
	// not. They prove that the check sees what it is for.
	bad, good map[string]string
}

// A breach is one place that breaks a rule.
type breach struct {
	where string // path from the root of the module, with the line if there is one
	what  string
}

func rules() []rule {
	return append(append(importRules(), shapeRules()...), docRules()...)
}

func TestRules(t *testing.T) {
	tree := mustLoad(t, os.DirFS("."))
	if len(tree.goFiles) == 0 {
		t.Fatal("found no Go file: the rules have nothing to check")
	}
	for _, r := range rules() {
		t.Run(r.name, func(t *testing.T) {
			found := r.check(tree)
			slices.SortFunc(found, func(a, b breach) int { return strings.Compare(a.where, b.where) })
			for _, b := range found {
				t.Errorf("%s: %s\n\twhy:  %s\n\tmend: %s", b.where, b.what, r.why, r.mend)
			}
		})
	}
}

// TestRulesSeeBreaches feeds each rule files that break it, one at a time, and
// files that do not.
func TestRulesSeeBreaches(t *testing.T) {
	for _, r := range rules() {
		t.Run(r.name, func(t *testing.T) {
			if len(r.bad) == 0 || len(r.good) == 0 {
				t.Fatal("the rule has no example of a breach, or none of what is right")
			}
			for name, content := range r.bad {
				tree := mustLoad(t, fstest.MapFS{name: {Data: []byte(content)}})
				if len(r.check(tree)) == 0 {
					t.Errorf("%s: no breach seen in:\n%s", name, content)
				}
			}
			for name, content := range r.good {
				tree := mustLoad(t, fstest.MapFS{name: {Data: []byte(content)}})
				for _, b := range r.check(tree) {
					t.Errorf("%s: %s: a breach is seen where none is:\n%s", b.where, b.what, content)
				}
			}
		})
	}
}

// A tree is what the rules look at: every file of the checkout that people
// write or read.
type tree struct {
	files   map[string][]byte // by path
	folders []string
	goFiles []*goFile
	fset    *token.FileSet
}

type goFile struct {
	path      string
	folder    string
	test      bool // name ends in _test.go
	generated bool
	lines     int
	*ast.File
}

func (t *tree) at(f *goFile, pos token.Pos) string {
	return fmt.Sprintf("%s:%d", f.path, t.fset.Position(pos).Line)
}

// byFolder groups the Go files, without tests unless tests is set.
func (t *tree) byFolder(tests bool) map[string][]*goFile {
	groups := make(map[string][]*goFile)
	for _, f := range t.goFiles {
		if tests || !f.test {
			groups[f.folder] = append(groups[f.folder], f)
		}
	}
	return groups
}

func mustLoad(t *testing.T, fsys fs.FS) *tree {
	t.Helper()
	tree, err := load(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func load(fsys fs.FS) (*tree, error) {
	t := &tree{files: make(map[string][]byte), fset: token.NewFileSet()}
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && skipFolder(d.Name()) {
				return fs.SkipDir
			}
			t.folders = append(t.folders, name)
			return nil
		}
		if !d.Type().IsRegular() || d.Name() == ".git" { // a file, in a second worktree
			return nil
		}
		content, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		t.files[name] = content
		if path.Ext(name) != ".go" || strings.Contains("/"+name, "/testdata/") {
			return nil
		}
		// The parser's own resolution of names within a file is what the rule
		// on package-level state needs; whole-program types would cost seconds.
		syntax, err := parser.ParseFile(t.fset, name, content, parser.ParseComments)
		if err != nil {
			return err
		}
		t.goFiles = append(t.goFiles, &goFile{
			path:      name,
			folder:    path.Dir(name),
			test:      strings.HasSuffix(name, "_test.go"),
			generated: ast.IsGenerated(syntax),
			lines:     bytes.Count(content, []byte("\n")),
			File:      syntax,
		})
		return nil
	})
	return t, err
}

func skipFolder(name string) bool {
	return name == "bin" || name == "dist" || name == "node_modules" ||
		strings.HasPrefix(name, ".") && name != ".ci" && name != ".github"
}
