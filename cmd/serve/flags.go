package serve

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Flags are a program's settings. It is a flag.FlagSet whose flags can also be
// given in the environment and in the config file.
type Flags struct {
	*flag.FlagSet
	program string
	secret  map[string]bool
	source  map[string]source
}

// source says where a setting's value came from.
type source string

const (
	fromDefault source = "default"
	fromFlag    source = "flag"
	fromEnv     source = "environment"
	fromFile    source = "file"
)

func newFlags(program string) *Flags {
	f := &Flags{
		FlagSet: flag.NewFlagSet(program, flag.ContinueOnError),
		program: program,
		secret:  map[string]bool{},
		source:  map[string]source{},
	}
	f.SetOutput(io.Discard) // errors and help are printed by Run
	f.Usage = func() {}
	return f
}

// Secret marks flags whose values --print-config must not show.
func (f *Flags) Secret(names ...string) {
	for _, n := range names {
		f.secret[n] = true
	}
}

// Strings defines a list: the flag may be repeated, and each value may hold
// several, separated by commas. In the file it is a list or one string.
func (f *Flags) Strings(p *[]string, name string, value []string, usage string) {
	*p = value
	f.Var(&stringList{p: p}, name, usage)
}

// Records defines a list of small records with the given keys: the flag is
// repeated, one record each, as key=value,key=value; in the environment
// records are separated by semicolons; in the file it is a list of maps.
func (f *Flags) Records(p *[]map[string]string, name string, keys []string, usage string) {
	f.Var(&recordList{p: p, keys: keys}, name, usage)
}

// load fills the flags from args, then the environment, then the file that
// --config names, and says where each value came from.
func (f *Flags) load(args []string, getenv func(string) (string, bool), readFile func(string) ([]byte, error)) error {
	if err := f.Parse(args); err != nil {
		if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
			return Usagef("unknown flag --%s%s", name, f.suggest(name))
		}
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return Usagef("%w", err)
	}
	if f.NArg() > 0 {
		return Usagef("unexpected argument %q: every setting is a flag, --NAME VALUE", f.Arg(0))
	}
	f.VisitAll(func(fl *flag.Flag) { f.source[fl.Name] = fromDefault })
	f.Visit(func(fl *flag.Flag) { f.source[fl.Name] = fromFlag })

	var errs []error
	f.VisitAll(func(fl *flag.Flag) {
		if f.source[fl.Name] != fromDefault {
			return
		}
		for _, key := range f.envNames(fl.Name) {
			text, ok := getenv(key)
			if !ok {
				continue
			}
			if err := setText(fl.Value, text); err != nil {
				errs = append(errs, fmt.Errorf("environment %s: %w", key, err))
			}
			f.source[fl.Name] = fromEnv
			return
		}
	})
	if err := errors.Join(errs...); err != nil {
		return Usagef("%w", err)
	}
	if config := f.Lookup(flagConfig); config != nil && config.Value.String() != "" {
		path := config.Value.String()
		data, err := readFile(path)
		if err != nil {
			return Usagef("cannot read the config file: %w", err)
		}
		if err := f.loadYAML(data); err != nil {
			return Usagef("config file %s: %w", path, err)
		}
	}
	return nil
}

// envNames are the variables that set a flag, the more specific first.
func (f *Flags) envNames(name string) []string {
	upper := strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	component := strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(f.program, "weft-"), "-", "_"))
	return []string{"WEFT_" + component + "_" + upper, "WEFT_" + upper}
}

// suggest is a clause that names the known setting nearest to name, or nothing
// where none is near.
func (f *Flags) suggest(name string) string {
	best, at := "", 1+len(name)/2
	f.VisitAll(func(fl *flag.Flag) {
		if d := distance(name, fl.Name); d < at {
			best, at = fl.Name, d
		}
	})
	if best == "" {
		return "; --help lists the settings"
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// distance is the number of single-character changes between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// help writes every setting with its default.
func (f *Flags) help(w io.Writer, summary string) {
	fmt.Fprintf(w, "%s: %s\n\nUsage: %s [--NAME VALUE ...]\n\n", f.program, summary, f.program)
	f.VisitAll(func(fl *flag.Flag) {
		arg, usage := flag.UnquoteUsage(fl)
		fmt.Fprintf(w, "  --%s", fl.Name)
		if arg != "" {
			fmt.Fprintf(w, " %s", arg)
		}
		fmt.Fprintf(w, "\n        %s", usage)
		if fl.DefValue != "" && fl.DefValue != "false" && fl.DefValue != "0" && !f.secret[fl.Name] {
			fmt.Fprintf(w, " (default %s)", fl.DefValue)
		}
		fmt.Fprintln(w)
	})
	fmt.Fprintf(w, "\nEach setting may also stand in the file that --config names (NAME: VALUE), or in\nthe environment: --log-level is %s, or %s for every process.\n",
		f.envNames("log-level")[0], f.envNames("log-level")[1])
}

// listFlag is a flag.Value that holds several values.
type listFlag interface {
	// setAll replaces the list by what the file has: strings, or string maps.
	setAll(items []any) error
	// setText replaces the list by what the environment has.
	setText(s string) error
	// items are the values as the file would have them.
	items() any
}

func setText(v flag.Value, s string) error {
	if l, ok := v.(listFlag); ok {
		return l.setText(s)
	}
	return v.Set(s)
}

type stringList struct {
	p   *[]string
	set bool
}

func (l *stringList) String() string {
	if l.p == nil {
		return ""
	}
	return strings.Join(*l.p, ",")
}

func (l *stringList) Set(s string) error {
	if !l.set { // the first value replaces the default
		*l.p, l.set = nil, true
	}
	for item := range strings.SplitSeq(s, ",") {
		if item = strings.TrimSpace(item); item != "" {
			*l.p = append(*l.p, item)
		}
	}
	return nil
}

func (l *stringList) setText(s string) error { return l.Set(s) }
func (l *stringList) items() any             { return slices.Clone(*l.p) }

func (l *stringList) setAll(items []any) error {
	out := make([]string, 0, len(items))
	for _, it := range items {
		s, ok := it.(string)
		if !ok {
			return errors.New("must be a list of strings")
		}
		out = append(out, s)
	}
	*l.p, l.set = out, true
	return nil
}

type recordList struct {
	p    *[]map[string]string
	keys []string
}

func (l *recordList) String() string {
	if l.p == nil {
		return ""
	}
	var b strings.Builder
	for i, r := range *l.p {
		if i > 0 {
			b.WriteByte(';')
		}
		for j, k := range slices.Sorted(maps.Keys(r)) {
			if j > 0 {
				b.WriteByte(',')
			}
			b.WriteString(k + "=" + r[k])
		}
	}
	return b.String()
}

func (l *recordList) Set(s string) error {
	r := map[string]string{}
	for part := range strings.SplitSeq(s, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok {
			return fmt.Errorf("%q must be key=value (keys: %s)", part, strings.Join(l.keys, ", "))
		}
		r[k] = v
	}
	return l.add(r)
}

func (l *recordList) add(r map[string]string) error {
	for k := range r {
		if !slices.Contains(l.keys, k) {
			return fmt.Errorf("unknown key %q (keys: %s)", k, strings.Join(l.keys, ", "))
		}
	}
	*l.p = append(*l.p, r)
	return nil
}

func (l *recordList) setText(s string) error {
	*l.p = nil
	for item := range strings.SplitSeq(s, ";") {
		if strings.TrimSpace(item) == "" {
			continue
		}
		if err := l.Set(item); err != nil {
			return err
		}
	}
	return nil
}

func (l *recordList) items() any { return slices.Clone(*l.p) }

func (l *recordList) setAll(items []any) error {
	*l.p = nil
	for _, it := range items {
		m, ok := it.(map[string]any)
		if !ok {
			return fmt.Errorf("must be a list of maps (keys: %s)", strings.Join(l.keys, ", "))
		}
		r := map[string]string{}
		for k, v := range m {
			s, ok := v.(string)
			if !ok {
				return fmt.Errorf("key %q must be a string", k)
			}
			r[k] = s
		}
		if err := l.add(r); err != nil {
			return err
		}
	}
	return nil
}
