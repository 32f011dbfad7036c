package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/weftmesh/weft/federation/clock"
)

// ServerConfig says whom a server accepts, and as whom it shows itself.
type ServerConfig struct {
	SVID x509svid.Source
	// Authorize decides about verified peers; nil refuses all of them.
	Authorize Authorizer
	// NextProtos are the application protocols. Unless empty, a connection
	// that has not agreed on one of them is refused.
	NextProtos []string
	// Operators accepts people, too: their chain must lead to the operators'
	// roots, as a mesh peer's must to the mesh's.
	Operators bool
	// Anonymous accepts clients without a certificate (they have no PeerOf),
	// for the one call that needs none: enrolment. A certificate that is shown
	// is verified all the same, and a bad one refused.
	Anonymous bool
	// SendRoot adds the root to the chain that is shown, so that clients can
	// check it against a pin.
	SendRoot bool
}

// ClientConfig says which servers a client accepts, and as whom it shows
// itself.
type ClientConfig struct {
	// SVID is the client's own; nil shows no certificate.
	SVID x509svid.Source
	// Authorize decides about verified servers; nil refuses all of them.
	Authorize Authorizer
	// NextProtos are as in ServerConfig.
	NextProtos []string
}

// Server makes a server's tls.Config. It reads its sources at each handshake,
// so one config serves a whole life of renewals.
func (v *Verifier) Server(c ServerConfig) *tls.Config {
	config := v.config(c.NextProtos)
	config.ClientAuth = tls.RequireAnyClientCert
	if c.Anonymous {
		config.ClientAuth = tls.RequestClientCert
	}
	chains := &rootedChain{}
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := certificateOf(c.SVID)
		if err != nil || !c.SendRoot {
			return cert, err
		}
		return chains.withRoot(cert, v.mesh.Bundle())
	}
	check := v.checker(c.NextProtos, c.Authorize, c.Operators, c.Anonymous)
	config.VerifyConnection = check
	return config
}

// Client makes a client's tls.Config. The server's name is not compared with
// its certificate, which holds a SPIFFE ID and no host name: set ServerName on
// a clone to the SNI to send. Operators are never accepted as servers.
func (v *Verifier) Client(c ClientConfig) *tls.Config {
	config := v.config(c.NextProtos)
	// The library's own check needs host names; VerifyConnection does it all.
	config.InsecureSkipVerify = true
	if c.SVID != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return certificateOf(c.SVID)
		}
	}
	config.VerifyConnection = v.checker(c.NextProtos, c.Authorize, false, false)
	return config
}

func (v *Verifier) config(nextProtos []string) *tls.Config { return baseConfig(v.clock, nextProtos) }

// baseConfig is what every connection of the mesh has in common. Nothing is
// ever resumed: a resumed session would skip the peer's proof.
func baseConfig(clk clock.Clock, nextProtos []string) *tls.Config {
	return &tls.Config{
		Time:                        clk.Now,
		MinVersion:                  tls.VersionTLS13,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // small first records cost bulk streams and gain nothing between machines
		CurvePreferences:            []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		NextProtos:                  slices.Clone(nextProtos),
	}
}

// checker is the whole decision about a connection.
func (v *Verifier) checker(protos []string, authorize Authorizer, operators, anonymous bool) func(tls.ConnectionState) error {
	protos = slices.Clone(protos)
	if authorize == nil {
		authorize = AllowNobody()
	}
	return func(state tls.ConnectionState) error {
		result, err := func() (string, error) {
			if state.DidResume {
				return "resumed", errors.New("identity: a resumed session proves nothing about its peer")
			}
			if len(protos) > 0 {
				if err := RequireALPN(state, protos...); err != nil {
					return "alpn", err
				}
			}
			if len(state.PeerCertificates) == 0 && anonymous {
				return "anonymous", nil
			}
			peer, err := v.Verify(state.PeerCertificates)
			if err != nil {
				if denied := (*DeniedError)(nil); errors.As(err, &denied) {
					return "denied", err
				}
				return "unverified", err
			}
			if peer.Role == RoleOperator && !operators {
				return "unauthorized", fmt.Errorf("identity: %s is an operator, and operators are no peers of the mesh", peer.ID)
			}
			if err := authorize(peer); err != nil {
				return "unauthorized", err
			}
			v.marks.set(state.PeerCertificates[0], peer)
			return "accepted", nil
		}()
		v.outcomes.WithLabelValues(result).Inc()
		return err
	}
}

// RequireALPN refuses a connection that has not agreed on one of the
// protocols. TLS itself lets a side that offers none pass, so both ends check.
func RequireALPN(state tls.ConnectionState, protos ...string) error {
	if slices.Contains(protos, state.NegotiatedProtocol) {
		return nil
	}
	if state.NegotiatedProtocol == "" {
		return fmt.Errorf("identity: the peer has agreed on no application protocol, want one of %q: is it a Weft process of this version?", protos)
	}
	return fmt.Errorf("identity: the application protocol is %q, want one of %q", state.NegotiatedProtocol, protos)
}

// PinnedClient makes the tls.Config of an agent that has nothing but a join
// token and a pin: it shows no certificate, and accepts a controller whose
// chain holds the pinned root. learned is called with the proof at each
// handshake, before a byte is sent; it must be safe for concurrent use.
func PinnedClient(pin Pin, clk clock.Clock, learned func(Pinned), nextProtos ...string) *tls.Config {
	config := baseConfig(clk, nextProtos)
	config.InsecureSkipVerify = true // VerifyConnection does the pin's check instead
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if state.DidResume {
			return errors.New("identity: a resumed session proves nothing about its peer")
		}
		if len(nextProtos) > 0 {
			if err := RequireALPN(state, nextProtos...); err != nil {
				return err
			}
		}
		proof, err := VerifyPin(state.PeerCertificates, pin, clk.Now())
		if err != nil {
			return err
		}
		if learned != nil {
			learned(proof)
		}
		return nil
	}
	return config
}

func certificateOf(source x509svid.Source) (*tls.Certificate, error) {
	if source == nil {
		return nil, errors.New("identity: this process has no source of SVIDs")
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{
		Certificate: RawChain(svid.Certificates),
		PrivateKey:  svid.PrivateKey,
		Leaf:        svid.Certificates[0],
	}, nil
}

// rootedChain adds the root to the chain that is shown. It keeps the last
// answer: to find the root takes a signature check.
type rootedChain struct{ last atomic.Pointer[rooted] }

type rooted struct {
	leaf   *x509.Certificate
	bundle *Bundle
	cert   *tls.Certificate
}

func (r *rootedChain) withRoot(cert *tls.Certificate, bundle *Bundle) (*tls.Certificate, error) {
	if last := r.last.Load(); last != nil && last.leaf == cert.Leaf && last.bundle == bundle {
		return last.cert, nil
	}
	if bundle == nil {
		return nil, errors.New("identity: there is no trust bundle here yet, so no root to show")
	}
	top, err := x509.ParseCertificate(cert.Certificate[len(cert.Certificate)-1])
	if err != nil {
		return nil, fmt.Errorf("identity: parse the own chain: %w", err)
	}
	for _, root := range bundle.roots {
		if root.Equal(top) {
			return cert, nil
		}
		if top.CheckSignatureFrom(root) == nil {
			full := *cert
			full.Certificate = append(slices.Clone(cert.Certificate), root.Raw)
			r.last.Store(&rooted{cert.Leaf, bundle, &full})
			return &full, nil
		}
	}
	return nil, fmt.Errorf("identity: the own chain leads to no root of the %s", bundle)
}
