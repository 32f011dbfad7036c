package xds

import (
	"crypto/x509"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"github.com/weftmesh/weft/federation"
)

// Config is all that a proxy was told to do. A Config and everything that it
// points to is never changed after it was handed out, and parts that did not
// change are the same pointers as in the Config before.
//
// Names that refer to something that is not (yet) in its map are legal: a
// forward to an absent cluster, or to one without endpoints, is refused; an
// absent route table refuses every stream; an absent Trust refuses every
// handshake.
type Config struct {
	// Revision is of the last response that was read. Resources that it did not
	// concern may be older, and are still what that revision wants.
	Revision  federation.Revision
	Listeners map[string]*Listener
	Clusters  map[string]*Cluster
	Routes    map[string]*RouteTable
	Trust     map[string]*Trust // by SDS name
}

// ListenerKind is the part that a listener plays.
type ListenerKind uint8

// The kinds of listeners.
const (
	// ImportListener takes plain connections of local callers of one service
	// port, at its clusterset address. It has a Forward.
	ImportListener ListenerKind = iota + 1
	// EastWestListener takes mTLS from other clusters. It has Chains: one that
	// terminates, and one per service port that passes through.
	EastWestListener
	// InboundListener takes mTLS in front of a workload. It has Chains, all of
	// which terminate.
	InboundListener
	// LocalListener takes weft/1 without TLS on a pipe, for an engine that can
	// reach its own cluster's plain backends only by a tunnel. It has a Local.
	// An engine that dials them itself need not open it: an Endpoint with
	// IsLocal stands for the cluster that this listener's route table names for
	// the tunnel's authority.
	LocalListener
)

func (k ListenerKind) String() string {
	switch k {
	case ImportListener:
		return "import"
	case EastWestListener:
		return "east-west"
	case InboundListener:
		return "inbound"
	case LocalListener:
		return "local"
	default:
		return "unknown"
	}
}

// Listener is one address to listen on.
type Listener struct {
	Name string
	Kind ListenerKind
	Addr netip.AddrPort // invalid where Pipe is set
	Pipe string         // path of a unix socket
	Mode fs.FileMode    // of the unix socket

	Forward *Forward   // ImportListener
	Chains  []*Chain   // EastWestListener, InboundListener; sorted by name
	Local   *Terminate // LocalListener; its TLS is nil
	// HelloTimeout is how long a client may take for its ClientHello; 0 on
	// listeners without TLS.
	HelloTimeout time.Duration
}

// Forward carries a connection to a cluster.
type Forward struct {
	Cluster string
	// Tunnel says what to ask the far end for; nil means that the connection's
	// bytes are forwarded as they are.
	Tunnel *Tunnel
	// Attempts is how many candidates are tried at most, at least 1, and the
	// back-off between two of them.
	Attempts               int
	BackoffMin, BackoffMax time.Duration
	IdleTimeout            time.Duration // 0: idle connections are kept
}

// Tunnel is the CONNECT request that opens a stream of weft/1.
type Tunnel struct {
	Authority string
	Headers   []Header // in order
}

// Header is one request header of a Tunnel. Either Value is fixed, or
// EndpointKey names the key of the chosen endpoint's Labels whose value it is;
// an endpoint without the label sends no header.
type Header struct {
	Name        string // lower case
	Value       string
	EndpointKey string
}

// Chain is what a TLS listener does with connections for some server names.
// Exactly one of Terminate and Passthrough is set. A connection that no chain
// takes is closed before it got an answer.
type Chain struct {
	Name        string
	ServerNames []string // exact, lower case; sorted
	ALPN        []string // the client must offer one of these
	Terminate   *Terminate
	Passthrough *Forward // without a Tunnel
}

// Terminate ends a tunnel here and serves the streams in it.
type Terminate struct {
	TLS    *ServerTLS // nil on a LocalListener
	Routes string     // name in Config.Routes
	HTTP2  HTTP2
	// MaxAge is when the tunnel gets a graceful GOAWAY; 0 is never. Its open
	// streams go on.
	MaxAge      time.Duration
	IdleTimeout time.Duration // of a tunnel without streams; 0: kept
}

// ServerTLS is the server's side of a tunnel: TLS 1.3, no resumption, a client
// certificate required.
type ServerTLS struct {
	Certificate string   // SDS name of the own leaf
	Trust       string   // name in Config.Trust: whom to admit
	ALPN        []string // what the server speaks
}

// HTTP2 are the limits of one tunnel. Zero values mean the engine's default.
type HTTP2 struct {
	StreamWindow, ConnWindow uint32 // bytes
	MaxStreams               uint32 // at once
	// A ping every PingInterval; the tunnel is dead when its answer takes
	// longer than PingTimeout.
	PingInterval, PingTimeout time.Duration
}

// RouteTable says which streams are served, for whom. A stream is served when
// one of Peers admits its tunnel's certificate and its asserted caller, and
// the route of its authority admits the certificate too; the answers otherwise
// are 403, 404 for an unknown authority, and 503 where no endpoint answers.
type RouteTable struct {
	Name string
	// Open tables (LocalListener) serve everyone who can connect; all others
	// only Peers, and nobody if that is empty.
	Open   bool
	Peers  []Peer
	Routes map[string]*Route // by :authority
}

// Peer is a kind of certificate that may open streams, and whom its holder may
// speak for.
type Peer struct {
	SAN Match
	// Asserts is the prefix that the header weft-caller must have, if it is
	// there; empty means that it must not be there.
	Asserts string
}

// Match matches a URI SAN: exactly, or by its beginning. The zero value
// matches nothing.
type Match struct {
	Exact  string
	Prefix string
}

// Matches reports whether m matches the URI SAN uri.
func (m Match) Matches(uri string) bool {
	if m.Exact != "" {
		return uri == m.Exact
	}
	return m.Prefix != "" && len(uri) > len(m.Prefix) && uri[:len(m.Prefix)] == m.Prefix
}

// Route is one service port that is served here.
type Route struct {
	Authority string
	Cluster   string // in Config.Clusters: only this cluster's own endpoints
	// Callers narrows RouteTable.Peers; nil means all of those.
	Callers []Match
	// Attempts is how many endpoints are tried at most before 503, each at most
	// once while there are others.
	Attempts int
}

// Admits reports whether a certificate with this URI SAN may use the route,
// given that the table's Peers admit it.
func (r *Route) Admits(uri string) bool {
	return r.Callers == nil || slices.ContainsFunc(r.Callers, func(m Match) bool { return m.Matches(uri) })
}

// Admits reports whether the table admits a tunnel whose certificate has this
// URI SAN and which asserts this caller (the header weft-caller, or "").
func (t *RouteTable) Admits(uri, caller string) bool {
	return t.Open || slices.ContainsFunc(t.Peers, func(p Peer) bool {
		switch {
		case !p.SAN.Matches(uri):
			return false
		case caller == "":
			return true
		default:
			return p.Asserts != "" && Match{Prefix: p.Asserts}.Matches(caller)
		}
	})
}

// Cluster is a set of endpoints and how to connect to them.
type Cluster struct {
	Name           string
	ConnectTimeout time.Duration
	Ejection       Ejection
	// Tunnels says that connections to this cluster are streams of weft/1
	// tunnels with these limits, that are closed IdleTimeout after their last
	// stream ended; nil means one TCP connection for each.
	Tunnels *Tunnels
	// TLS is by the endpoint's TLS key. An endpoint whose key is not here must
	// not be connected to at all, least of all in plain text. A nil value means
	// plain text. Clusters without TLS have none, and their endpoints no keys.
	TLS        map[string]*ClientTLS
	Localities []*Locality // sorted by priority, then cluster
}

// Tunnels are the limits of a cluster's tunnels.
type Tunnels struct {
	HTTP2       HTTP2
	IdleTimeout time.Duration
}

// Ejection sets an endpoint aside that failed Failures times in a row, for
// BaseTime times the number of ejections so far, at most MaxTime. All endpoints
// may be ejected at once. Zero Failures: never.
type Ejection struct {
	Failures          int
	BaseTime, MaxTime time.Duration
}

// ClientTLS is the client's side of a tunnel: TLS 1.3, no resumption.
type ClientTLS struct {
	SNI         string
	ALPN        []string
	Certificate string // SDS name of the own leaf
	Trust       string // name in Config.Trust: the roots
	// SANs are the URI SANs of which the server's certificate must have one.
	// Empty matches nobody.
	SANs []string
}

// Locality is the part of a cluster's endpoints that lie in one cluster of the
// mesh. Priority 0 is used before 1, and so on; within a priority, new
// connections are shared out by Weight over the localities that have an
// endpoint that can be used, exactly.
type Locality struct {
	Region   string
	Cluster  federation.ClusterID // empty for endpoints of this cluster behind an inward cluster
	Priority int
	Weight   int // per mille where it came from a plan
	// Endpoints share the locality's part evenly.
	Endpoints []*Endpoint
}

// Endpoint is one address to connect to.
type Endpoint struct {
	Addr   netip.AddrPort // invalid where Pipe is set
	Pipe   string         // path of a unix socket
	TLS    string         // key of Cluster.TLS; empty where the cluster has none
	Labels map[string]string
}

// IsLocal reports whether e is this proxy's own LocalListener.
func (e *Endpoint) IsLocal() bool { return e.Pipe != "" && e.TLS == localMatch }

// The keys of an Endpoint's Labels that plans set.
const (
	LabelCluster  = "cluster"
	LabelTier     = "tier"     // of the plan, from 0
	LabelShare    = "share"    // per mille
	LabelMode     = "mode"     // terminate or passthrough
	LabelDecision = "decision" // policy, tier and share in one string
	LabelRevision = "revision" // at which the plan last changed
)

// localMatch is the TLS key of the pipe of a proxy's own LocalListener.
const localMatch = "local"

// Trust is whom to believe: roots, and which identities under them.
type Trust struct {
	Name  string
	Roots []*x509.Certificate
	// SANs are the URI SANs of which a certificate must have one; nil means
	// that only the roots count, and the user names the identities itself.
	SANs []Match
}

// Admits reports whether a certificate with this URI SAN is one of those that t
// names; its chain must be verified against t.Roots besides.
func (t *Trust) Admits(uri string) bool {
	return t.SANs == nil || slices.ContainsFunc(t.SANs, func(m Match) bool { return m.Matches(uri) })
}
