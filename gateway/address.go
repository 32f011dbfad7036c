package gateway

import "github.com/weftmesh/weft/xds"

// Address is where the engine takes tunnels of others, or empty while it has
// no such listener.
func (e *Engine) Address() string {
	for _, l := range e.config.Load().Listeners {
		if l.Kind == xds.EastWestListener || l.Kind == xds.InboundListener {
			return l.Addr.String()
		}
	}
	return ""
}
