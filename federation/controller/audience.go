package controller

import (
	"strings"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// audience says which clusters may see a record. The zero value is nobody.
type audience struct {
	everyone bool
	owner    federation.ClusterID // sees it always; empty for none
	shared   bool                 // whether visible says who sees it beside the owner
	visible  federation.Selector
}

// includes reports whether a cluster of the given region may see the record.
func (a audience) includes(c federation.ClusterID, region string) bool {
	return a.everyone || a.owner == c && c != "" || a.shared && a.visible.Selects(c, region)
}

// class is a name for the audience: records of one class have one audience.
func (a audience) class() string {
	switch {
	case a.everyone:
		return "*"
	case !a.shared:
		return string(a.owner)
	}
	var b strings.Builder
	b.WriteString(string(a.owner))
	for _, c := range a.visible.Clusters {
		b.WriteString(" c:" + string(c))
	}
	for _, r := range a.visible.Regions {
		b.WriteString(" r:" + r)
	}
	return b.String()
}

// audienceOf is the audience of a record. Readiness has that of its export,
// which is passed in, nil where there is none. Kinds that no Sync carries have
// nobody.
func audienceOf(key federationv1.Key, export *federation.Export) audience {
	switch key.Kind {
	case federationv1.KindMember, federationv1.KindDenial, federationv1.KindBundle,
		federationv1.KindSilence, federationv1.KindDrain:
		return audience{everyone: true}
	case federationv1.KindVIP:
		return audience{owner: key.Cluster}
	case federationv1.KindPolicy:
		if key.Policy.Origin == federation.OriginController {
			return audience{everyone: true}
		}
		return audience{owner: federation.ClusterID(key.Policy.Origin)}
	case federationv1.KindExport, federationv1.KindReadiness:
		switch {
		case export == nil:
			return audience{owner: key.Cluster}
		case export.Visible.IsAll():
			return audience{everyone: true}
		}
		return audience{owner: key.Cluster, shared: true, visible: export.Visible}
	}
	return audience{}
}
