package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// Files of the state folder beside the last-good file.
const (
	enrolmentName = "enrolment.json" // what the first contact gave
	svidName      = "svid.sealed"    // the agent's SVID and key
	sealName      = "seal.key"       // what seals it
)

// grpcALPN is what gRPC speaks inside TLS.
const grpcALPN = "h2"

// enrolmentTry bounds one attempt to reach one controller.
const enrolmentTry = 10 * time.Second

// enrolment is what an agent knows of its mesh from its first contact on.
type enrolment struct {
	TrustDomain string               `json:"trustDomain"`
	Cluster     federation.ClusterID `json:"cluster"`
	Controllers []string             `json:"controllers,omitempty"` // as the controller named them
}

func (e *enrolment) save(dir string) error {
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, enrolmentName), append(b, '\n'))
}

// loadEnrolment is (nil, nil) where there is none yet.
func loadEnrolment(dir string) (*enrolment, error) {
	path := filepath.Join(dir, enrolmentName)
	b, err := readRegular(path, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	e := new(enrolment)
	if err := json.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("%s does not parse: %w: remove the state folder and enrol again with a new join token", path, err)
	}
	if _, err := federation.ParseClusterID(string(e.Cluster)); err != nil {
		return nil, fmt.Errorf("%s: %w: remove the state folder and enrol again with a new join token", path, err)
	}
	return e, nil
}

// who is the agent's identity once it has one.
type who struct {
	enrolment
	source *identity.Source
	// member is the registration as the enrolment gave it; nil after a restart.
	member *federationv1.Member
}

// identify restores the identity from the state folder or, where there is
// none, enrols with the join token. It waits for a controller for as long as
// it takes; what no waiting mends is an error.
func (a *Agent) identify(ctx context.Context) (*who, error) {
	e, err := loadEnrolment(a.config.StateDir)
	if err != nil {
		return nil, err
	}
	if e != nil {
		if token := a.config.Join; !token.IsZero() && token.Cluster() != e.Cluster {
			return nil, fmt.Errorf("the state folder %s is of cluster %s, the join token is for %s: give each cluster's agent its own --state-dir", a.config.StateDir, e.Cluster, token.Cluster())
		}
		source, err := a.newSource(e)
		if err != nil {
			return nil, err
		}
		err = source.Restore()
		if err == nil {
			if _, svidErr := source.GetX509SVID(); svidErr == nil || errors.Is(svidErr, identity.ErrExpired) {
				return &who{enrolment: *e, source: source}, nil
			}
			err = identity.ErrNoSVID
		}
		if a.config.Join.IsZero() {
			return nil, fmt.Errorf("the agent of %s has no usable identity: %w: enrol again with --join and a new token", e.Cluster, err)
		}
		a.log.Warn("the stored identity cannot be used: enrolling anew", "error", err)
	}
	if a.config.Join.IsZero() {
		return nil, fmt.Errorf("the state folder %s holds no identity: start once with --join TOKEN --ca-hash HASH --controller HOST:PORT, as `weft cluster register` prints them", a.config.StateDir)
	}
	for failures := 0; ; failures++ {
		var w *who
		for _, address := range a.config.Controllers {
			if w, err = a.enrol(ctx, address); err == nil {
				return w, nil
			}
			if lasting := (*lastingError)(nil); errors.As(err, &lasting) {
				return nil, err
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
		}
		wait := retryAfter(failures)
		a.log.Warn("cannot enrol yet", "controllers", a.config.Controllers, "error", err, "retryIn", wait.Round(time.Millisecond))
		if err := clock.Sleep(ctx, a.clock, wait); err != nil {
			return nil, err
		}
	}
}

// lastingError is one that trying again does not mend.
type lastingError struct{ error }

func (e *lastingError) Unwrap() error { return e.error }

// enrol redeems the join token at one controller.
func (a *Agent) enrol(ctx context.Context, address string) (*who, error) {
	ctx, cancel := withTimeout(ctx, a.clock, enrolmentTry)
	defer cancel()
	td, err := a.firstContact(ctx, address)
	if err != nil {
		return nil, err
	}
	e := enrolment{TrustDomain: td.Name(), Cluster: a.config.Join.Cluster()}
	source, err := a.newSource(&e)
	if err != nil {
		return nil, &lastingError{err}
	}
	// A key whose enrolment was cut short is on the disk: the token is good for
	// that key only.
	if err := source.Restore(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("what an earlier enrolment left cannot be used", "error", err)
	}
	var response *federationv1.EnrollResponse
	err = source.Enrol(ctx, identity.IssuerFunc(func(ctx context.Context, csr []byte) (identity.Issued, error) {
		config := identity.PinnedClient(a.config.CAHash, a.clock, nil, grpcALPN)
		conn, err := dialController(address, credentials.NewTLS(config))
		if err != nil {
			return identity.Issued{}, err
		}
		defer conn.Close()
		response, err = federationv1.NewEnrollClient(conn).Enroll(ctx, &federationv1.EnrollRequest{
			Token: a.config.Join.Reveal(), Csr: csr, AgentVersion: a.config.Version,
		})
		if err != nil {
			return identity.Issued{}, enrolError(address, err)
		}
		if response.GetTrustDomain() != e.TrustDomain || response.GetCluster() != string(e.Cluster) {
			return identity.Issued{}, fmt.Errorf("controller %s enrolled %q in %q, not %q in %q", address,
				response.GetCluster(), response.GetTrustDomain(), e.Cluster, e.TrustDomain)
		}
		return issuedFrom(td, response.GetChain(), response.GetBundle())
	}))
	if err != nil {
		return nil, err
	}
	e.Controllers = response.GetControllers()
	if err := e.save(a.config.StateDir); err != nil {
		return nil, &lastingError{err}
	}
	a.log.Info("enrolled", "cluster", e.Cluster, "trustDomain", e.TrustDomain, "controller", address)
	return &who{enrolment: e, source: source, member: response.GetMember()}, nil
}

// firstContact checks the pin and learns the trust domain by it.
func (a *Agent) firstContact(ctx context.Context, address string) (spiffeid.TrustDomain, error) {
	var td spiffeid.TrustDomain
	config := identity.PinnedClient(a.config.CAHash, a.clock, func(p identity.Pinned) {
		td = p.Controller.TrustDomain()
	}, grpcALPN)
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return td, err
	}
	defer conn.Close()
	t := tls.Client(conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		if pin := (*identity.PinError)(nil); errors.As(err, &pin) {
			return td, &lastingError{fmt.Errorf("controller %s is not the one that the join token is for: %w: take --ca-hash from the output of `weft cluster register`", address, err)}
		}
		return td, fmt.Errorf("controller %s: %w", address, err)
	}
	return td, nil
}

// enrolError says what became of an enrolment, and which refusals last.
func enrolError(address string, err error) error {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied, codes.NotFound, codes.InvalidArgument, codes.FailedPrecondition:
		return &lastingError{fmt.Errorf("controller %s refused the join token: %s: a token works once, for 15 minutes: `weft cluster register` makes a new one", address, status.Convert(err).Message())}
	}
	return fmt.Errorf("controller %s: %w", address, err)
}

// newSource makes the source of the agent's SVIDs, sealed in the state folder
// and renewed over the link.
func (a *Agent) newSource(e *enrolment) (*identity.Source, error) {
	td, err := spiffeid.TrustDomainFromString(e.TrustDomain)
	if err != nil {
		return nil, err
	}
	id, err := identity.AgentID(td, e.Cluster)
	if err != nil {
		return nil, err
	}
	kek, err := identity.LoadOrCreateKEK(filepath.Join(a.config.StateDir, sealName))
	if err != nil {
		return nil, err
	}
	return identity.NewSource(identity.SourceConfig{
		ID:      id,
		Clock:   a.clock,
		Issuer:  identity.IssuerFunc(a.renew),
		State:   identity.NewStateFile(filepath.Join(a.config.StateDir, svidName), kek),
		Log:     a.log,
		Metrics: a.config.Metrics,
	})
}

// renew gets the agent's own next SVID: over the open session, or, when the
// present one has expired, by proof of its key.
func (a *Agent) renew(ctx context.Context, csr []byte) (identity.Issued, error) {
	id := a.who.source.ID()
	if _, err := a.who.source.GetX509SVID(); errors.Is(err, identity.ErrExpired) {
		return a.renewExpired(ctx, csr)
	}
	return a.issue(ctx, id, csr)
}

// issue has the controller sign a key for an identity under the own cluster.
func (a *Agent) issue(ctx context.Context, id spiffeid.ID, csr []byte) (identity.Issued, error) {
	conn, err := a.link.connection()
	if err != nil {
		return identity.Issued{}, err
	}
	r, err := federationv1.NewIssueClient(conn).Issue(ctx, &federationv1.IssueRequest{Csr: csr, SpiffeId: id.String()})
	if err != nil {
		return identity.Issued{}, err
	}
	return issuedFrom(id.TrustDomain(), r.GetChain(), r.GetBundle())
}

// renewExpired goes through the controllers without a client certificate.
func (a *Agent) renewExpired(ctx context.Context, csr []byte) (identity.Issued, error) {
	proof, err := a.who.source.Prove(csr)
	if err != nil {
		return identity.Issued{}, err
	}
	creds := credentials.NewTLS(a.verifier.Client(identity.ClientConfig{
		Authorize: identity.AllowRole(identity.RoleController),
	}))
	for _, address := range a.controllers() {
		var conn *grpc.ClientConn
		if conn, err = dialController(address, creds); err != nil {
			continue
		}
		var r *federationv1.RenewResponse
		r, err = federationv1.NewEnrollClient(conn).Renew(ctx, &federationv1.RenewRequest{
			Cluster: string(a.who.Cluster), Csr: csr, Chain: proof.Chain, Signature: proof.Signature,
		})
		_ = conn.Close()
		if err == nil {
			return issuedFrom(a.who.source.ID().TrustDomain(), r.GetChain(), r.GetBundle())
		}
	}
	return identity.Issued{}, err
}

// controllers are those of the configuration, then those that the controller
// itself named at the enrolment.
func (a *Agent) controllers() []string {
	list := slices.Clone(a.config.Controllers)
	for _, c := range a.who.Controllers {
		if !slices.Contains(list, c) {
			list = append(list, c)
		}
	}
	return list
}

// issuedFrom reads a chain and a bundle from the wire.
func issuedFrom(td spiffeid.TrustDomain, chain *federationv1.Chain, bundle *federationv1.Bundle) (identity.Issued, error) {
	certs, err := identity.ParseRawChain(chain.GetCertificates())
	if err != nil {
		return identity.Issued{}, err
	}
	issued := identity.Issued{Chain: certs}
	if bundle != nil {
		if issued.Bundle, err = bundleFrom(td, bundle); err != nil {
			return identity.Issued{}, err
		}
	}
	return issued, nil
}

// bundleFrom reads a trust bundle from the wire.
func bundleFrom(td spiffeid.TrustDomain, m *federationv1.Bundle) (*identity.Bundle, error) {
	b, err := m.Decode()
	if err != nil {
		return nil, err
	}
	return newBundle(td, b)
}

func newBundle(td spiffeid.TrustDomain, b federation.Bundle) (*identity.Bundle, error) {
	if b.TrustDomain != td {
		return nil, fmt.Errorf("the bundle is of trust domain %q, not %q", b.TrustDomain, td)
	}
	roots := make([]*x509.Certificate, len(b.Roots))
	for i, der := range b.Roots {
		var err error
		if roots[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("root %d of the bundle: %w", i+1, err)
		}
	}
	return identity.NewBundle(td, b.Sequence, roots)
}
