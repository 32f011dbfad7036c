package federationv1

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
)

// Bounds of what a record may hold. They are far above what a sane mesh needs
// and keep a hostile peer from making others work for it.
const (
	maxKey       = 1024 // bytes
	maxText      = 4096 // bytes of a message for people
	maxName      = 512  // bytes of a name
	maxPorts     = 256  // of an export
	maxGateways  = 64   // of a cluster
	maxGrants    = 1024 // of a cluster
	maxServes    = 256  // identities of an export
	maxSelected  = 1024 // clusters or regions that one list names
	maxSteps     = 32   // of a policy's order
	maxRoots     = 64   // of a bundle
	maxRoot      = 1 << 16
	maxEndpoints = federation.MaxEndpoints
	maxWeight    = federation.MaxWeight
	maxDuration  = 30 * 24 * time.Hour
)

// clip shortens a hostile string for an error message.
func clip(s string) string {
	const limit = 80
	if len(s) <= limit {
		return s
	}
	s = s[:limit]
	for len(s) > 0 {
		if r, n := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || n > 1 {
			break
		}
		s = s[:len(s)-1]
	}
	return s + "..."
}

func field(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// checkText allows one line of printable text: what a peer sends ends up on
// terminals and in logs.
func checkText(name, s string, limit int) error {
	switch {
	case len(s) > limit:
		return fmt.Errorf("%s: longer than %d bytes", name, limit)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s: not UTF-8", name)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%s: holds the unprintable character %U", name, r)
		}
	}
	return nil
}

// optionalLabel allows a DNS label or nothing.
func optionalLabel(name, s string) error {
	if s == "" {
		return nil
	}
	return label(name, s)
}

func label(name, s string) error {
	if err := federation.CheckLabel(s); err != nil {
		return fmt.Errorf("%s: %q: %w", name, clip(s), err)
	}
	return nil
}

// all parses a list of at most limit items, naming the item in an error. An
// empty list is nil.
func all[M, T any](name string, limit int, list []M, parse func(M) (T, error)) ([]T, error) {
	if len(list) > limit {
		return nil, fmt.Errorf("%s: %d entries, at most %d are allowed", name, len(list), limit)
	}
	var out []T
	for i, m := range list {
		t, err := parse(m)
		if err != nil {
			return nil, fmt.Errorf("%s[%d]: %w", name, i, err)
		}
		out = append(out, t)
	}
	return out, nil
}

// sorted is all for lists that stand for sets: sorted, each item once.
func sorted[M, T any](name string, limit int, list []M, parse func(M) (T, error), compare func(T, T) int) ([]T, error) {
	out, err := all(name, limit, list, parse)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(out, compare)
	return slices.CompactFunc(out, func(a, b T) bool { return compare(a, b) == 0 }), nil
}

// unique is all for lists whose order means something, but in which nothing may
// stand twice.
func unique[M any, T comparable](name string, limit int, list []M, parse func(M) (T, error)) ([]T, error) {
	out, err := all(name, limit, list, parse)
	if err != nil {
		return nil, err
	}
	seen := make(map[T]bool, len(out))
	for i, t := range out {
		if seen[t] {
			return nil, fmt.Errorf("%s[%d]: %v stands there twice", name, i, t)
		}
		seen[t] = true
	}
	return out, nil
}

func parseRegion(s string) (string, error) { return s, label("region", s) }

func within[N cmp.Ordered](name string, n, low, high N) error {
	if n < low || n > high {
		return fmt.Errorf("%s: %v is not between %v and %v", name, n, low, high)
	}
	return nil
}

func clampInt32(n int) int32 { return int32(min(max(n, math.MinInt32), math.MaxInt32)) }

func encodeDuration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

func decodeDuration(name string, d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, fmt.Errorf("%s: no valid duration", name)
	}
	v := d.AsDuration()
	return v, within(name, v, 0, maxDuration)
}

func encodeTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func decodeTime(name string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, fmt.Errorf("%s: no valid time", name)
	}
	return t.AsTime(), nil
}

var errMissing = errors.New("missing")
