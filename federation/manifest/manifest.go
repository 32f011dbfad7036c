package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/weftmesh/weft/federation"
)

// APIVersion of every document.
const APIVersion = "weft.dev/v1"

// The kinds of documents.
const (
	KindFailoverPolicy = "FailoverPolicy"
	KindService        = "Service"
)

// MeshNamespace is the one namespace whose policies may be for the whole mesh.
const MeshNamespace = "weft-system"

// Bounds of a file.
const (
	MaxSize      = 1 << 20 // bytes
	maxDocuments = 1024
	maxDepth     = 16 // of nesting
	maxProblems  = 32 // that one document is told of
	maxList      = 1024
)

// Document is one good document of a file. One of Policy and Service is set.
type Document struct {
	File   string
	Number int // in the file, from 1
	Line   int // where it begins, from 1
	// Policy has no origin yet, and no acceptance: who takes it in says whose
	// it is.
	Policy  *federation.Policy
	Service *Service
}

// Kind of the document.
func (d Document) Kind() string {
	if d.Policy != nil {
		return KindFailoverPolicy
	}
	return KindService
}

// Name is "namespace/name".
func (d Document) Name() string {
	if d.Policy != nil {
		return d.Policy.ID.String()
	}
	return d.Service.ID.String()
}

// Problem is one thing wrong with a document.
type Problem struct {
	Code federation.Code
	Line int    // in the file, from 1; 0 if it concerns no line
	Path string // of the field, for example "spec.order[2].split.eu-2"; may be empty
	Text string // what is wrong and what is allowed
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	return b.String() + p.Text
}

// Error is a document that was set aside, with everything that is wrong with
// it. Kind and Name are set as far as they could be read, so that the last good
// version of the document can stay.
type Error struct {
	File     string
	Number   int // of the document in the file, from 1; 0 if the file as a whole is bad
	Line     int // where the document begins
	Kind     string
	Name     string // namespace/name
	Problems []Problem
}

// Error lists the problems, one to a line.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Number > 0 {
		fmt.Fprintf(&b, ": document %d", e.Number)
	}
	if e.Kind != "" && e.Name != "" {
		fmt.Fprintf(&b, " (%s %s)", e.Kind, e.Name)
	}
	if len(e.Problems) == 1 {
		return b.String() + ": " + e.Problems[0].String()
	}
	fmt.Fprintf(&b, ": %d problems", len(e.Problems))
	for _, p := range e.Problems {
		b.WriteString("\n  " + p.String())
	}
	return b.String()
}

// Findings are the problems as findings about the document, one for each code.
func (e *Error) Findings() []federation.Finding {
	subject := federation.Ref{Kind: "file", Name: e.File}
	if e.Number > 0 {
		subject.Name += "#" + strconv.Itoa(e.Number)
	}
	about := make(map[federation.Code][]string)
	for _, p := range e.Problems {
		about[p.Code] = append(about[p.Code], p.String())
	}
	var list []federation.Finding
	for _, code := range slices.Sorted(maps.Keys(about)) {
		list = append(list, federation.NewFinding(code, subject, "%s", strings.Join(about[code], "; ")))
	}
	return list
}

// Decode reads the documents of a file; the name is for messages only. What is
// wrong with one document does not concern the others.
func Decode(file string, data []byte) (good []Document, bad []*Error) {
	if len(data) > MaxSize {
		return nil, []*Error{fileError(file, "the file has %d bytes, at most %d are read: split it", len(data), MaxSize)}
	}
	parts := split(data)
	if len(parts) > maxDocuments {
		return nil, []*Error{fileError(file, "the file has %d documents, at most %d are read: split it", len(parts), maxDocuments)}
	}
	seen := make(map[string]int)
	number := 0
	for _, part := range parts {
		d := decoder{err: Error{File: file, Number: number + 1, Line: part.line}, offset: part.line - 1}
		root := d.parse(part.text)
		if root == nil && len(d.err.Problems) == 0 {
			continue // nothing but comments
		}
		number++
		doc := Document{File: file, Number: number, Line: part.line}
		if root != nil {
			d.document(root, &doc)
		}
		if name := d.err.Kind + " " + d.err.Name; d.err.Kind != "" && d.err.Name != "" {
			if first, twice := seen[name]; twice {
				d.add(federation.CodeDuplicateService, nil, "", "%s is defined by document %d already: keep one of the two", name, first)
			} else {
				seen[name] = number
			}
		}
		if len(d.err.Problems) > 0 {
			bad = append(bad, &d.err)
			continue
		}
		good = append(good, doc)
	}
	return good, bad
}

func fileError(file, format string, args ...any) *Error {
	return &Error{File: file, Problems: []Problem{{Code: federation.CodeFileTooLarge, Text: fmt.Sprintf(format, args...)}}}
}

type part struct {
	line int // of its first line, from 1
	text []byte
}

// split cuts a file at the lines that begin with "---", which YAML allows for
// nothing else, so that a document that is no YAML does not take those after
// it along.
func split(data []byte) []part {
	data = bytes.TrimPrefix(data, []byte("\uFEFF"))
	parts := []part{{line: 1}}
	line := 1
	for len(data) > 0 {
		end := bytes.IndexByte(data, '\n') + 1
		if end == 0 {
			end = len(data)
		}
		text := data[:end]
		data = data[end:]
		if rest, ok := bytes.CutPrefix(text, []byte("---")); ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0) {
			parts = append(parts, part{line: line})
			// What follows on the line belongs to the document.
			text = append([]byte("   "), rest...)
		}
		last := &parts[len(parts)-1]
		last.text = append(last.text, text...)
		line++
	}
	return parts
}

// decoder reads one document and gathers what is wrong with it.
type decoder struct {
	err    Error
	offset int // lines before the document in its file
}

// parse makes a tree of a document's text; nil if it is empty or none.
func (d *decoder) parse(text []byte) *yaml.Node {
	var doc, more yaml.Node
	in := yaml.NewDecoder(bytes.NewReader(text))
	switch err := in.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		d.malformed(err)
		return nil
	}
	if err := in.Decode(&more); err == nil {
		d.add(federation.CodeFileMalformed, &more, "", "a second document begins here: put a line '---' between documents")
		return nil
	} else if !errors.Is(err, io.EOF) {
		d.malformed(err)
		return nil
	}
	if len(doc.Content) != 1 || doc.Content[0].ShortTag() == "!!null" && len(bytes.TrimSpace(text)) == 0 {
		return nil
	}
	root := doc.Content[0]
	if root.ShortTag() == "!!null" && root.Value == "" {
		return nil
	}
	if !d.bounded(root, 1) {
		return nil
	}
	return root
}

// malformed reports YAML that cannot be read. The library counts lines from the
// beginning of the document: its scanner from 1, its parser from 0.
func (d *decoder) malformed(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if n, _ := fmt.Sscanf(rest, "%d:", &line); n == 1 {
			_, text, _ = strings.Cut(rest, ": ")
			line += d.offset
			for _, s := range []string{"<", "node content", "'-' indicator", "key", "',' or"} {
				if strings.HasPrefix(text, "did not find expected "+s) {
					line++
				}
			}
		}
	}
	d.err.Problems = append(d.err.Problems, Problem{
		Code: federation.CodeFileMalformed, Line: line,
		Text: fmt.Sprintf("this is not YAML: %s", text),
	})
}

// bounded refuses aliases, by which a small text becomes a huge tree, and deep
// nesting.
func (d *decoder) bounded(n *yaml.Node, depth int) bool {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		d.add(federation.CodeFileMalformed, n, "", "anchors and aliases are not allowed: write the value out")
		return false
	}
	if depth > maxDepth {
		d.add(federation.CodeFileTooLarge, n, "", "nested more than %d deep: no document needs that", maxDepth)
		return false
	}
	for _, c := range n.Content {
		if !d.bounded(c, depth+1) {
			return false
		}
	}
	return true
}

// add notes a problem at a node, or at none.
func (d *decoder) add(code federation.Code, n *yaml.Node, path, format string, args ...any) {
	if len(d.err.Problems) >= maxProblems {
		d.err.Problems[maxProblems-1] = Problem{Code: code, Text: "there are more problems than these"}
		return
	}
	p := Problem{Code: code, Path: path, Text: fmt.Sprintf(format, args...)}
	if n != nil {
		p.Line = n.Line + d.offset
	}
	d.err.Problems = append(d.err.Problems, p)
}

// invalid notes a value that is not allowed.
func (d *decoder) invalid(n *yaml.Node, path, format string, args ...any) {
	d.add(federation.CodeFieldInvalid, n, path, format, args...)
}

// document reads the envelope, then the spec by its kind.
func (d *decoder) document(root *yaml.Node, doc *Document) {
	var kind, spec *yaml.Node
	var id federation.ServiceID
	d.mapping(root, "", fields{
		"apiVersion": func(n *yaml.Node, path string) {
			if v, ok := d.text(n, path); ok && v != APIVersion {
				d.invalid(n, path, "%q is not known: it must be %s", clip(v), APIVersion)
			}
		},
		"kind":     func(n *yaml.Node, _ string) { kind = n },
		"metadata": func(n *yaml.Node, path string) { id = d.metadata(n, path) },
		"spec":     func(n *yaml.Node, _ string) { spec = n },
	}, "apiVersion", "kind", "metadata", "spec")
	if kind == nil {
		return
	}
	name, ok := d.text(kind, "kind")
	if !ok {
		return
	}
	if id != (federation.ServiceID{}) {
		d.err.Name = id.String()
	}
	switch name {
	case KindFailoverPolicy:
		d.err.Kind = name
		doc.Policy = &federation.Policy{ID: federation.PolicyID{Namespace: id.Namespace, Name: id.Name}}
		if spec != nil {
			d.policy(spec, doc.Policy)
		}
	case KindService:
		d.err.Kind = name
		doc.Service = &Service{ID: id}
		if spec != nil {
			d.service(spec, doc.Service)
		}
	default:
		d.invalid(kind, "kind", "%q is not known: it must be %s or %s", clip(name), KindFailoverPolicy, KindService)
	}
}

func (d *decoder) metadata(n *yaml.Node, path string) (id federation.ServiceID) {
	d.mapping(n, path, fields{
		"name":      func(n *yaml.Node, path string) { id.Name, _ = d.label(n, path) },
		"namespace": func(n *yaml.Node, path string) { id.Namespace, _ = d.label(n, path) },
	}, "name", "namespace")
	if id.Name == "" || id.Namespace == "" {
		return federation.ServiceID{}
	}
	return id
}
