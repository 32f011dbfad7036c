package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// AuthorityRecord is an authority as it is stored: its certificates in clear,
// for everybody who publishes or verifies, and its key sealed. It marshals to
// JSON.
type AuthorityRecord struct {
	Version     int    `json:"version"` // 1
	Kind        string `json:"kind"`
	TrustDomain string `json:"trustDomain"`
	Region      string `json:"region,omitempty"`
	Chain       string `json:"chain"`     // PEM, own certificate first, root last
	SealedKey   []byte `json:"sealedKey"` // PKCS #8 under the KEK, base64 in JSON
}

const recordVersion = 1

// Seal makes the record of a, to be stored under the given path (with its slot
// or epoch): the key opens for that path and that certificate only.
func (a *Authority) Seal(kek *KEK, path string) (AuthorityRecord, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return AuthorityRecord{}, fmt.Errorf("identity: seal the %s: %w", a, err)
	}
	defer clear(der)
	sealed, err := kek.Seal(sealName(path, a.chain[0]), der)
	if err != nil {
		return AuthorityRecord{}, err
	}
	return AuthorityRecord{
		Version:     recordVersion,
		Kind:        a.kind.String(),
		TrustDomain: a.td.Name(),
		Region:      a.region,
		Chain:       string(EncodePEM(a.chain)),
		SealedKey:   sealed,
	}, nil
}

// Marshal is the record's stored form.
func (r AuthorityRecord) Marshal() ([]byte, error) { return json.Marshal(r) }

// ParseAuthorityRecord reads a stored record. Nothing in it is trusted yet.
func ParseAuthorityRecord(data []byte) (AuthorityRecord, error) {
	var r AuthorityRecord
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return AuthorityRecord{}, fmt.Errorf("identity: parse an authority's record: %w", err)
	}
	if r.Version != recordVersion {
		return AuthorityRecord{}, fmt.Errorf("identity: an authority's record has version %d, this program knows %d: upgrade it", r.Version, recordVersion)
	}
	return r, nil
}

// Certificates are the record's, own first and root last: what a replica
// without the key needs to publish the authority.
func (r AuthorityRecord) Certificates() ([]*x509.Certificate, error) {
	chain, err := DecodePEM([]byte(r.Chain))
	if err != nil {
		return nil, fmt.Errorf("identity: an authority's record: %w", err)
	}
	return chain, nil
}

// OpenAuthority opens a record that was sealed for path. It fails with
// ErrWrongKey for another KEK, and ErrSealBroken where record, path,
// certificate and key do not belong together.
func OpenAuthority(r AuthorityRecord, kek *KEK, path string) (*Authority, error) {
	chain, err := r.Certificates()
	if err != nil {
		return nil, err
	}
	a := &Authority{region: r.Region, chain: chain}
	for kind, name := range kindNames {
		if name != "" && name == r.Kind {
			a.kind = AuthorityKind(kind)
		}
	}
	if a.kind == 0 {
		return nil, fmt.Errorf("identity: authority %s is of unknown kind %q", path, r.Kind)
	}
	if a.td, err = spiffeid.TrustDomainFromString(r.TrustDomain); err != nil {
		return nil, fmt.Errorf("identity: authority %s: %w", path, err)
	}
	der, err := kek.Open(sealName(path, chain[0]), r.SealedKey)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("identity: authority %s: its key: %w", path, err)
	}
	private, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("identity: authority %s: its key is a %T, want ECDSA", path, key)
	}
	a.key = private
	if err := a.check(); err != nil {
		return nil, fmt.Errorf("identity: authority %s: %w: %w", path, err, ErrSealBroken)
	}
	return a, nil
}

// check says whether the parts of an opened authority fit each other. The
// record's clear fields are not under the seal, but everything that is derived
// from them is compared with the certificate, which is.
func (a *Authority) check() error {
	own := a.chain[0]
	if !a.key.Public().(*ecdsa.PublicKey).Equal(own.PublicKey) {
		return errors.New("its key is not its certificate's")
	}
	if !own.IsCA || len(own.URIs) != 1 || own.URIs[0].String() != a.td.IDString() {
		return errors.New("its certificate is not an authority's of its trust domain")
	}
	region := ""
	if ou := own.Subject.OrganizationalUnit; len(ou) == 1 {
		region = ou[0]
	}
	want := 1
	if a.kind == KindRegion {
		want = 2
		if err := own.CheckSignatureFrom(a.chain[len(a.chain)-1]); err != nil {
			return fmt.Errorf("its root did not sign it: %w", err)
		}
	}
	if region != a.region || (a.kind == KindRegion) != (region != "") || len(a.chain) != want {
		return fmt.Errorf("its certificate is not a %s's", a.kind)
	}
	if constrained := len(own.PermittedURIDomains) > 0; constrained != (a.kind != KindRoot) {
		return fmt.Errorf("its certificate is not a %s's", a.kind)
	}
	return nil
}

func sealName(path string, cert *x509.Certificate) string {
	return fmt.Sprintf("%s\x00%x", path, sha256.Sum256(cert.Raw))
}

const pemCertificate = "CERTIFICATE"

// EncodePEM writes certificates one after the other.
func EncodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: c.Raw})...)
	}
	return out
}

// DecodePEM reads one certificate or more, and nothing else.
func DecodePEM(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("identity: what follows the certificates is not PEM")
		}
		if block.Type != pemCertificate {
			return nil, fmt.Errorf("identity: a PEM block of type %q among certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("identity: parse certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("identity: no certificate in PEM")
	}
	return certs, nil
}

// RawChain is a chain's certificates in DER: how chains travel.
func RawChain(chain []*x509.Certificate) [][]byte {
	raw := make([][]byte, len(chain))
	for i, c := range chain {
		raw[i] = c.Raw
	}
	return raw
}

// maxChain bounds the certificates of one chain: a leaf, its authorities and
// a root are three.
const maxChain = 8

// ParseRawChain is the reverse of RawChain.
func ParseRawChain(raw [][]byte) ([]*x509.Certificate, error) {
	if len(raw) == 0 || len(raw) > maxChain {
		return nil, fmt.Errorf("identity: a chain has %d certificates, want 1 to %d", len(raw), maxChain)
	}
	chain := make([]*x509.Certificate, len(raw))
	for i, der := range raw {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("identity: parse certificate %d of a chain: %w", i+1, err)
		}
		chain[i] = cert
	}
	return chain, nil
}
