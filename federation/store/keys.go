package store

import (
	"strings"

	"github.com/weftmesh/weft/federation"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Keys below the prefix /weft/1/TD/. docs/format/etcd.md says what each holds.
//
// Catalog and findings, values are federationv1.Record without its key, and
// federationv1.Key is the grammar of their keys:
//
//	cluster/C              a registration, or its tombstone
//	export/C/NS/SVC        one cluster's offer of one service
//	ready/C/NS/SVC         its readiness
//	policy/ORIGIN/NS/NAME  a FailoverPolicy; ORIGIN is "controller" or a cluster
//	liveness/C             a silent control link
//	drain/C                a drain in progress or done
//	vip/C/NS/SVC           clusterset address of a service in a cluster
//	deny/C/GENERATION      refused identities
//	bundle                 the trust bundle
//	finding/C/CODE/KIND/NAME what an agent found; not part of the catalog
//
// The store's own, values are federationv1.State:
//
//	head                   put by every transaction that changes the catalog
//	meta                   incarnation and feature level
//	session/C              epoch of a cluster's session
//	report/C               how far its report got
//	clusterkey/C           its enrolled key
//	vipaddr/C/ADDR         which service holds an address
//	authority/R/SLOT       a signing authority, sealed
//	issued/SERIAL          one signed identity
//	operator/NAME          a person's role
//	token/HASH             a join token                      (leased)
//	presence/C             a connected agent                 (leased)
//	controller/NAME        a running controller              (leased)
//	election/NAME/LEASE    a candidate; etcd's own format    (leased)
const (
	keyHead   = "head"
	keyMeta   = "meta"
	keyBundle = "bundle"

	dirCluster    = "cluster/"
	dirExport     = "export/"
	dirReady      = "ready/"
	dirPolicy     = "policy/"
	dirLiveness   = "liveness/"
	dirDrain      = "drain/"
	dirVip        = "vip/"
	dirDeny       = "deny/"
	dirFinding    = "finding/"
	dirSession    = "session/"
	dirReport     = "report/"
	dirClusterKey = "clusterkey/"
	dirVipAddr    = "vipaddr/"
	dirAuthority  = "authority/"
	dirIssued     = "issued/"
	dirOperator   = "operator/"
	dirToken      = "token/"
	dirPresence   = "presence/"
	dirController = "controller/"
	dirElection   = "election/"
)

// prefix is the folder of one trust domain; the 1 is the layout's version.
func prefix(trustDomain string) string { return "/weft/1/" + trustDomain + "/" }

func clusterKey(c federation.ClusterID) string   { return dirCluster + string(c) }
func sessionKey(c federation.ClusterID) string   { return dirSession + string(c) }
func reportKey(c federation.ClusterID) string    { return dirReport + string(c) }
func enrolmentKey(c federation.ClusterID) string { return dirClusterKey + string(c) }
func drainKey(c federation.ClusterID) string     { return dirDrain + string(c) }
func livenessKey(c federation.ClusterID) string  { return dirLiveness + string(c) }
func presenceKey(c federation.ClusterID) string  { return dirPresence + string(c) }
func tokenKey(hash string) string                { return dirToken + hash }
func authorityKey(region, slot string) string    { return dirAuthority + region + "/" + slot }
func issuedKey(serial string) string             { return dirIssued + serial }
func operatorKey(name string) string             { return dirOperator + name }
func controllerKey(name string) string           { return dirController + name }
func policyKey(origin, ns, name string) string {
	return federationv1.PolicyKey(federation.PolicyID{Origin: origin, Namespace: ns, Name: name}).String()
}
func vipAddrKey(cluster, addr string) string { return dirVipAddr + cluster + "/" + addr }
func denyKey(c federation.ClusterID, g int64) string {
	return federationv1.DenialKey(c, g).String()
}

// ownDirs are the folders below which a session of c writes.
func ownDirs(c federation.ClusterID) []string {
	return []string{
		dirExport + string(c) + "/", dirReady + string(c) + "/",
		dirPolicy + string(c) + "/", dirFinding + string(c) + "/",
	}
}

// memberDirs are the folders that go with a deregistered cluster.
func memberDirs(c federation.ClusterID) []string {
	return append(ownDirs(c), dirVip+string(c)+"/", dirVipAddr+string(c)+"/")
}

// dirOf is the first part of a key, with its slash; the whole of it for head,
// meta and bundle.
func dirOf(key string) string {
	if i := strings.IndexByte(key, '/'); i >= 0 {
		return key[:i+1]
	}
	return key
}

// isRecord reports whether the value under key is a Record.
func isRecord(key string) bool { return isCatalog(key) || dirOf(key) == dirFinding }

// isCatalog reports whether key belongs to the catalog, so that a transaction
// that changes it must put head.
func isCatalog(key string) bool {
	switch dirOf(key) {
	case dirCluster, dirExport, dirReady, dirPolicy, dirLiveness, dirDrain, dirVip, dirDeny, keyBundle:
		return true
	}
	return false
}

// checkPart reports whether s can be one part of a key: no control characters,
// no slash, and short enough that a key stays below 1 KiB or so.
func checkPart(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] == 0x7f || s[i] == '/' {
			return false
		}
	}
	return true
}

// vipAddr is the key that holds the address of the vip r, stored under key; empty
// where r is no vip.
func vipAddr(key string, r *federationv1.Record) string {
	v := r.GetVip()
	if v == nil || dirOf(key) != dirVip {
		return ""
	}
	cluster, _, _ := strings.Cut(strings.TrimPrefix(key, dirVip), "/")
	return vipAddrKey(cluster, v.GetAddress())
}

// serviceOf is the service in export/C/NS/SVC, ready/..., vip/...
func serviceOf(key string) federation.ServiceID {
	parts := strings.SplitN(key, "/", 4)
	if len(parts) != 4 {
		return federation.ServiceID{}
	}
	return federation.ServiceID{Namespace: parts[2], Name: parts[3]}
}
