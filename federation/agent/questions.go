package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// Bounds of a call.
const (
	callTimeout = 10 * time.Second // where the question names none
	callMost    = time.Minute      // whatever the question names
	callBody    = 4 << 10          // bytes of the answer that are shown
	callHead    = 64 << 10         // bytes of the answer's head that are read
	// callAsked is how long a connection stays open at least, so that the gateway
	// has heard that its record is wanted before it ends.
	callAsked = 50 * time.Millisecond
	// callAccess is how long the gateway's record of the connection may take
	// after its end.
	callAccess = 2 * time.Second
)

// answer answers one question of the controller.
func (a *Agent) answer(ctx context.Context, q *federationv1.Question) *federationv1.Answer {
	out := new(federationv1.Answer)
	kind := "unknown"
	err := errors.New("this agent does not know such a question: is it older than its controller?")
	switch q := q.GetQuestion().(type) {
	case *federationv1.Question_Why:
		kind = "why"
		var r *federationv1.WhyResponse
		if r, err = a.why(q.Why); err == nil {
			out.Answer = &federationv1.Answer_Why{Why: r}
		}
	case *federationv1.Question_Call:
		kind = "call"
		var r *federationv1.CallResponse
		if r, err = a.call(ctx, q.Call); err == nil {
			out.Answer = &federationv1.Answer_Call{Call: r}
		}
	}
	result := "answered"
	if err != nil {
		out.Error, result = err.Error(), "failed"
	}
	a.metrics.questions.WithLabelValues(kind, result).Inc()
	return out
}

// target checks what a question is about.
func (a *Agent) target(namespace, name string, port uint32, from string) (federation.ServiceID, uint16, error) {
	if from != "" && from != string(a.who.Cluster) {
		return federation.ServiceID{}, 0, fmt.Errorf("this is the agent of %s, it cannot answer for %q", a.who.Cluster, from)
	}
	s, err := federation.ParseServiceID(namespace + "/" + name)
	if err != nil {
		return s, 0, err
	}
	if port > 65535 {
		return s, 0, fmt.Errorf("port %d: must be from 1 to 65535", port)
	}
	return s, uint16(port), nil
}

// why explains where traffic goes by the plan that is in force, and says
// whether the proxies have acknowledged it.
func (a *Agent) why(q *federationv1.WhyRequest) (*federationv1.WhyResponse, error) {
	s, port, err := a.target(q.GetNamespace(), q.GetName(), q.GetPort(), q.GetFrom())
	if err != nil {
		return nil, err
	}
	force := a.inForce.Load()
	if force == nil {
		return nil, errors.New("nothing is in force yet: the agent has just started")
	}
	if _, ok := force.catalog.ServiceFrom(s, a.who.Cluster); !ok {
		return nil, fmt.Errorf("service %s: no cluster exports it to %s", s, a.who.Cluster)
	}
	caller := federation.Caller{Cluster: a.who.Cluster}
	if m, ok := force.catalog.Member(a.who.Cluster); ok {
		caller.Zone = m.Zone
	}
	if q.GetCaller() != "" {
		if caller.ID, err = spiffeid.FromString(q.GetCaller()); err != nil {
			return nil, fmt.Errorf("caller %q: %w", q.GetCaller(), err)
		}
	}
	plan := force.catalog.PlanPort(s, port, caller, force.world)
	acked, proxies := a.acks(force.catalog.Revision())
	return &federationv1.WhyResponse{
		Plan:    federationv1.EncodePlan(plan),
		World:   force.world.Digest(),
		Acked:   federationv1.EncodeRevision(acked),
		Proxies: proxies,
	}, nil
}

// call makes one HTTP request through the mesh, by the listener that the
// cluster's own callers use, and has the gateway tell which way it went.
func (a *Agent) call(ctx context.Context, q *federationv1.CallRequest) (*federationv1.CallResponse, error) {
	s, port, err := a.target(q.GetNamespace(), q.GetName(), q.GetPort(), q.GetFrom())
	if err != nil {
		return nil, err
	}
	svc, ok := a.mesh.service(s)
	if !ok {
		return nil, fmt.Errorf("service %s: no cluster exports it to %s", s, a.who.Cluster)
	}
	if port == 0 {
		if port, err = onlyPort(svc); err != nil {
			return nil, err
		}
	}
	vip := a.mesh.vip(s)
	if !vip.IsValid() {
		return nil, fmt.Errorf("service %s has no clusterset address in %s yet", s, a.who.Cluster)
	}
	path := q.GetPath()
	if path == "" {
		path = "/"
	}
	if !strings.HasPrefix(path, "/") || strings.ContainsAny(path, " \r\n\t") {
		return nil, fmt.Errorf("path %q: must begin with / and hold no white space", path)
	}
	timeout := callTimeout
	if t := q.GetTimeout(); t.IsValid() && t.AsDuration() > 0 {
		timeout = min(t.AsDuration(), callMost)
	}
	host := s.Name + "." + s.Namespace + ".svc." + strings.TrimSuffix(dnsZone, ".")
	return a.request(ctx, netip.AddrPortFrom(vip, port), host, path, timeout), nil
}

// onlyPort is the TCP port of a service that has just one.
func onlyPort(svc *federation.Service) (uint16, error) {
	var ports []uint16
	for _, p := range svc.Ports {
		if p.Protocol == federation.TCP {
			ports = append(ports, p.Number)
		}
	}
	if len(ports) != 1 {
		return 0, fmt.Errorf("service %s has %d TCP ports: name one of %v", svc.ID, len(ports), ports)
	}
	return ports[0], nil
}

// request is one GET on a connection of its own, and the path that it took.
// What goes wrong is part of the answer.
func (a *Agent) request(ctx context.Context, to netip.AddrPort, host, path string, timeout time.Duration) *federationv1.CallResponse {
	ctx, cancel := withTimeout(ctx, a.clock, timeout)
	defer cancel()
	began := a.clock.Now()
	out := new(federationv1.CallResponse)
	fail := func(err error) *federationv1.CallResponse {
		out.Error = checkError(ctx, err).Error()
		out.Duration = durationpb.New(clock.Since(a.clock, began))
		return out
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return fail(fmt.Errorf("the gateway's listener for it, %s: %w", to, err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	access, asked, forget := a.proxies.trace(conn.LocalAddr().String())
	defer forget()
	askedAt := a.clock.Now()

	req := &http.Request{
		Method: http.MethodGet, Host: host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"User-Agent": {"weft-agent"}}, Close: true,
	}
	if req.URL, err = url.Parse("http://" + host + path); err != nil {
		return fail(err)
	}
	if err := req.Write(conn); err != nil {
		return fail(err)
	}
	limited := &io.LimitedReader{R: conn, N: callHead}
	resp, err := http.ReadResponse(bufio.NewReader(limited), req)
	if err != nil {
		out = fail(err)
	} else {
		limited.N = callBody
		body, err := io.ReadAll(io.LimitReader(resp.Body, callBody))
		out.Status, out.Body = int32(resp.StatusCode), text(body)
		out.Duration = durationpb.New(clock.Since(a.clock, began))
		if err != nil && limited.N > 0 {
			out.Error = checkError(ctx, err).Error()
		}
		_ = resp.Body.Close()
	}
	if asked > 0 {
		_ = clock.Sleep(ctx, a.clock, callAsked-clock.Since(a.clock, askedAt))
	}
	_ = conn.Close() // the gateway's record is made at the connection's end
	if asked > 0 {
		late := a.clock.NewTimer(callAccess)
		defer late.Stop()
		select {
		case out.Access = <-access:
		case <-late.C():
		case <-ctx.Done():
		}
	}
	return out
}

// text is a body as text that protobuf can carry.
func text(b []byte) string { return strings.ToValidUTF8(string(b), string(utf8.RuneError)) }
