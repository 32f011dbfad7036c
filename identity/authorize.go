package identity

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// Authorizer says whether a verified peer may connect: nil, or why not. It is
// called on every handshake and must be quick and safe for concurrent use. It
// sees verified peers only, whose clusters are not denied.
type Authorizer func(Peer) error

// AllowAny authorises every verified peer. It is for servers that decide per
// request (or stream) instead.
func AllowAny() Authorizer { return func(Peer) error { return nil } }

// AllowNobody refuses every peer.
func AllowNobody() Authorizer {
	return func(p Peer) error { return fmt.Errorf("identity: %s may not connect: nobody may", p.ID) }
}

// AllowID authorises exactly the given identities.
func AllowID(ids ...spiffeid.ID) Authorizer {
	allowed := make(map[spiffeid.ID]struct{}, len(ids))
	for _, id := range ids {
		allowed[id] = struct{}{}
	}
	want := describeIDs(ids)
	return func(p Peer) error {
		if _, ok := allowed[p.ID]; ok {
			return nil
		}
		return fmt.Errorf("identity: peer is %s, want %s", p.ID, want)
	}
}

// AllowRole authorises the holders of any of the roles, in any cluster.
func AllowRole(roles ...Role) Authorizer {
	return func(p Peer) error {
		if slices.Contains(roles, p.Role) {
			return nil
		}
		names := make([]string, len(roles))
		for i, r := range roles {
			names[i] = r.String()
		}
		return fmt.Errorf("identity: peer %s is of role %s, want %s", p.ID, p.Role, strings.Join(names, " or "))
	}
}

// AllowGatewayOf authorises the gateways of one cluster.
func AllowGatewayOf(cluster federation.ClusterID) Authorizer {
	return allowInCluster(cluster, RoleGateway)
}

// AllowAgentOf authorises the agent of one cluster.
func AllowAgentOf(cluster federation.ClusterID) Authorizer { return allowInCluster(cluster, RoleAgent) }

// AllowCluster authorises every identity under one cluster.
func AllowCluster(cluster federation.ClusterID) Authorizer {
	return func(p Peer) error {
		if cluster != "" && p.Cluster == cluster {
			return nil
		}
		return fmt.Errorf("identity: peer %s does not lie under cluster %q", p.ID, cluster)
	}
}

// AllowEither authorises a peer that any of the given authorizers does.
func AllowEither(options ...Authorizer) Authorizer {
	return func(p Peer) error {
		var refusals []error
		for _, a := range options {
			err := a(p)
			if err == nil {
				return nil
			}
			refusals = append(refusals, err)
		}
		if len(refusals) == 0 {
			return fmt.Errorf("identity: %s may not connect: nobody may", p.ID)
		}
		return errors.Join(refusals...)
	}
}

func allowInCluster(cluster federation.ClusterID, role Role) Authorizer {
	return func(p Peer) error {
		if cluster != "" && p.Cluster == cluster && p.Role == role {
			return nil
		}
		return fmt.Errorf("identity: peer %s is not the %s of cluster %q", p.ID, role, cluster)
	}
}

// IDSet is a live set of identities: a list of allowed peers that changes
// while connections are made. The zero value is empty. It is safe for
// concurrent use; readers never wait.
type IDSet struct {
	ids atomic.Pointer[map[spiffeid.ID]struct{}]
}

// NewIDSet makes a set that holds ids.
func NewIDSet(ids ...spiffeid.ID) *IDSet {
	s := new(IDSet)
	s.Replace(ids)
	return s
}

// Replace swaps the whole set; handshakes that run see the old or the new one.
func (s *IDSet) Replace(ids []spiffeid.ID) {
	m := make(map[spiffeid.ID]struct{}, len(ids))
	for _, id := range ids {
		m[id] = struct{}{}
	}
	s.ids.Store(&m)
}

// Has reports whether id is in the set.
func (s *IDSet) Has(id spiffeid.ID) bool {
	m := s.ids.Load()
	if m == nil {
		return false
	}
	_, ok := (*m)[id]
	return ok
}

// All is the set's present content, sorted.
func (s *IDSet) All() []spiffeid.ID {
	m := s.ids.Load()
	if m == nil {
		return nil
	}
	return slices.SortedFunc(maps.Keys(*m), func(a, b spiffeid.ID) int {
		return strings.Compare(a.String(), b.String())
	})
}

// Allow authorises the identities that are in the set at the handshake.
func (s *IDSet) Allow() Authorizer {
	return func(p Peer) error {
		if s.Has(p.ID) {
			return nil
		}
		return fmt.Errorf("identity: peer %s is not among the allowed identities", p.ID)
	}
}

// describeIDs prints a few identities; a long list would drown the error.
func describeIDs(ids []spiffeid.ID) string {
	const shown = 4
	var b strings.Builder
	for i, id := range ids {
		if i == shown {
			fmt.Fprintf(&b, " or %d others", len(ids)-shown)
			break
		}
		if i > 0 {
			b.WriteString(" or ")
		}
		b.WriteString(id.String())
	}
	if b.Len() == 0 {
		return "nobody"
	}
	return b.String()
}
