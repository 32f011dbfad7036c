package xds

import (
	"cmp"
	"encoding/json"
	"fmt"
	"log/slog"
)

// Type is a kind of resource.
type Type uint8

// The types of resources, in the order in which additions are sent.
const (
	TypeCluster Type = iota
	TypeEndpoints
	TypeListener
	TypeRoutes
	TypeSecret
	typeCount = iota
)

func (t Type) String() string {
	switch t {
	case TypeCluster:
		return "cluster"
	case TypeEndpoints:
		return "endpoints"
	case TypeListener:
		return "listener"
	case TypeRoutes:
		return "routes"
	case TypeSecret:
		return "secret"
	default:
		return fmt.Sprintf("type(%d)", uint8(t))
	}
}

// Name names a resource.
type Name struct {
	Type Type
	Name string
}

func (n Name) String() string { return n.Type.String() + " " + n.Name }

// Resource is one encoded resource. It is immutable.
type Resource struct {
	Name
	// Version is a hash of the content, without the revision that endpoints
	// carry as a label: whoever builds the same content makes the same version,
	// so a proxy that reconnects, even to another process, is sent nothing that
	// it has.
	Version string
	// Body is the encoded message.
	Body []byte
}

// Delta is what changed in a view.
type Delta struct {
	Changed []*Resource
	Removed []Name
}

// Empty reports whether nothing changed.
func (d Delta) Empty() bool { return len(d.Changed) == 0 && len(d.Removed) == 0 }

// Compare orders names by type, in the order in which additions are sent, then
// by name.
func (n Name) Compare(o Name) int {
	return cmp.Or(cmp.Compare(n.Type, o.Type), cmp.Compare(n.Name, o.Name))
}

// String names the resource. Its content stays out of logs: it may be a secret.
func (r *Resource) String() string { return r.Name.String() + "@" + r.Version }

// GoString is String.
func (r *Resource) GoString() string { return r.String() }

// LogValue is String.
func (r *Resource) LogValue() slog.Value { return slog.StringValue(r.String()) }

// MarshalJSON is String, quoted.
func (r *Resource) MarshalJSON() ([]byte, error) { return json.Marshal(r.String()) }
