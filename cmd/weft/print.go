package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	v1 "github.com/weftmesh/weft/federation/v1"
)

// format is one of the ways in which every command prints its result.
type format string

const (
	formatTable format = "table"
	formatWide  format = "wide"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
	formatName  format = "name"
)

func parseFormat(s string) (format, error) {
	f := format(s)
	if slices.Contains([]format{formatTable, formatWide, formatJSON, formatYAML, formatName}, f) {
		return f, nil
	}
	return "", usagef("output %q: choose table, wide, json, yaml or name", s)
}

// structured reports whether the format is for programs.
func (f format) structured() bool { return f == formatJSON || f == formatYAML }

// tone colours a cell on a terminal.
type tone int

const (
	plain tone = iota
	good
	warn
	bad
	faint
)

func (t tone) paint(s string) string {
	code := [...]string{"", "32", "33", "31", "2"}[t]
	if code == "" || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// cell is one entry of a table.
type cell struct {
	text string
	tone tone
}

func text(format string, args ...any) cell { return cell{text: fmt.Sprintf(format, args...)} }

// column says how one property of a T is shown; wide ones only on demand.
type column[T any] struct {
	title string
	wide  bool
	right bool
	value func(T) cell
}

// view is everything there is to know about printing a kind of object.
type view[T any] struct {
	kind    string // singular, as in "cluster"
	name    func(T) string
	columns []column[T]
	// object is what JSON and YAML show; nil shows the message itself.
	object func(T) (any, error)
}

// printList writes items in the app's format. The JSON of a list is an object
// with kind, revision and items; of a single one (one is true) the item alone.
func printList[T proto.Message](a *app, v view[T], rev *v1.Revision, items []T, one bool) error {
	f, err := parseFormat(a.format)
	if err != nil {
		return err
	}
	switch f {
	case formatName:
		for _, it := range items {
			fmt.Fprintf(a.out, "%s/%s\n", v.kind, v.name(it))
		}
		return nil
	case formatJSON, formatYAML:
		objects := make([]any, 0, len(items))
		for _, it := range items {
			o, err := v.asObject(it)
			if err != nil {
				return err
			}
			objects = append(objects, o)
		}
		if one && len(objects) == 1 {
			return printValue(a.out, f, objects[0])
		}
		return printValue(a.out, f, map[string]any{
			"kind": strings.ToUpper(v.kind[:1]) + v.kind[1:] + "List", "revision": revision(rev), "items": objects,
		})
	}
	printTable(a.out, v.columns, items, f == formatWide)
	return nil
}

func (v view[T]) asObject(item T) (any, error) {
	if v.object != nil {
		return v.object(item)
	}
	if m, ok := any(item).(proto.Message); ok {
		return asJSON(m)
	}
	return item, nil
}

// asJSON turns a message into plain values, named as in its JSON mapping.
func asJSON(m proto.Message) (any, error) {
	data, err := protojson.MarshalOptions{}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var value any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	err = d.Decode(&value)
	return value, err
}

// printMessage writes one message as JSON or YAML.
func printMessage(w io.Writer, f format, m proto.Message) error {
	value, err := asJSON(m)
	if err != nil {
		return err
	}
	return printValue(w, f, value)
}

func printValue(w io.Writer, f format, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	if f == formatYAML {
		data, err = yaml.JSONToYAML(data)
		if err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", data)
	return err
}

// printTable aligns the columns; colours do not disturb the alignment because
// widths are counted before they are put on.
func printTable[T any](w io.Writer, columns []column[T], items []T, wide bool) {
	var shown []column[T]
	for _, c := range columns {
		if wide || !c.wide {
			shown = append(shown, c)
		}
	}
	rows := make([][]cell, 0, len(items)+1)
	header := make([]cell, len(shown))
	for i, c := range shown {
		header[i] = cell{text: c.title, tone: faint}
	}
	rows = append(rows, header)
	for _, it := range items {
		row := make([]cell, len(shown))
		for i, c := range shown {
			row[i] = c.value(it)
			if row[i].text == "" {
				row[i] = cell{text: "-", tone: faint}
			}
		}
		rows = append(rows, row)
	}
	width := make([]int, len(shown))
	for _, row := range rows {
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c.text))
		}
	}
	paint := colours(w)
	for _, row := range rows {
		var line strings.Builder
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c.text))
			t := c.text
			if paint {
				t = c.tone.paint(t)
			}
			switch {
			case shown[i].right:
				line.WriteString(pad + t)
			case i == len(row)-1:
				line.WriteString(t)
			default:
				line.WriteString(t + pad)
			}
			if i < len(row)-1 {
				line.WriteString("  ")
			}
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

// field is one line of a description.
type field struct {
	label string
	value cell
}

// printFields writes "label: value" lines with the values aligned.
func printFields(w io.Writer, fields []field) {
	width := 0
	for _, f := range fields {
		width = max(width, len(f.label))
	}
	for _, f := range fields {
		t := f.value.text
		if t == "" {
			t = "-"
		}
		if colours(w) {
			t = f.value.tone.paint(t)
		}
		fmt.Fprintf(w, "%-*s  %s\n", width+1, f.label+":", t)
	}
}

// revision is a catalog revision as people read it: the number alone, since
// the incarnation changes only when a backup is restored.
func revision(r *v1.Revision) string {
	if r.GetNumber() == 0 {
		return "-"
	}
	return fmt.Sprintf("%d", r.GetNumber())
}

// age is a duration in two units at most, as people say it.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + age(-d)
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// perMille is a share as a percentage.
func perMille(n int32) string {
	if n%10 == 0 {
		return fmt.Sprintf("%d%%", n/10)
	}
	return fmt.Sprintf("%.1f%%", float64(n)/10)
}
