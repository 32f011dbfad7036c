package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/weftmesh/weft/federation/access"
	"github.com/weftmesh/weft/federation/clock"
	v1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// dialer opens a connection to the controllers of a context.
type dialer func(access.Context) (*grpc.ClientConn, error)

func (a *app) contextsPath() (string, error) {
	if a.contextsFile != "" {
		return a.contextsFile, nil
	}
	return access.DefaultPath()
}

// call runs one exchange with the controller within the app's timeout.
func (a *app) call(ctx context.Context, do func(context.Context, v1.AdminClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	return a.stream(ctx, do)
}

// stream runs an exchange that lasts until ctx ends or do returns.
func (a *app) stream(ctx context.Context, do func(context.Context, v1.AdminClient) error) error {
	path, err := a.contextsPath()
	if err != nil {
		return err
	}
	config, err := access.Load(path)
	if err != nil {
		return err
	}
	c, err := config.Context(a.context)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	conn, err := a.dial(*c)
	if err != nil {
		return fmt.Errorf("context %q of %s: %w", c.Name, path, err)
	}
	defer conn.Close()
	client := v1.NewAdminClient(conn)
	if err := do(ctx, client); err != nil {
		return a.unreachable(ctx, *c, err)
	}
	if err := a.renew(ctx, client, config, c, path); err != nil {
		a.say("warning: the credential of context %q could not be renewed: %s", c.Name, message(err))
	}
	return nil
}

// unreachable explains an error that comes from the connection rather than
// from the controller.
func (a *app) unreachable(ctx context.Context, c access.Context, err error) error {
	s, ok := status.FromError(err)
	if !ok || s.Code() != codes.Unavailable && s.Code() != codes.DeadlineExceeded {
		return err
	}
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return context.Canceled
	}
	return fmt.Errorf("no controller of context %q answers (tried %s): %s; is weft-controller running there? Traffic goes on without it",
		c.Name, strings.Join(c.Controllers, ", "), s.Message())
}

// dialController connects to any of the context's controllers, each of which
// must prove to be a controller of the trust domain.
func dialController(c access.Context) (*grpc.ClientConn, error) {
	if len(c.Controllers) == 0 {
		return nil, errors.New("it names no controller")
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return nil, err
	}
	roots, err := identity.ParseBundlePEM(td, 1, []byte(c.CA))
	if err != nil {
		return nil, fmt.Errorf("its ca: %w", err)
	}
	svid, err := x509svid.Parse([]byte(c.Certificate), []byte(c.Key))
	if err != nil {
		return nil, fmt.Errorf("its certificate or key: %w", err)
	}
	if until := svid.Certificates[0].NotAfter; time.Now().After(until) {
		return nil, fmt.Errorf("its certificate expired on %s: have a controller write another with 'weft-controller --admin-credential'", until.Format(time.DateOnly))
	}
	verifier := identity.NewVerifier(identity.VerifierConfig{Mesh: roots, Clock: clock.Real()})
	config := verifier.Client(identity.ClientConfig{SVID: svid, Authorize: identity.AllowRole(identity.RoleController)})

	builder := manual.NewBuilderWithScheme("weft")
	var state resolver.State
	for _, addr := range c.Controllers {
		state.Endpoints = append(state.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: addr}}})
	}
	builder.InitialState(state)
	return grpc.NewClient("weft:///controllers",
		grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)
}

// renew replaces a credential in the second half of its life, so that a person
// who uses the CLI is never locked out.
func (a *app) renew(ctx context.Context, client v1.AdminClient, config *access.Config, c *access.Context, path string) error {
	block, _ := pem.Decode([]byte(c.Certificate))
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	if half := cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2); time.Now().Before(half) {
		return nil
	}
	key, err := identity.NewKey()
	if err != nil {
		return err
	}
	csr, err := identity.NewCSR(key)
	if err != nil {
		return err
	}
	r, err := client.RenewCredential(ctx, &v1.RenewCredentialRequest{Csr: csr})
	if err != nil {
		return err
	}
	chain, err := identity.ParseRawChain(r.GetChain().GetCertificates())
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	c.Certificate = string(identity.EncodePEM(chain))
	c.Key = access.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	return config.Save(path)
}
