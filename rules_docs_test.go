package weft_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strings"
)

func docRules() []rule {
	return []rule{
		{
			name:  "links lead somewhere",
			why:   "a reader who follows a link to nothing trusts the rest less",
			mend:  "correct the path or the heading, or drop the link",
			check: checkLinks,
			bad: map[string]string{
				"README.md":   "See [the plan](docs/plan.md).",
				"docs/a.md":   "# A\n\nSee [below](#b).",
				"docs/b.md":   "# B\n\n[text]: ../gone.md",
				"SECURITY.md": "See [code](/federation).",
			},
			good: map[string]string{
				"README.md": "# Weft: a mesh\n\nSee [itself](README.md#weft-a-mesh), [top](#weft-a-mesh) and [elsewhere](https://example.org/x).\n\n```\n[not](a-link.md)\n```\n",
			},
		},
		{
			name:  "a test that is named exists",
			why:   "a guarantee is worth the test that proves it",
			mend:  "name the test as it is called, and link to the file that holds it",
			check: checkNamedTests,
			bad: map[string]string{
				"README.md": "| it holds | [`TestItHolds`](rules_test.go) |",
				"docs/a.md": "Proved by `TestItHolds`.",
			},
			good: map[string]string{"README.md": "Runs `go test` and `Testing`."},
		},
		{
			name:  "no path of one machine",
			why:   "a path of the machine that something was written on is wrong on every other",
			mend:  "use a path relative to the checkout, $HOME, XDG_CACHE_HOME or a temporary folder",
			check: checkMachinePaths,
			bad: map[string]string{
				"Makefile":         "CACHE := /" + "root/.cache",
				"docs/a.md":        "cd /" + "work/main",
				"xds/a.go":         "package xds\n\nconst p = \"/" + "home/ann/weft\"\n",
				".ci/run":          "cd /" + "work/x",
				"deploy/a.service": "ExecStart=/" + "root/go/bin/weft",
			},
			good: map[string]string{
				"xds/a.go":  "package xds\n\nconst p = \"net/" + "work/x\"\n",
				"docs/b.md": "cd ~/weft && ls /var/lib/weft",
			},
		},
	}
}

// Links as Markdown writes them, inline and by reference.
var (
	inlineLink    = regexp.MustCompile(`\]\(([^)\s]+)(?:\s+"[^"]*")?\)`)
	referenceLink = regexp.MustCompile(`^\[[^\]]+\]:\s+(\S+)`)
)

func checkLinks(t *tree) (found []breach) {
	for name, content := range t.files {
		if path.Ext(name) != ".md" {
			continue
		}
		for i, line := range proseLines(content) {
			links := inlineLink.FindAllStringSubmatch(line, -1)
			links = append(links, referenceLink.FindAllStringSubmatch(line, -1)...)
			for _, link := range links {
				if what := t.broken(name, link[1]); what != "" {
					found = append(found, breach{fmt.Sprintf("%s:%d", name, i+1), what})
				}
			}
		}
	}
	return found
}

// broken says what is wrong with a link in the file from, or nothing. Links to
// other sites are not followed: a test must not need the network.
func (t *tree) broken(from, link string) string {
	if strings.Contains(link, "://") || strings.HasPrefix(link, "mailto:") {
		return ""
	}
	target, heading, _ := strings.Cut(link, "#")
	if path.IsAbs(target) {
		return "the link " + link + " is absolute; write it relative to the file"
	}
	to := from
	if target != "" {
		to = path.Join(path.Dir(from), target)
	}
	content, isFile := t.files[to]
	if !isFile && !slices.Contains(t.folders, to) {
		return "the link " + link + " leads to " + to + ", which does not exist"
	}
	if heading != "" && path.Ext(to) == ".md" && !hasHeading(content, heading) {
		return "the link " + link + " leads to a heading that " + to + " does not have"
	}
	return ""
}

func hasHeading(content []byte, anchor string) bool {
	for _, line := range proseLines(content) {
		title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if ok && strings.HasPrefix(line, "#") && slug(title) == anchor {
			return true
		}
	}
	return false
}

var (
	namedTest  = regexp.MustCompile("`((?:Test|Fuzz|Benchmark|Example)[A-Z]\\w*)`")
	linkedTest = regexp.MustCompile("\\[`(\\w+)`\\]\\(([^)\\s]+_test\\.go)\\)")
)

// checkNamedTests looks for every test that a document names: in the file that
// it links to, or anywhere if it links to none.
func checkNamedTests(t *tree) (found []breach) {
	for name, content := range t.files {
		if path.Ext(name) != ".md" {
			continue
		}
		for i, line := range proseLines(content) {
			where := fmt.Sprintf("%s:%d", name, i+1)
			for _, m := range linkedTest.FindAllStringSubmatch(line, -1) {
				if file := path.Join(path.Dir(name), m[2]); !t.declares(m[1], file) {
					found = append(found, breach{where, m[1] + " is not in " + file})
				}
			}
			for _, m := range namedTest.FindAllStringSubmatch(line, -1) {
				if !t.declares(m[1], "") {
					found = append(found, breach{where, m[1] + " does not exist"})
				}
			}
		}
	}
	return found
}

// declares tells whether a test file, or any if file is empty, has the function.
func (t *tree) declares(function, file string) bool {
	return slices.ContainsFunc(t.goFiles, func(f *goFile) bool {
		return f.test && (file == "" || f.path == file) && slices.ContainsFunc(f.Decls, func(d ast.Decl) bool {
			fun, ok := d.(*ast.FuncDecl)
			return ok && fun.Recv == nil && fun.Name.Name == function
		})
	})
}

// slug is the anchor that forges give to a heading.
func slug(title string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r > 127:
			return r
		}
		return -1
	}, strings.ToLower(strings.TrimSpace(title)))
}

// proseLines are the lines of a Markdown file, those of code blocks empty.
func proseLines(content []byte) []string {
	lines := strings.Split(string(content), "\n")
	code := false
	for i, line := range lines {
		fence := strings.HasPrefix(strings.TrimSpace(line), "```")
		if fence || code {
			lines[i] = ""
		}
		if fence {
			code = !code
		}
	}
	return lines
}

var machinePath = regexp.MustCompile(`(?:^|[^A-Za-z0-9_.\-~])/(?:work|root|home/[a-z]+)/`)

func checkMachinePaths(t *tree) (found []breach) {
	for name, content := range t.files {
		if bytes.IndexByte(content, 0) >= 0 {
			continue // not a text
		}
		for i, line := range bytes.Split(content, []byte("\n")) {
			if m := machinePath.Find(line); m != nil {
				found = append(found, breach{fmt.Sprintf("%s:%d", name, i+1), fmt.Sprintf("%q names a folder of one machine", m)})
			}
		}
	}
	return found
}
