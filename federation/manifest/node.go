package manifest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/weftmesh/weft/federation"
)

// fields maps the names that a mapping may have to what reads their values.
type fields map[string]func(n *yaml.Node, path string)

// mapping reads a mapping, in the order of the file. Names that it must have
// follow.
func (d *decoder) mapping(n *yaml.Node, path string, known fields, required ...string) {
	if n.Kind != yaml.MappingNode {
		d.invalid(n, path, "this is %s: it must be a mapping with %s", what(n), list(known))
		return
	}
	seen := make(map[string]bool)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, clip(key.Value))
		read, ok := known[key.Value]
		switch {
		case key.Kind != yaml.ScalarNode:
			d.add(federation.CodeUnknownField, key, path, "a field's name cannot be %s", what(key))
		case !ok:
			d.add(federation.CodeUnknownField, key, at, "there is no such field%s: allowed are %s", meant(key.Value, known), list(known))
		case seen[key.Value]:
			d.invalid(key, at, "the field stands there twice: keep one")
		case value.ShortTag() == "!!null" && value.Value == "":
			// An empty value is as good as none, also for what is required.
			continue
		default:
			read(value, at)
		}
		seen[key.Value] = true
	}
	for _, name := range required {
		if !seen[name] {
			d.invalid(n, join(path, name), "the field is missing")
		}
	}
}

// entries reads a mapping whose names are the user's, in the order of the file.
func (d *decoder) entries(n *yaml.Node, path string, read func(key, value *yaml.Node, path string)) {
	if n.Kind != yaml.MappingNode {
		d.invalid(n, path, "this is %s: it must be a mapping", what(n))
		return
	}
	seen := make(map[string]bool)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, clip(key.Value))
		switch {
		case i/2 >= maxList:
			d.invalid(key, path, "more than %d entries", maxList)
			return
		case key.Kind != yaml.ScalarNode:
			d.invalid(key, path, "a name cannot be %s", what(key))
		case seen[key.Value]:
			d.invalid(key, at, "the name stands there twice: keep one")
		default:
			read(key, value, at)
		}
		seen[key.Value] = true
	}
}

// each reads a list.
func (d *decoder) each(n *yaml.Node, path string, read func(n *yaml.Node, path string)) {
	if n.Kind != yaml.SequenceNode {
		d.invalid(n, path, "this is %s: it must be a list", what(n))
		return
	}
	for i, c := range n.Content {
		if i >= maxList {
			d.invalid(c, path, "more than %d entries", maxList)
			return
		}
		read(c, fmt.Sprintf("%s[%d]", path, i))
	}
}

// text reads a string. A number or a truth value must be quoted to be one.
func (d *decoder) text(n *yaml.Node, path string) (string, bool) {
	switch {
	case n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null":
		d.invalid(n, path, "this is %s: it must be a string", what(n))
	case n.ShortTag() != "!!str":
		d.invalid(n, path, "%s is %s: put it in quotes to make it a string", clip(n.Value), what(n))
	default:
		return n.Value, true
	}
	return "", false
}

// parsed reads a string that has a grammar of its own.
func parsed[T any](d *decoder, n *yaml.Node, path string, parse func(string) (T, error)) (v T, ok bool) {
	quoted := n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" || n.ShortTag() == "!!str"
	if quoted {
		if _, ok := d.text(n, path); !ok {
			return v, false
		}
	}
	v, err := parse(n.Value)
	switch {
	case err != nil:
		d.invalid(n, path, "%v", err)
	case !quoted:
		d.text(n, path) // says that it needs quotes
	default:
		return v, true
	}
	var zero T
	return zero, false
}

func (d *decoder) label(n *yaml.Node, path string) (string, bool) {
	return parsed(d, n, path, func(s string) (string, error) {
		if err := federation.CheckLabel(s); err != nil {
			return "", fmt.Errorf("%q: %w", clip(s), err)
		}
		return s, nil
	})
}

func (d *decoder) boolean(n *yaml.Node, path string) bool {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
		d.invalid(n, path, "%s: it must be true or false", shown(n))
		return false
	}
	return strings.EqualFold(n.Value, "true")
}

// number reads a whole number; code is for one out of range.
func (d *decoder) number(n *yaml.Node, path string, low, high int, code federation.Code) int {
	v, err := strconv.Atoi(n.Value)
	switch {
	case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int":
		d.invalid(n, path, "%s: it must be a whole number from %d to %d", shown(n), low, high)
		return 0
	case err != nil || v < low || v > high:
		d.add(code, n, path, "%s: it must be a whole number from %d to %d", shown(n), low, high)
		return 0
	}
	return v
}

func (d *decoder) port(n *yaml.Node, path string) uint16 {
	return uint16(d.number(n, path, 1, 65535, federation.CodePortOutOfRange))
}

const maxDuration = 24 * time.Hour

func (d *decoder) duration(n *yaml.Node, path string, low time.Duration) time.Duration {
	v, _ := parsed(d, n, path, func(s string) (time.Duration, error) {
		v, err := time.ParseDuration(s)
		if err != nil {
			return 0, fmt.Errorf("%q: write a duration as a number with a unit, for example 10s or 500ms", clip(s))
		}
		if v < low || v > maxDuration {
			return 0, fmt.Errorf("%v: it must be from %v to %v", v, low, maxDuration)
		}
		return v, nil
	})
	return v
}

// choice reads one of a few words.
func choice[T any](d *decoder, n *yaml.Node, path string, words map[string]T) (v T) {
	s, ok := d.text(n, path)
	if !ok {
		return v
	}
	v, ok = words[s]
	if !ok {
		d.invalid(n, path, "%q is not known%s: allowed are %s", clip(s), meant(s, words), list(words))
	}
	return v
}

// names reads a list of names that stand there once each.
func names[T comparable](d *decoder, n *yaml.Node, path string, parse func(string) (T, error)) (out []T) {
	d.each(n, path, func(n *yaml.Node, path string) {
		v, ok := parsed(d, n, path, parse)
		switch {
		case !ok:
		case slices.Contains(out, v):
			d.invalid(n, path, "%v stands there twice: keep one", v)
		default:
			out = append(out, v)
		}
	})
	return out
}

func (d *decoder) clusters(n *yaml.Node, path string) []federation.ClusterID {
	return names(d, n, path, federation.ParseClusterID)
}

func (d *decoder) regions(n *yaml.Node, path string) []string {
	return names(d, n, path, func(s string) (string, error) {
		if err := federation.CheckLabel(s); err != nil {
			return "", fmt.Errorf("%q: %w", clip(s), err)
		}
		return s, nil
	})
}

// parseIP reads an address that a machine can have.
func parseIP(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%q: it must be the IP address of one machine", clip(s))
	}
	return a, nil
}

func parseIPPort(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q: write it as IP:PORT", clip(s))
	}
	if _, err := parseIP(a.Addr().String()); err != nil {
		return netip.AddrPort{}, err
	}
	return a, nil
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// what a node is, for people.
func what(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!null":
		return "empty"
	case "!!bool":
		return "a truth value"
	case "!!int", "!!float":
		return "a number"
	case "!!str":
		return "a string"
	case "!!timestamp":
		return "a date"
	default:
		return "of an unknown type"
	}
}

// shown is the value of a node for an error message.
func shown(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return "this is " + what(n)
	}
	return strconv.Quote(clip(n.Value))
}

func clip(s string) string {
	const limit = 60
	s = strings.ToValidUTF8(s, "?")
	for i := range s {
		if i > limit {
			return s[:i] + "..."
		}
	}
	return s
}

func list[V any](m map[string]V) string {
	return strings.Join(slices.Sorted(maps.Keys(m)), ", ")
}

// meant suggests the word that somebody may have had in mind.
func meant[V any](s string, words map[string]V) string {
	if len(s) > 40 {
		return ""
	}
	best, at := "", 3
	for _, w := range slices.Sorted(maps.Keys(words)) {
		if n := distance(strings.ToLower(s), strings.ToLower(w)); n < at && n < len(w) {
			best, at = w, n
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}

// distance is how many letters must be put in, taken out or exchanged to make
// one word of the other.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
