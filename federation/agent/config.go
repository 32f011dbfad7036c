package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/identity"
	"github.com/weftmesh/weft/xds"
)

// Config is all that an agent is told. Controllers, StateDir, Log and Metrics
// must be set; Join and CAHash only until the agent has enrolled.
type Config struct {
	Join        identity.JoinToken
	CAHash      identity.Pin
	Controllers []string // HOST:PORT each
	// StateDir holds what must survive a restart: identity and last good state.
	// It is made with mode 0700, and belongs to one agent.
	StateDir string
	// Source is the folder of services; empty means that the cluster offers
	// nothing.
	Source string
	// Gateways are the addresses that the exports name. They must be inside the
	// registration; empty means all of the registration's.
	Gateways []federation.Address
	Sockets  []Socket
	// XDSListen is where proxies of the own cluster may come over mutual TLS;
	// empty is nowhere.
	XDSListen string
	DNSListen string // empty is nowhere

	Version string
	Clock   clock.Clock
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Socket is one proxy that the agent configures: how it comes, whom it is, and
// where it listens.
type Socket struct {
	// Path of the unix socket that stands for the identity. Empty: the proxy
	// comes to XDSListen with its SVID.
	Path string
	Mode fs.FileMode // of the socket: 0600 (also where it is 0) or 0660
	// Identity is "gateway" or "ns/N/sa/S", below the own cluster.
	Identity string
	// Listen is the proxy's mTLS side: a gateway's east-west listener, a
	// workload proxy's inbound one. Invalid: it has none.
	Listen netip.AddrPort
	// LocalPipe is the path of the unix socket on which a gateway's Envoy
	// listens for itself; empty is beside Path.
	LocalPipe string
	// Outbound are the loopback addresses at which a workload proxy takes its
	// workload's calls, by service. A gateway has clusterset addresses instead.
	Outbound map[federation.ServiceID]netip.Addr
}

// gatewayIdentity is how a Socket names the cluster's gateway.
const gatewayIdentity = "gateway"

func (s Socket) kind() xds.Kind {
	if s.Identity == gatewayIdentity {
		return xds.Gateway
	}
	return xds.Proxy
}

// String names the socket in logs.
func (s Socket) String() string { return s.Identity + " at " + s.Path }

// id is the SPIFFE ID that the socket stands for.
func (s Socket) id(td spiffeid.TrustDomain, cluster federation.ClusterID) (spiffeid.ID, error) {
	if s.Identity == gatewayIdentity {
		return identity.GatewayID(td, cluster)
	}
	p := strings.Split(s.Identity, "/")
	if len(p) != 4 || p[0] != "ns" || p[2] != "sa" {
		return spiffeid.ID{}, fmt.Errorf("identity %q: write gateway or ns/NAMESPACE/sa/SERVICE-ACCOUNT", s.Identity)
	}
	return identity.WorkloadID(td, cluster, p[1], p[3])
}

// Keys of a socket's settings, for ParseSocket.
const (
	socketPath     = "path"
	socketIdentity = "identity"
	socketListen   = "listen"
	socketMode     = "mode"
	socketPipe     = "local-pipe"
	socketOutbound = "outbound"
)

// SocketKeys are the settings that ParseSocket knows.
func SocketKeys() []string {
	return []string{socketPath, socketIdentity, socketListen, socketMode, socketPipe, socketOutbound}
}

// ParseSocket reads a socket from its settings as texts:
//
//	path: /run/weft/gateway.sock
//	identity: gateway, or ns/shop/sa/payments
//	listen: 10.0.0.1:15443
//	mode: 0600 or 0660
//	local-pipe: /run/weft/gateway-local.sock
//	outbound: shop/payments=127.0.0.9 shop/carts=127.0.0.10
func ParseSocket(settings map[string]string) (Socket, error) {
	s := Socket{Path: settings[socketPath], Identity: settings[socketIdentity], LocalPipe: settings[socketPipe], Mode: 0o600}
	td, _ := spiffeid.TrustDomainFromString("check.example")
	if _, err := s.id(td, "check"); err != nil {
		return s, err
	}
	if v := settings[socketListen]; v != "" {
		a, err := netip.ParseAddrPort(v)
		if err != nil || a.Port() == 0 {
			return s, fmt.Errorf("listen %q: write IP:PORT", v)
		}
		s.Listen = a
	}
	if v := settings[socketMode]; v != "" {
		n, err := strconv.ParseUint(v, 8, 32)
		if err != nil || n != 0o600 && n != 0o660 {
			return s, fmt.Errorf("mode %q: write 0600 or 0660", v)
		}
		s.Mode = fs.FileMode(n)
	}
	for f := range strings.FieldsSeq(settings[socketOutbound]) {
		name, text, _ := strings.Cut(f, "=")
		id, err := federation.ParseServiceID(name)
		if err != nil {
			return s, fmt.Errorf("outbound: %w", err)
		}
		ip, err := netip.ParseAddr(text)
		if err != nil || !ip.IsLoopback() {
			return s, fmt.Errorf("outbound %q: write NAMESPACE/NAME=IP with a loopback address", f)
		}
		if s.Outbound == nil {
			s.Outbound = make(map[federation.ServiceID]netip.Addr)
		}
		s.Outbound[id] = ip
	}
	return s, nil
}

// check fills defaults in and reports what is wrong.
func (c *Config) check() error {
	if c.Clock == nil {
		c.Clock = clock.Real()
	}
	if c.Log == nil || c.Metrics == nil {
		return errors.New("agent: a logger and a metrics registry are needed")
	}
	if c.StateDir == "" {
		return errors.New("agent: --state-dir is needed: a folder of its own, which survives restarts")
	}
	if len(c.Controllers) == 0 {
		return errors.New("agent: --controller is needed: HOST:PORT of one controller or several")
	}
	for _, a := range c.Controllers {
		if _, err := federation.ParseAddress(a); err != nil {
			return fmt.Errorf("--controller: %w", err)
		}
	}
	if !c.Join.IsZero() && c.CAHash == (identity.Pin{}) {
		return errors.New("agent: --join needs --ca-hash beside it, which names the mesh that the token is for")
	}
	paths := make(map[string]bool)
	for i := range c.Sockets {
		s := &c.Sockets[i]
		if s.Mode == 0 {
			s.Mode = 0o600
		}
		if s.Path == "" && c.XDSListen == "" {
			return fmt.Errorf("socket of %s: without a path the proxy has to come over --xds-listen, which is not set", s.Identity)
		}
		if s.Path != "" && paths[s.Path] {
			return fmt.Errorf("socket %s: configured twice: each stands for one identity", s.Path)
		}
		paths[s.Path] = true
		if s.kind() == xds.Gateway && s.LocalPipe == "" && s.Path != "" {
			s.LocalPipe = strings.TrimSuffix(s.Path, filepath.Ext(s.Path)) + "-local.sock"
		}
	}
	return nil
}

// Cluster is the cluster of the identity in the state folder, or else of the
// join token; empty where there is neither.
func (c *Config) Cluster() federation.ClusterID {
	if e, err := loadEnrolment(c.StateDir); err == nil && e != nil {
		return e.Cluster
	}
	if c.Join.IsZero() {
		return ""
	}
	return c.Join.Cluster()
}
