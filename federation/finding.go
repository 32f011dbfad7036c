package federation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Code names one kind of finding, for example "WEFT1101". Codes are never given
// another meaning; codes.go lists them all.
type Code string

// ParseCode checks that s has the form of a code. A code that this version does
// not know is accepted: another version may have reported it.
func ParseCode(s string) (Code, error) {
	digits, ok := strings.CutPrefix(s, "WEFT")
	if !ok || len(digits) != 4 || strings.Trim(digits, "0123456789") != "" {
		return "", fmt.Errorf("finding code %q: write it as WEFT and four digits", s)
	}
	return Code(s), nil
}

// Severity says how much a finding matters.
type Severity uint8

// The severities, in rising order.
const (
	Info    Severity = iota // works as asked; worth knowing
	Warning                 // works, but not as somebody would expect
	Error                   // something that was asked for is not done
)

func (s Severity) String() string { return enumName(s, "info", "warning", "error") }

// Ref names what a finding is about.
type Ref struct {
	Kind string // "cluster", "export", "service", "policy", "gateway", "file", ...: a DNS label
	Name string // for example "eu-1/shop/payments"
}

// String is the kind and the name, for example "export eu-1/shop/payments".
func (r Ref) String() string { return r.Kind + " " + r.Name }

// ParseRef reads what String writes.
func ParseRef(s string) (Ref, error) {
	kind, name, ok := strings.Cut(s, " ")
	if !ok || name == "" || checkLabel(kind) != nil {
		return Ref{}, fmt.Errorf("subject %q: write it as KIND NAME, for example 'cluster eu-1'", s)
	}
	return Ref{Kind: kind, Name: name}, nil
}

// Compare orders subjects by kind, then name.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.Kind, o.Kind), cmp.Compare(r.Name, o.Name))
}

// Subjects of the core's own findings.
func refCluster(c ClusterID) Ref { return Ref{"cluster", string(c)} }
func refExport(e ExportID) Ref   { return Ref{"export", e.String()} }
func refPolicy(p PolicyID) Ref   { return Ref{"policy", p.Origin + "/" + p.String()} }

// Finding is a coded health statement: what is wrong, with what, and how to
// mend it.
type Finding struct {
	Code      Code
	Severity  Severity
	Subject   Ref
	Message   string // one line: what is wrong here
	Fix       string // one line: what to do about it
	DependsOn []Code // findings about the same cluster that would explain this one
	// ReportedBy and Since are empty in findings that follow from the catalog
	// alone; whoever observes a fault fills them in.
	ReportedBy string
	Since      time.Time
}

// NewFinding makes a finding of a documented code: severity, fix and
// dependencies come from the code's entry, the message is formatted, and
// brought to one printable line of bearable length, since parts of it may come
// from others.
func NewFinding(code Code, subject Ref, format string, args ...any) Finding {
	f := Finding{Code: code, Severity: Error, Subject: subject, Message: oneLine(fmt.Sprintf(format, args...))}
	if d, ok := Explain(code); ok {
		f.Severity, f.Fix, f.DependsOn = d.Severity, d.Fix, slices.Clone(d.DependsOn)
	}
	return f
}

// oneLine makes every run of unprintable characters one space and cuts at 1,000
// characters.
func oneLine(s string) string {
	words := strings.FieldsFunc(strings.ToValidUTF8(s, "?"), func(r rune) bool { return !unicode.IsPrint(r) })
	s = strings.Join(words, " ")
	count := 0
	for i := range s {
		if count++; count > 1000 {
			return s[:i] + "..."
		}
	}
	return s
}

// Compare orders findings by severity, the gravest first, then code, subject
// and message.
func (f Finding) Compare(o Finding) int {
	return cmp.Or(
		cmp.Compare(o.Severity, f.Severity),
		cmp.Compare(f.Code, o.Code),
		f.Subject.Compare(o.Subject),
		cmp.Compare(f.Message, o.Message),
		cmp.Compare(f.ReportedBy, o.ReportedBy),
	)
}

// String is one line: code, severity, subject and message.
func (f Finding) String() string {
	return fmt.Sprintf("%s %s %s: %s", f.Code, f.Severity, f.Subject, f.Message)
}

// Describe is String with the title of the code and the way to mend it below.
func (f Finding) Describe() string {
	var b strings.Builder
	b.WriteString(f.String())
	if d, ok := Explain(f.Code); ok {
		b.WriteString("\n  " + d.Title)
	}
	if f.Fix != "" {
		b.WriteString("\n  fix: " + f.Fix)
	}
	if len(f.DependsOn) > 0 {
		codes := make([]string, len(f.DependsOn))
		for i, c := range f.DependsOn {
			codes[i] = string(c)
		}
		b.WriteString("\n  may follow from: " + strings.Join(codes, ", "))
	}
	return b.String()
}

// Documentation is what the table knows of one code.
type Documentation struct {
	Code        Code
	Severity    Severity
	Title       string // a few words
	Explanation string // what happened and what Weft does meanwhile
	Fix         string // what a person does about it
	DependsOn   []Code
}

// Explain returns the documentation of a code.
func Explain(c Code) (Documentation, bool) {
	i, ok := slices.BinarySearchFunc(codes(), c, func(d Documentation, c Code) int { return cmp.Compare(d.Code, c) })
	if !ok {
		return Documentation{}, false
	}
	return codes()[i], true
}

// Codes returns the documentation of every code, sorted by code.
func Codes() []Documentation { return slices.Clone(codes()) }
