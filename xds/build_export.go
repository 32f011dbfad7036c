package xds

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/weftmesh/weft/federation"
)

// exportResources are the clusters of one own service, each with its endpoints:
// for every port the plain ones, and where there are any the proxies and the
// workload that this proxy stands before.
func (n *Node) exportResources(x *Export) ([]*Resource, error) {
	var resources []*Resource
	var errs []error
	add := func(name string, addrs []netip.AddrPort) {
		cluster, err := inwardCluster(name)
		errs = append(errs, err)
		endpoints, err := inwardEndpoints(name, addrs)
		errs = append(errs, err)
		resources = append(resources, cluster, endpoints)
	}
	for _, p := range x.Ports {
		add(portName(inwardKind, x.Service, p.Number), p.addrs(plainAddr))
		if n.Kind == Gateway && x.passes(p) {
			add(portName(passKind, x.Service, p.Number), p.addrs(proxyAddr))
		}
		if n.Kind == Proxy && p.fronts() {
			add(portName(appKind, x.Service, p.Number), p.addrs(appAddr))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return resources, nil
}

// tables are the listeners and route tables that list every export.
func (n *Node) tables(exports []*Export, members []federation.ClusterID) ([]*Resource, error) {
	var resources []*Resource
	var errs []error
	add := func(r *Resource, err error) {
		if err != nil {
			errs = append(errs, err)
			return
		}
		resources = append(resources, r)
	}
	if n.LocalPipe != "" {
		add(n.buildLocal())
		add(n.routeTable(localName, exports, nil, inwardTarget))
	}
	if n.Bind.IsValid() {
		add(n.buildBound(exports))
		if n.Kind == Proxy {
			add(n.routeTable(inboundName, exports, members, frontTarget))
		} else {
			add(n.routeTable(eastWestName, exports, members, inwardTarget))
		}
	}
	return resources, errors.Join(errs...)
}

func inwardTarget(x *Export, p ExportPort) (string, bool) {
	return portName(inwardKind, x.Service, p.Number), true
}

func frontTarget(x *Export, p ExportPort) (string, bool) {
	return portName(appKind, x.Service, p.Number), p.fronts()
}

// checkTables reports whether x can be part of the tables.
func (n *Node) checkTables(x *Export) error {
	_, err := n.tables([]*Export{x}, nil)
	return err
}

// sameTables reports whether x and y are listed alike: endpoints come and go
// without a new table.
func (x *Export) sameTables(y *Export) bool {
	return x.Mode == y.Mode && x.AllCallers == y.AllCallers && slices.Equal(x.Callers, y.Callers) &&
		slices.EqualFunc(x.Ports, y.Ports, func(p, q ExportPort) bool {
			return p.Number == q.Number && x.passes(p) == y.passes(q) && p.fronts() == q.fronts()
		})
}
