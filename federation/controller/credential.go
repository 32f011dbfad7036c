package controller

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/weftmesh/weft/federation/access"
	"github.com/weftmesh/weft/federation/store"
	"github.com/weftmesh/weft/identity"
)

// firstOperator is the person that a new mesh begins with.
const firstOperator = "admin"

// firstCredential gives a new mesh its first admin: a credential in the file of
// contexts. The role is stored last, so that a crash before it makes the next
// start write the credential again.
func (c *Controller) firstCredential(ctx context.Context) error {
	if c.cfg.AdminCredential == "" {
		return nil
	}
	_, err := c.store.OperatorRole(ctx, firstOperator)
	if err == nil {
		return nil // somebody has it
	}
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	entry, err := c.newContext(ctx, firstOperator)
	if err != nil {
		return fmt.Errorf("make the first admin's credential: %w", err)
	}
	file, err := access.Load(c.cfg.AdminCredential)
	if err != nil {
		return fmt.Errorf("--admin-credential: %w", err)
	}
	if err := file.Put(entry); err != nil {
		return fmt.Errorf("--admin-credential %s: %w", c.cfg.AdminCredential, err)
	}
	if err := file.Save(c.cfg.AdminCredential); err != nil {
		return fmt.Errorf("--admin-credential: %w", err)
	}
	if err := c.store.PutOperator(ctx, firstOperator, admin.String()); err != nil {
		return err
	}
	c.log.InfoContext(ctx, "wrote the first admin's credential", "file", c.cfg.AdminCredential, "context", entry.Name)
	return nil
}

// newContext makes a key and a credential for a person.
func (c *Controller) newContext(ctx context.Context, name string) (access.Context, error) {
	key, err := identity.NewKey()
	if err != nil {
		return access.Context{}, err
	}
	csr, err := identity.NewCSR(key)
	if err != nil {
		return access.Context{}, err
	}
	who, err := identity.AdmitOperator(c.cfg.TrustDomain, name, csr)
	if err != nil {
		return access.Context{}, err
	}
	chain, err := c.trust.sign(ctx, who, 0, "controller "+c.cfg.Name)
	if err != nil {
		return access.Context{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return access.Context{}, err
	}
	return access.Context{
		Name: c.cfg.TrustDomain.Name(), TrustDomain: c.cfg.TrustDomain.Name(),
		Controllers: c.addresses(ctx), CA: string(c.source.Bundle().PEM()), Operator: name,
		Certificate: string(identity.EncodePEM(chain)),
		Key:         access.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	}, nil
}
