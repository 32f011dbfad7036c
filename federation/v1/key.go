package federationv1

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/weftmesh/weft/federation"
)

// KeyKind is the first part of a record's key: it says which body the record has.
type KeyKind string

// The kinds of records. All but KindFinding make up the catalog.
const (
	KindMember    KeyKind = "cluster"
	KindExport    KeyKind = "export"
	KindReadiness KeyKind = "ready"
	KindPolicy    KeyKind = "policy"
	KindSilence   KeyKind = "liveness"
	KindDrain     KeyKind = "drain"
	KindVIP       KeyKind = "vip"
	KindDenial    KeyKind = "deny"
	KindBundle    KeyKind = "bundle"
	KindFinding   KeyKind = "finding"
)

// Key names one record. Only the fields that its kind needs are set, so keys
// compare with ==:
//
//	cluster/C  export/C/NS/SVC  ready/C/NS/SVC  policy/ORIGIN/NS/NAME
//	liveness/C  drain/C  vip/C/NS/SVC  deny/C/GENERATION  bundle
//	finding/C/CODE/SUBJECT
//
// SUBJECT is KIND/NAME, with each byte of NAME outside a-z A-Z 0-9 - _ . : @ *
// written as %XX. A record has exactly one key, and a key exactly one spelling.
type Key struct {
	Kind       KeyKind
	Cluster    federation.ClusterID // every kind but policy and bundle
	Service    federation.ServiceID // export, ready, vip
	Policy     federation.PolicyID  // policy
	Generation int64                // deny
	Code       federation.Code      // finding
	Subject    federation.Ref       // finding
}

// MemberKey is the key of a cluster's registration.
func MemberKey(c federation.ClusterID) Key { return Key{Kind: KindMember, Cluster: c} }

// ExportKey is the key of an export.
func ExportKey(e federation.ExportID) Key {
	return Key{Kind: KindExport, Cluster: e.Cluster, Service: e.Service}
}

// ReadinessKey is the key of an export's readiness.
func ReadinessKey(e federation.ExportID) Key {
	return Key{Kind: KindReadiness, Cluster: e.Cluster, Service: e.Service}
}

// PolicyKey is the key of a policy.
func PolicyKey(p federation.PolicyID) Key { return Key{Kind: KindPolicy, Policy: p} }

// SilenceKey is the key of a cluster's silence.
func SilenceKey(c federation.ClusterID) Key { return Key{Kind: KindSilence, Cluster: c} }

// DrainKey is the key of a cluster's drain.
func DrainKey(c federation.ClusterID) Key { return Key{Kind: KindDrain, Cluster: c} }

// VIPKey is the key of the clusterset address of a service in one cluster.
func VIPKey(c federation.ClusterID, s federation.ServiceID) Key {
	return Key{Kind: KindVIP, Cluster: c, Service: s}
}

// DenialKey is the key of the denial of one generation of a cluster.
func DenialKey(c federation.ClusterID, generation int64) Key {
	return Key{Kind: KindDenial, Cluster: c, Generation: generation}
}

// BundleKey is the key of the trust bundle.
func BundleKey() Key { return Key{Kind: KindBundle} }

// FindingKey is the key of a finding that cluster c reports.
func FindingKey(c federation.ClusterID, code federation.Code, subject federation.Ref) Key {
	return Key{Kind: KindFinding, Cluster: c, Code: code, Subject: subject}
}

// Export is the export that an export or ready key is about.
func (k Key) Export() federation.ExportID {
	return federation.ExportID{Cluster: k.Cluster, Service: k.Service}
}

// String is the key as it stands in records and, below the trust domain's
// prefix, in etcd.
func (k Key) String() string {
	switch k.Kind {
	case KindBundle:
		return string(KindBundle)
	case KindMember, KindSilence, KindDrain:
		return string(k.Kind) + "/" + string(k.Cluster)
	case KindExport, KindReadiness, KindVIP:
		return string(k.Kind) + "/" + string(k.Cluster) + "/" + k.Service.String()
	case KindPolicy:
		return string(k.Kind) + "/" + k.Policy.Origin + "/" + k.Policy.Namespace + "/" + k.Policy.Name
	case KindDenial:
		return string(k.Kind) + "/" + string(k.Cluster) + "/" + strconv.FormatInt(k.Generation, 10)
	case KindFinding:
		return string(k.Kind) + "/" + string(k.Cluster) + "/" + string(k.Code) + "/" + k.Subject.Kind + "/" + escape(k.Subject.Name)
	default:
		return "invalid/" + string(k.Kind)
	}
}

// ParseKey reads what String writes, and nothing else: every part is checked
// by the rule for its kind, so no key holds "..", an empty part, a slash too
// many or a second spelling.
func ParseKey(s string) (Key, error) {
	k, err := parseKey(s)
	if err == nil && k.String() != s {
		err = fmt.Errorf("write it as %q", k)
	}
	if err != nil {
		return Key{}, fmt.Errorf("record key %q: %w", clip(s), err)
	}
	return k, nil
}

var errKeyParts = errors.New("wrong number of parts for its kind")

func parseKey(s string) (Key, error) {
	if len(s) > maxKey {
		return Key{}, fmt.Errorf("longer than %d bytes", maxKey)
	}
	parts := strings.Split(s, "/")
	k := Key{Kind: KeyKind(parts[0])}
	want, ok := map[KeyKind]int{
		KindBundle: 1, KindMember: 2, KindSilence: 2, KindDrain: 2,
		KindExport: 4, KindReadiness: 4, KindVIP: 4, KindPolicy: 4,
		KindDenial: 3, KindFinding: 5,
	}[k.Kind]
	if !ok {
		return Key{}, errors.New("no record has such a key")
	}
	if len(parts) != want {
		return Key{}, errKeyParts
	}
	var err error
	switch k.Kind {
	case KindBundle:
		return k, nil
	case KindPolicy:
		k.Policy, err = parsePolicyID(parts[1], parts[2], parts[3])
		return k, err
	}
	if k.Cluster, err = federation.ParseClusterID(parts[1]); err != nil {
		return Key{}, err
	}
	switch k.Kind {
	case KindExport, KindReadiness, KindVIP:
		k.Service, err = federation.ParseServiceID(parts[2] + "/" + parts[3])
	case KindDenial:
		k.Generation, err = strconv.ParseInt(parts[2], 10, 64)
		if err != nil || k.Generation < 0 {
			err = fmt.Errorf("generation %q: must be a number from 0 up", parts[2])
		}
	case KindFinding:
		k.Code, err = federation.ParseCode(parts[2])
		if err != nil {
			return Key{}, err
		}
		var name string
		if name, err = unescape(parts[4]); err != nil {
			return Key{}, err
		}
		k.Subject, err = federation.ParseRef(parts[3] + " " + name)
	}
	return k, err
}

func parsePolicyID(origin, namespace, name string) (federation.PolicyID, error) {
	if origin != federation.OriginController {
		if _, err := federation.ParseClusterID(origin); err != nil {
			return federation.PolicyID{}, fmt.Errorf("origin: must be %q or a cluster: %w", federation.OriginController, err)
		}
	}
	if _, err := federation.ParseServiceID(namespace + "/" + name); err != nil {
		return federation.PolicyID{}, fmt.Errorf("policy %q: namespace and name each must be a DNS label", clip(namespace+"/"+name))
	}
	return federation.PolicyID{Origin: origin, Namespace: namespace, Name: name}, nil
}

// escape writes a subject's name as one part of a key. A name of dots alone
// would be a path trick to whoever maps keys to files, so its dots are escaped
// too.
func escape(name string) string {
	dots := strings.Trim(name, ".") == ""
	var b strings.Builder
	for i := range len(name) {
		c := name[i]
		if plain(c) && (c != '.' || !dots) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.:@*", c) >= 0
}

func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", fmt.Errorf("subject %q: %% must be followed by two hexadecimal digits", clip(s))
		}
		n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", fmt.Errorf("subject %q: %% must be followed by two hexadecimal digits", clip(s))
		}
		b.WriteByte(byte(n))
		i += 2
	}
	return b.String(), checkText("subject", b.String(), maxName)
}
