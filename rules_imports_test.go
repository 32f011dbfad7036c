package weft_test

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A unit is a package, or a folder of them, in the order of imports: a unit
// may import those of a lower rank and nothing else of Weft.
type unit struct {
	path string // from the module's root
	rank int
	deep bool // packages below path belong to it
	each bool // every folder below path is a unit of its own
}

// units is Weft from the bottom up.
func units() []unit {
	return []unit{
		{path: "federation", rank: 0},
		{path: "federation/clock", rank: 0},
		{path: "federation/v1", rank: 1},
		{path: "federation/manifest", rank: 1},
		{path: "federation/access", rank: 1},
		{path: "federation/store", rank: 2, deep: true},
		{path: "federation/kube", rank: 2, deep: true},
		{path: "federation/console", rank: 2, deep: true},
		{path: "identity", rank: 2, deep: true},
		{path: "xds", rank: 2, deep: true},
		{path: "federation/controller", rank: 3, deep: true},
		{path: "federation/agent", rank: 3, deep: true},
		{path: "gateway", rank: 3, deep: true},
		{path: "cmd/serve", rank: 3, deep: true}, // what the mains share
		{path: "cmd", rank: 4, each: true},
		{path: "deploy", rank: 4, deep: true},
		{path: "e2e/lab", rank: 2},  // runs the binaries, links none of their code
		{path: "e2e/demo", rank: 3}, // 'weft demo' is its player
		{path: "e2e", rank: 5, deep: true},
		{path: ".", rank: 5},
	}
}

// reserved units have few readers, whatever their rank.
func reserved() map[string]struct {
	to  []string
	why string
} {
	type entry = struct {
		to  []string
		why string
	}
	return map[string]entry{
		"federation/v1": {
			to: []string{
				"federation/store", "federation/controller", "federation/agent",
				"gateway", "cmd", "e2e",
			},
			why: "messages are the wire's and the disk's; decisions and translations speak the vocabulary of federation",
		},
		"federation/store": {
			to:  []string{"federation/controller", "cmd/weft-controller", "e2e"},
			why: "it brings etcd along, and members of a mesh must not link, nor reach, the global store",
		},
	}
}

// unitOf finds the unit that a folder belongs to, the one with the longest
// path if there are several, and the unit's name.
func unitOf(folder string) (u unit, name string, ok bool) {
	for _, c := range units() {
		rest, below := strings.CutPrefix(folder, c.path+"/")
		fits := folder == c.path && !c.each || below && (c.deep || c.each)
		if !fits || ok && len(c.path) < len(u.path) {
			continue
		}
		u, name, ok = c, c.path, true
		if c.each {
			first, _, _ := strings.Cut(rest, "/")
			name = path.Join(c.path, first)
		}
	}
	return u, name, ok
}

// A home is the one place that may import a dependency.
type home struct {
	deps  []string // import paths, with everything below them
	in    []string // folders, with everything below them
	tests []string // folders whose tests may import it besides
	but   []string // import paths below deps that may travel
	why   string
}

func homes() []home {
	return []home{
		{
			deps: []string{"k8s.io", "sigs.k8s.io/mcs-api", "sigs.k8s.io/gateway-api", "sigs.k8s.io/controller-runtime"},
			in:   []string{"federation/kube"},
			why:  "Kubernetes is one source of services among others, and client-go doubles what a binary links",
		},
		{
			deps:  []string{"go.etcd.io"},
			in:    []string{"federation/store"},
			tests: []string{"e2e"},
			why:   "keys, transactions and their compares are only right when one package writes them",
		},
		{
			deps:  []string{"github.com/envoyproxy/go-control-plane", "github.com/cncf/xds"},
			in:    []string{"xds"},
			tests: []string{"e2e"},
			why:   "a plan is translated into Envoy's resources, and read back by the built-in engine, in one place",
		},
		{
			deps: []string{"github.com/spiffe/go-spiffe/v2"},
			in:   []string{"identity"},
			but: []string{
				"github.com/spiffe/go-spiffe/v2/spiffeid",
				"github.com/spiffe/go-spiffe/v2/svid/x509svid",
				"github.com/spiffe/go-spiffe/v2/bundle/x509bundle",
			},
			tests: []string{"e2e"},
			why:   "who is trusted is decided once; only names, SVIDs and bundles travel as values",
		},
		{
			deps: []string{"go.yaml.in/yaml"},
			in:   []string{"federation/manifest"},
			why:  "people's documents are read node by node, so that each mistake is told with its line; everything else takes sigs.k8s.io/yaml",
		},
		{
			deps: []string{"github.com/spf13"},
			in:   []string{"cmd/weft"},
			why:  "it serves people at a terminal; the long-running binaries have a handful of flags",
		},
		{
			deps:  []string{"github.com/miekg/dns"},
			in:    []string{"federation/agent"},
			tests: []string{"e2e"},
			why:   "the agent is the only one that answers DNS",
		},
		{
			deps:  []string{"golang.org/x/net/http2"},
			in:    []string{"gateway"},
			tests: []string{"e2e"},
			why:   "weft/1 is spoken by the engine alone; every other protocol goes through gRPC or net/http",
		},
		{
			deps: []string{"go.uber.org/zap"},
			in:   []string{"federation/store"},
			why:  "etcd logs through it, and the store turns that into log/slog",
		},
	}
}

func importRules() []rule {
	return []rule{
		{
			name:  "imports point down",
			why:   "cmd -> controller, agent, gateway -> store, kube, xds, identity -> federation; what is below can be read and tested without what is above",
			mend:  "declare the small interface that the importer needs, and let a package above join the two; a new package gets its rank in units()",
			check: checkDirections,
			bad: map[string]string{
				"federation/plan.go":        "package federation\nimport _ \"github.com/weftmesh/weft/federation/clock\"",
				"xds/server.go":             "package xds\nimport _ \"github.com/weftmesh/weft/identity\"",
				"xds/server_test.go":        "package xds_test\nimport _ \"github.com/weftmesh/weft/gateway\"",
				"gateway/relay/r.go":        "package relay\nimport _ \"github.com/weftmesh/weft/federation/agent\"",
				"cmd/weft/main.go":          "package main\nimport _ \"github.com/weftmesh/weft/cmd/weft-agent\"",
				"cmd/serve/s.go":            "package serve\nimport _ \"github.com/weftmesh/weft/gateway\"",
				"identity/authority.go":     "package identity\nimport _ \"github.com/weftmesh/weft/federation/v1\"",
				"federation/agent/agent.go": "package agent\nimport _ \"github.com/weftmesh/weft/federation/store\"",
				"stray/stray.go":            "package stray",
				"gateway/e2e.go":            "package gateway\nimport _ \"github.com/weftmesh/weft/e2e/envoytest\"",
			},
			good: map[string]string{
				"federation/store/store.go":      "package store\nimport _ \"github.com/weftmesh/weft/federation/v1\"",
				"federation/controller/c.go":     "package controller\nimport _ \"github.com/weftmesh/weft/federation/store\"",
				"gateway/gateway.go":             "package gateway\nimport _ \"github.com/weftmesh/weft/gateway/tunnel\"",
				"cmd/weft-agent/main.go":         "package main\nimport _ \"github.com/weftmesh/weft/cmd/serve\"",
				"cmd/weft/main.go":               "package main\nimport _ \"github.com/weftmesh/weft/cmd/weft/demo\"",
				"xds/envoy_test.go":              "package xds_test\nimport _ \"github.com/weftmesh/weft/e2e/envoytest\"",
				"identity/identity_test.go":      "package identity_test\nimport _ \"github.com/weftmesh/weft/identity\"",
				"federation/manifest/service.go": "package manifest\nimport _ \"github.com/weftmesh/weft/federation\"",
			},
		},
		{
			name:  "one home for each big dependency",
			why:   "a dependency that lives in one place can be understood, upgraded or replaced there",
			mend:  "let the home offer what is needed in Weft's own words, and use that",
			check: checkHomes,
			bad: map[string]string{
				"federation/agent/a.go":       "package agent\nimport _ \"k8s.io/client-go/rest\"",
				"federation/controller/c.go":  "package controller\nimport _ \"go.etcd.io/etcd/client/v3\"",
				"federation/agent/a_test.go":  "package agent\nimport _ \"go.etcd.io/etcd/client/v3\"",
				"gateway/engine.go":           "package gateway\nimport _ \"github.com/envoyproxy/go-control-plane/envoy/config/core/v3\"",
				"xds/tls.go":                  "package xds\nimport _ \"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig\"",
				"cmd/weft-agent/main.go":      "package main\nimport _ \"github.com/spf13/cobra\"",
				"gateway/names.go":            "package gateway\nimport _ \"github.com/miekg/dns\"",
				"xds/h2.go":                   "package xds\nimport _ \"golang.org/x/net/http2\"",
				"federation/controller/lo.go": "package controller\nimport _ \"go.uber.org/zap\"",
			},
			good: map[string]string{
				"federation/store/s.go":  "package store\nimport _ \"go.etcd.io/etcd/server/v3/embed\"",
				"e2e/store_test.go":      "package e2e\nimport _ \"go.etcd.io/etcd/client/v3\"",
				"gateway/tunnel/conn.go": "package tunnel\nimport _ \"golang.org/x/net/http2/hpack\"",
				"xds/source.go":          "package xds\nimport _ \"github.com/spiffe/go-spiffe/v2/svid/x509svid\"",
				"federation/agent/y.go":  "package agent\nimport _ \"sigs.k8s.io/yaml\"",
				"cmd/weft/get.go":        "package main\nimport _ \"github.com/spf13/cobra\"",
			},
		},
		{
			name:  "the core imports the standard library and spiffeid",
			why:   "federation decides; it has no I/O, no goroutine, no clock and no logger, so that every replica, agent and simulation decides alike",
			mend:  "pass the fact in as a value (a Revision, a World), or move the code to the package that does the I/O",
			check: checkCore,
			bad: map[string]string{
				"federation/a.go": "package federation\nimport _ \"google.golang.org/protobuf/proto\"",
				"federation/b.go": "package federation\nimport _ \"os\"",
				"federation/c.go": "package federation\nimport _ \"log/slog\"",
				"federation/d.go": "package federation\nimport _ \"github.com/spiffe/go-spiffe/v2/svid/x509svid\"",
				"federation/e.go": "package federation\nfunc f() { go f() }",
			},
			good: map[string]string{
				"federation/a.go":        "package federation\nimport (\n_ \"slices\"\n_ \"github.com/spiffe/go-spiffe/v2/spiffeid\"\n)",
				"federation/a_test.go":   "package federation\nimport _ \"pgregory.net/rapid\"",
				"federation/store/go.go": "package store\nimport _ \"os\"\nfunc f() { go f() }",
			},
		},
	}
}

func checkDirections(t *tree) (found []breach) {
	for folder, files := range t.byFolder(true) {
		from, fromName, ok := unitOf(folder)
		if !ok {
			found = append(found, breach{folder, "this package has no place in the order of imports"})
			continue
		}
		for _, f := range files {
			for _, spec := range f.Imports {
				imported, own := strings.CutPrefix(importPath(spec.Path.Value), module+"/")
				if !own {
					continue
				}
				to, toName, ok := unitOf(imported)
				switch {
				case !ok, fromName == toName:
					continue // its own folder gets the breach; a unit may import itself
				case f.test && imported == "e2e/envoytest":
					continue // finds the pinned Envoy for any test
				case to.rank >= from.rank:
					found = append(found, breach{t.at(f, spec.Pos()), fmt.Sprintf("%s imports %s, which is not below it", folder, imported)})
				default:
					r, isReserved := reserved()[toName]
					if isReserved && !slices.ContainsFunc(r.to, within(folder)) {
						found = append(found, breach{t.at(f, spec.Pos()), fmt.Sprintf("%s imports %s, which is for %s: %s", folder, imported, strings.Join(r.to, ", "), r.why)})
					}
				}
			}
		}
	}
	return found
}

func checkHomes(t *tree) (found []breach) {
	for _, f := range t.goFiles {
		for _, spec := range f.Imports {
			imported := importPath(spec.Path.Value)
			for _, h := range homes() {
				switch {
				case !slices.ContainsFunc(h.deps, within(imported)),
					slices.ContainsFunc(h.but, within(imported)),
					slices.ContainsFunc(h.in, within(f.folder)),
					f.test && slices.ContainsFunc(h.tests, within(f.folder)):
					continue
				}
				found = append(found, breach{t.at(f, spec.Pos()), fmt.Sprintf("imports %s, whose home is %s: %s", imported, strings.Join(h.in, ", "), h.why)})
			}
		}
	}
	return found
}

// The parts of the standard library with which the core could do I/O, wait,
// keep time by itself or talk.
func coreMustNotImport() []string {
	return []string{
		"context", "database/sql", "io/fs", "io/ioutil", "log", "net/http", "net/rpc", "os", "runtime",
		"sync", "syscall", "testing", "unsafe", "math/rand", "crypto/rand",
	}
}

func checkCore(t *tree) (found []breach) {
	for _, f := range t.goFiles {
		if f.folder != "federation" || f.test {
			continue
		}
		for _, spec := range f.Imports {
			imported := importPath(spec.Path.Value)
			domain, _, _ := strings.Cut(imported, "/")
			switch {
			case imported == "github.com/spiffe/go-spiffe/v2/spiffeid":
				continue
			case strings.Contains(domain, "."):
				found = append(found, breach{t.at(f, spec.Pos()), "the core imports " + imported})
			case slices.ContainsFunc(coreMustNotImport(), within(imported)):
				found = append(found, breach{t.at(f, spec.Pos()), "the core imports " + imported + ", with which it could do more than decide"})
			}
		}
		for _, pos := range goStatements(f.File) {
			found = append(found, breach{t.at(f, pos), "the core starts a goroutine"})
		}
	}
	return found
}

// within tells of a folder or import path whether name is it or lies below it.
func within(name string) func(parent string) bool {
	return func(parent string) bool {
		return name == parent || strings.HasPrefix(name, parent+"/")
	}
}

func importPath(literal string) string {
	p, err := strconv.Unquote(literal)
	if err != nil {
		panic("an import path that the parser let pass: " + literal) // cannot happen
	}
	return p
}
