package federation

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Every code that the source declares is documented, once, in order, and every
// entry says something.
func TestCodes(t *testing.T) {
	declared := map[Code]bool{}
	file, err := parser.ParseFile(token.NewFileSet(), "codes.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok && len(spec.Values) == 1 {
			if lit, ok := spec.Values[0].(*ast.BasicLit); ok {
				s, err := strconv.Unquote(lit.Value)
				if err != nil {
					t.Fatal(err)
				}
				if declared[Code(s)] {
					t.Errorf("%s is declared twice", s)
				}
				declared[Code(s)] = true
			}
		}
		return true
	})
	if len(declared) < 50 {
		t.Fatalf("only %d codes found in codes.go", len(declared))
	}
	list := Codes()
	if !slices.IsSortedFunc(list, func(a, b Documentation) int { return strings.Compare(string(a.Code), string(b.Code)) }) {
		t.Error("the documentation is not sorted by code")
	}
	for i, d := range list {
		if _, err := ParseCode(string(d.Code)); err != nil {
			t.Error(err)
		}
		if !declared[d.Code] {
			t.Errorf("%s is documented, not declared", d.Code)
		}
		delete(declared, d.Code)
		if i > 0 && list[i-1].Code == d.Code {
			t.Errorf("%s is documented twice", d.Code)
		}
		for _, s := range []string{d.Title, d.Explanation, d.Fix} {
			if s == "" || s != oneLine(s) {
				t.Errorf("%s: %q is no line of text", d.Code, s)
			}
		}
		if !strings.HasSuffix(d.Explanation, ".") || strings.HasSuffix(d.Title, ".") || strings.HasSuffix(d.Fix, ".") {
			t.Errorf("%s: explanations are sentences, titles and fixes are not", d.Code)
		}
		for _, c := range d.DependsOn {
			if _, ok := Explain(c); !ok || c == d.Code {
				t.Errorf("%s depends on %s", d.Code, c)
			}
		}
		if got, ok := Explain(d.Code); !ok || got.Title != d.Title {
			t.Errorf("%s: Explain finds %+v", d.Code, got)
		}
	}
	for c := range declared {
		t.Errorf("%s is not documented", c)
	}
	if _, ok := Explain("WEFT0000"); ok {
		t.Error("there is documentation of WEFT0000")
	}
}

func TestParseCode(t *testing.T) {
	for _, s := range []string{"", "WEFT", "WEFT12", "WEFT12345", "weft1001", "WEFT10 1", "WEFT-100", "XEFT1001", "WEFT1٠01"} {
		if _, err := ParseCode(s); err == nil {
			t.Errorf("%q is taken for a code", s)
		}
	}
}

// A finding's message is one line that a terminal can show.
func TestFindingMessages(t *testing.T) {
	f := NewFinding(CodeProxyRefusedConfig, Ref{"gateway", "eu-1/a"}, "it said %q and %s", "x", "a\x1b[31m\r\nb\x00\xff")
	if want := `it said "x" and a [31m b ?`; f.Message != want {
		t.Errorf("%q instead of %q", f.Message, want)
	}
	f = NewFinding(CodeProxyRefusedConfig, Ref{}, "%s", strings.Repeat("ü", 5000))
	if n := len([]rune(f.Message)); n > 1003 {
		t.Errorf("a message of %d characters", n)
	}
	if f.Severity != Error || f.Fix == "" {
		t.Errorf("%+v has nothing of its documentation", f)
	}
	if got := NewFinding(CodeProxyBehind, Ref{"gateway", "eu-1/a"}, "two minutes").Describe(); got != `WEFT3005 warning gateway eu-1/a: two minutes
  proxy is behind
  fix: look at the proxy's load and log
  may follow from: WEFT3004` {
		t.Errorf("described as\n%s", got)
	}
}

func TestReasons(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Reasons() {
		if r.String() == "" || r.Meaning() == "" || seen[r.String()] {
			t.Errorf("reason %d is %q: %q", uint8(r), r, r.Meaning())
		}
		seen[r.String()] = true
		if got, err := ParseReason(r.String()); err != nil || got != r {
			t.Errorf("%v reads as %v, %v", r, got, err)
		}
	}
	if _, err := ParseReason("whim"); err == nil {
		t.Error("whim is taken for a reason")
	}
	if s := Reason(200).String() + Reason(200).Meaning(); !strings.Contains(s, "200") {
		t.Errorf("an unknown reason prints %q", s)
	}
}
