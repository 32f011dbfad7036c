// Command weft-agent is one cluster's agent: it reports what the cluster offers
// and configures its gateways and proxies.
package main

import (
	"context"
	"errors"

	"github.com/weftmesh/weft/cmd/serve"
	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/agent"
	"github.com/weftmesh/weft/identity"
)

var version = "" // set by the linker

func main() {
	serve.Main(serve.Program{
		Name:    "weft-agent",
		Summary: "reports what a cluster offers, and configures its gateways and proxies",
		Version: version,
		Admin:   "127.0.0.1:9902",
	}, define)
}

// define registers the agent's settings.
func define(f *serve.Flags) serve.Wire {
	var (
		controllers, gateways []string
		sockets               []map[string]string
	)
	join := f.String("join", "", "join `token` to enrol with; ignored once the agent has enrolled")
	caHash := f.String("ca-hash", "", "`hash` of the mesh's root, as printed beside the token: sha256:HEX")
	f.Strings(&controllers, "controller", nil, "`addresses` of the controllers, HOST:PORT")
	stateDir := f.String("state-dir", "weft-agent-data", "`folder` for identity and last good state, this agent's alone")
	source := f.String("source", "weft-services", "`folder` of the cluster's services, in YAML")
	f.Strings(&gateways, "gateway-address", nil, "`addresses` that exports name as the cluster's gateways; default: all that are registered")
	f.Records(&sockets, "sockets", agent.SocketKeys(), "proxies to configure: `path,identity,listen` and more")
	xdsListen := f.String("xds-listen", "", "`address` for the cluster's proxies that come by mutual TLS; empty for none")
	dnsListen := f.String("dns-listen", "", "`address` of clusterset DNS, UDP and TCP; empty for none")
	f.Secret("join")

	return func(_ context.Context, p *serve.Process) ([]serve.Task, error) {
		c := agent.Config{
			Controllers: controllers,
			StateDir:    *stateDir,
			Source:      *source,
			XDSListen:   *xdsListen,
			DNSListen:   *dnsListen,
			Version:     p.Version,
			Clock:       p.Clock,
		}
		var err error
		if *join != "" {
			if c.Join, err = identity.ParseJoinToken(*join); err != nil {
				return nil, serve.Usagef("--join: %w", err)
			}
		}
		if *caHash != "" {
			if c.CAHash, err = identity.ParsePin(*caHash); err != nil {
				return nil, serve.Usagef("--ca-hash: %w", err)
			}
		}
		for _, g := range gateways {
			a, err := federation.ParseAddress(g)
			if err != nil {
				return nil, serve.Usagef("--gateway-address: %w", err)
			}
			c.Gateways = append(c.Gateways, a)
		}
		for _, settings := range sockets {
			s, err := agent.ParseSocket(settings)
			if err != nil {
				return nil, serve.Usagef("--sockets: %w", err)
			}
			c.Sockets = append(c.Sockets, s)
		}
		c.Log = p.Log // the agent itself adds its cluster, once it knows
		p.In(string(c.Cluster()), "")
		c.Metrics = p.Metrics
		a, err := agent.New(c)
		if err != nil {
			return nil, err
		}
		p.Ready.Add("serving", func(context.Context) error {
			select {
			case <-a.Ready():
				return nil
			default:
				return errors.New("not enrolled yet, or still starting")
			}
		})
		return []serve.Task{{Name: "agent", Run: a.Run}}, nil
	}
}
