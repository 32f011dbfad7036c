package serve

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// maxConfigBytes bounds the config file: far more than any has settings.
const maxConfigBytes = 1 << 20

// loadYAML sets the flags that nothing before the file has set. All that is
// wrong with the file is said at once.
func (f *Flags) loadYAML(data []byte) error {
	if len(data) > maxConfigBytes {
		return fmt.Errorf("has %d bytes; the limit is %d", len(data), maxConfigBytes)
	}
	js, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(js))
	dec.UseNumber()
	var values map[string]any
	if err := dec.Decode(&values); err != nil {
		return errors.New("must be a map of settings, NAME: VALUE")
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(values)) {
		fl := f.Lookup(name)
		if fl == nil || name == flagConfig || name == flagPrintConfig || name == flagVersion {
			errs = append(errs, fmt.Errorf("unknown setting %q%s", name, f.suggest(name)))
			continue
		}
		if f.source[name] != fromDefault {
			continue
		}
		if err := setYAML(fl.Value, values[name]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		f.source[name] = fromFile
	}
	return errors.Join(errs...)
}

func setYAML(v flag.Value, value any) error {
	switch value := value.(type) {
	case string:
		return setText(v, value)
	case json.Number:
		return setText(v, value.String())
	case bool:
		return setText(v, fmt.Sprint(value))
	case []any:
		l, ok := v.(listFlag)
		if !ok {
			return errors.New("must be one value, not a list")
		}
		return l.setAll(value)
	case nil:
		return errors.New("has no value")
	default:
		return errors.New("must be one value, not a map")
	}
}

// print writes the effective settings as a config file, each with where its
// value came from.
func (f *Flags) print(w io.Writer) error {
	var b strings.Builder
	var failed error
	f.VisitAll(func(fl *flag.Flag) {
		if fl.Name == flagConfig || fl.Name == flagPrintConfig || fl.Name == flagVersion {
			return
		}
		var value any = fl.Value.String()
		if l, ok := fl.Value.(listFlag); ok {
			value = l.items()
		} else if g, ok := fl.Value.(flag.Getter); ok {
			switch got := g.Get().(type) {
			case bool, int, int64, uint, uint64, float64:
				value = got
			}
		}
		if f.secret[fl.Name] && fl.Value.String() != "" {
			value = redacted
		}
		text, err := yaml.Marshal(map[string]any{fl.Name: value})
		if err != nil {
			failed = err
			return
		}
		fmt.Fprintf(&b, "# from: %s\n%s", f.source[fl.Name], text)
	})
	if failed != nil {
		return failed
	}
	_, err := io.WriteString(w, b.String())
	return err
}

const redacted = "(redacted)"
