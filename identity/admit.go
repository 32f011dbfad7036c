package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weftmesh/weft/federation"
)

// maxCSR bounds a CSR before it is parsed; one for a P-256 key has about 250
// bytes, and clients that ask for many names are not ours.
const maxCSR = 16 << 10

// Asker is who asks for an SVID: a peer that TLS has verified, or the holder
// of a join token that the store has accepted for a cluster. Make one with
// PeerAsks or TokenAsks; the zero value is nobody.
type Asker struct {
	peer         Subject
	tokenCluster federation.ClusterID
}

// PeerAsks is a request over a connection of a verified peer.
func PeerAsks(p Peer) Asker { return Asker{peer: p.Subject} }

// TokenAsks is a request with a valid join token for the cluster.
func TokenAsks(cluster federation.ClusterID) Asker { return Asker{tokenCluster: cluster} }

// String is the asker's SPIFFE ID, or says that it is a token's holder.
func (a Asker) String() string {
	switch {
	case a.tokenCluster != "":
		return "the holder of a join token for cluster " + string(a.tokenCluster)
	case !a.peer.ID.IsZero():
		return a.peer.ID.String()
	default:
		return "nobody"
	}
}

// Admitted is an identity and the public key that may hold it: what an
// authority signs, and all that it signs.
type Admitted struct {
	ID  spiffeid.ID
	Key *ecdsa.PublicKey
}

// RefusalReason says why a request was not admitted.
type RefusalReason uint8

// The reasons, in the order in which they are looked for.
const (
	RefusedAsker       RefusalReason = iota + 1 // this asker gets no mesh identity at all
	RefusedTrustDomain                          // the wanted identity is of another trust domain
	RefusedIdentity                             // the wanted identity is not of the scheme
	RefusedNotYours                             // the wanted identity is not the asker's to have
	RefusedCSR                                  // the CSR cannot be read or proves no possession
	RefusedKey                                  // the key is not ECDSA P-256
)

var refusalNames = [...]string{"", "asker", "trust-domain", "identity", "not-yours", "csr", "key"}

func (r RefusalReason) String() string {
	if r > 0 && int(r) < len(refusalNames) {
		return refusalNames[r]
	}
	return fmt.Sprintf("refusal(%d)", uint8(r))
}

// Refusal is the error of a request that is not admitted.
type Refusal struct {
	Reason RefusalReason
	Asker  string
	Want   string // the wanted SPIFFE ID, or empty
	Why    string
}

func (r *Refusal) Error() string {
	if r.Want == "" {
		return fmt.Sprintf("identity: %s is refused an SVID: %s", r.Asker, r.Why)
	}
	return fmt.Sprintf("identity: %s is refused an SVID for %s: %s", r.Asker, r.Want, r.Why)
}

// Admit decides whether an asker may have an SVID for the identity want, with
// the key of a DER-encoded CSR. A zero want means the asker's own identity (a
// token's: its cluster's agent). Of the CSR only the public key is used, and
// its own signature, which proves that the asker holds the private one: names,
// extensions and attributes in it are ignored.
//
// An agent may have every identity under its own cluster; controllers,
// gateways and workloads only their own; operators none, since they are no
// peers of the mesh. Whether the asker's cluster is denied is for the caller
// to have checked: TLS does on every handshake. Errors are *Refusal.
func Admit(td spiffeid.TrustDomain, asker Asker, want spiffeid.ID, csr []byte) (Admitted, error) {
	refuse := func(reason RefusalReason, format string, args ...any) (Admitted, error) {
		r := &Refusal{Reason: reason, Asker: asker.String(), Why: fmt.Sprintf(format, args...)}
		if !want.IsZero() {
			r.Want = want.String()
		}
		return Admitted{}, r
	}

	own := asker.peer.ID
	switch {
	case asker.tokenCluster != "":
		var err error
		if own, err = AgentID(td, asker.tokenCluster); err != nil {
			return refuse(RefusedAsker, "%v", err)
		}
	case own.IsZero():
		return refuse(RefusedAsker, "it has shown neither an SVID nor a join token")
	case own.TrustDomain() != td:
		return refuse(RefusedAsker, "it is of another trust domain than %s", td)
	case asker.peer.Role == RoleOperator:
		return refuse(RefusedAsker, "operators are people, not peers of the mesh; their credentials come from the operators' authority")
	}
	if want.IsZero() {
		want = own
	}
	if want.TrustDomain() != td {
		return refuse(RefusedTrustDomain, "only identities of %s are signed here", td)
	}
	subject, err := ParseID(want)
	if err != nil {
		return refuse(RefusedIdentity, "%v", err)
	}
	if want != own {
		switch {
		case asker.tokenCluster != "":
			return refuse(RefusedNotYours, "a join token is good for %s only", own)
		case asker.peer.Role != RoleAgent:
			return refuse(RefusedNotYours, "a %s may have its own identity only", asker.peer.Role)
		case subject.Cluster == "" || subject.Cluster != asker.peer.Cluster:
			return refuse(RefusedNotYours, "an agent may ask for identities under its own cluster %s only", asker.peer.Cluster)
		}
	}

	key, reason, err := keyOfCSR(csr)
	if err != nil {
		return refuse(reason, "%v", err)
	}
	return Admitted{ID: want, Key: key}, nil
}

// AdmitOperator takes the key of an operator's CSR, for a name that the
// caller is entitled to give out. Errors are *Refusal.
func AdmitOperator(td spiffeid.TrustDomain, name string, csr []byte) (Admitted, error) {
	id, err := OperatorID(td, name)
	if err != nil {
		return Admitted{}, &Refusal{Reason: RefusedIdentity, Asker: "operator " + name, Why: err.Error()}
	}
	key, reason, err := keyOfCSR(csr)
	if err != nil {
		return Admitted{}, &Refusal{Reason: reason, Asker: "operator " + name, Want: id.String(), Why: err.Error()}
	}
	return Admitted{ID: id, Key: key}, nil
}

func keyOfCSR(csr []byte) (*ecdsa.PublicKey, RefusalReason, error) {
	switch {
	case len(csr) == 0:
		return nil, RefusedCSR, errors.New("there is no CSR")
	case len(csr) > maxCSR:
		return nil, RefusedCSR, fmt.Errorf("the CSR has %d bytes, at most %d are read", len(csr), maxCSR)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, RefusedCSR, fmt.Errorf("the CSR cannot be parsed (PKCS #10 in DER is expected): %w", err)
	}
	key, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, RefusedKey, fmt.Errorf("its key is %s; Weft uses ECDSA P-256 only", request.PublicKeyAlgorithm)
	}
	if err := checkLeafKey(key); err != nil {
		return nil, RefusedKey, err
	}
	if err := request.CheckSignature(); err != nil {
		return nil, RefusedCSR, fmt.Errorf("the CSR is not signed by its own key, so it proves no possession of it: %w", err)
	}
	return key, 0, nil
}

func checkLeafKey(key *ecdsa.PublicKey) error {
	switch {
	case key == nil || key.Curve == nil:
		return errors.New("there is no public key")
	case key.Curve != elliptic.P256():
		return fmt.Errorf("its key is ECDSA %s; Weft uses ECDSA P-256 only", key.Curve.Params().Name)
	}
	if _, err := key.ECDH(); err != nil {
		return fmt.Errorf("its key is no point of P-256: %w", err)
	}
	return nil
}
