package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"

	"github.com/weftmesh/weft/federation"
)

// The clusterset zone, as the MCS API's DNS specification has it.
const (
	dnsZone = "clusterset.local."
	// dnsSchema is the version of that specification which dns-version names.
	dnsSchema = "1.0.0"
	// dnsTTL in seconds: an address belongs to its service for as long as the
	// service exists, so this only bounds how long an absence is remembered.
	dnsTTL = 5
	// dnsConns bounds the TCP connections that are served at once.
	dnsConns = 256
	// dnsIdle is how long a TCP connection may stay without a query.
	dnsIdle = 8 * time.Second
	// dnsQueries bounds the queries of one TCP connection.
	dnsQueries = 1000
)

// directory is what DNS asks about the services that the cluster may import.
type directory interface {
	// lookup finds a service. vip is invalid while it has no clusterset address.
	lookup(federation.ServiceID) (vip netip.Addr, ports []federation.Port, ok bool)
	// hasNamespace reports whether any service is in the namespace.
	hasNamespace(string) bool
}

// nameServer answers for the clusterset zone alone. It never recurses, and every
// answer costs one or two look-ups, whatever the query.
type nameServer struct{ services directory }

// ServeDNS implements dns.Handler.
func (r nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := r.answer(q)
	if m == nil {
		return
	}
	size := dns.MinMsgSize
	if opt := q.IsEdns0(); opt != nil {
		size = min(max(int(opt.UDPSize()), dns.MinMsgSize), 4096)
	}
	if w.RemoteAddr().Network() == "tcp" {
		size = dns.MaxMsgSize
	}
	m.Truncate(size)
	_ = w.WriteMsg(m)
}

// answer is the reply to q, or nil where none is due.
func (r nameServer) answer(q *dns.Msg) *dns.Msg {
	if q.Response {
		return nil
	}
	m := new(dns.Msg)
	m.SetReply(q)
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(4096, false)
		if opt.Version() != 0 {
			m.Rcode = dns.RcodeBadVers
			return m
		}
	}
	switch {
	case q.Opcode != dns.OpcodeQuery:
		m.Rcode = dns.RcodeNotImplemented
		return m
	case len(q.Question) != 1:
		m.Rcode = dns.RcodeFormatError
		return m
	}
	question := q.Question[0]
	name := strings.ToLower(question.Name)
	if question.Qclass != dns.ClassINET || !dns.IsSubDomain(dnsZone, name) ||
		question.Qtype == dns.TypeAXFR || question.Qtype == dns.TypeIXFR {
		m.Rcode = dns.RcodeRefused
		return m
	}
	m.Authoritative = true
	found := r.find(m, question, name)
	switch {
	case !found:
		m.Rcode = dns.RcodeNameError
		m.Ns = []dns.RR{soa()}
	case len(m.Answer) == 0:
		m.Ns = []dns.RR{soa()} // the name exists, without records of this type
	}
	return m
}

// find adds the records asked for and reports whether the name exists at all.
// Only the names that the specification lists exist: a cluster's own name in
// front of a service's does not, because the service is one.
func (r nameServer) find(m *dns.Msg, q dns.Question, name string) bool {
	labels := dns.SplitDomainName(name)
	labels = labels[:len(labels)-2] // without clusterset.local
	n := len(labels)
	head := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: dnsTTL}
	switch {
	case n == 0:
		switch q.Qtype {
		case dns.TypeSOA:
			m.Answer = []dns.RR{soa()}
		case dns.TypeNS:
			m.Answer = []dns.RR{&dns.NS{Hdr: head, Ns: "ns." + dnsZone}}
		}
		return true
	case n == 1 && labels[0] == "dns-version":
		if q.Qtype == dns.TypeTXT {
			m.Answer = []dns.RR{&dns.TXT{Hdr: head, Txt: []string{dnsSchema}}}
		}
		return true
	case labels[n-1] != "svc":
		return false
	case n == 1:
		return true // svc: nothing but the namespaces below it
	case n == 2:
		return r.services.hasNamespace(labels[0])
	case n > 5:
		return false
	}
	id := federation.ServiceID{Namespace: labels[n-2], Name: labels[n-3]}
	vip, ports, ok := r.services.lookup(id)
	if !ok {
		return false
	}
	vip = vip.Unmap()
	switch n {
	case 3:
		addAddress(&m.Answer, head, q.Qtype, vip)
		return true
	case 4: // _proto: nothing but the ports below it
		return hasPort(ports, "", labels[0])
	}
	if !hasPort(ports, labels[0], labels[1]) {
		return false
	}
	if q.Qtype == dns.TypeSRV && vip.IsValid() {
		target := id.Name + "." + id.Namespace + ".svc." + dnsZone
		for _, p := range ports {
			if matchesPort(p, labels[0], labels[1]) {
				m.Answer = append(m.Answer, &dns.SRV{Hdr: head, Port: p.Number, Target: target})
			}
		}
		extra := dns.RR_Header{Name: target, Rrtype: addressType(vip), Class: dns.ClassINET, Ttl: dnsTTL}
		addAddress(&m.Extra, extra, extra.Rrtype, vip)
	}
	return true
}

// addAddress adds vip to rrs where the type asked for is that of the address.
func addAddress(rrs *[]dns.RR, head dns.RR_Header, qtype uint16, vip netip.Addr) {
	if !vip.IsValid() || qtype != addressType(vip) {
		return
	}
	if vip.Is4() {
		*rrs = append(*rrs, &dns.A{Hdr: head, A: vip.AsSlice()})
	} else {
		*rrs = append(*rrs, &dns.AAAA{Hdr: head, AAAA: vip.AsSlice()})
	}
}

func addressType(vip netip.Addr) uint16 {
	if vip.Is4() {
		return dns.TypeA
	}
	return dns.TypeAAAA
}

func hasPort(ports []federation.Port, name, protocol string) bool {
	for _, p := range ports {
		if matchesPort(p, name, protocol) {
			return true
		}
	}
	return false
}

// matchesPort compares a port with the labels of an SRV name, "_http" and
// "_tcp". A port without a name has no SRV record; an empty name is any port
// that has one.
func matchesPort(p federation.Port, name, protocol string) bool {
	return p.Name != "" && protocol == "_"+strings.ToLower(string(p.Protocol)) &&
		(name == "" || name == "_"+p.Name)
}

// soa is the zone's start of authority; its last number bounds for how long an
// absence may be cached.
func soa() dns.RR {
	return &dns.SOA{
		Hdr:     dns.RR_Header{Name: dnsZone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: dnsTTL},
		Ns:      "ns." + dnsZone,
		Mbox:    "hostmaster." + dnsZone,
		Serial:  1,
		Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: dnsTTL,
	}
}

// listenDNS binds one address for UDP and TCP. With port 0 both get the same
// free port.
func listenDNS(ctx context.Context, address string) (net.PacketConn, net.Listener, error) {
	var config net.ListenConfig
	var last error
	for range 8 { // a free TCP port may be taken for UDP
		l, err := config.Listen(ctx, "tcp", address)
		if err != nil {
			return nil, nil, fmt.Errorf("dns over tcp: %w", err)
		}
		p, err := config.ListenPacket(ctx, "udp", l.Addr().String())
		if err == nil {
			return p, l, nil
		}
		last = errors.Join(fmt.Errorf("dns over udp: %w", err), l.Close())
		if _, port, _ := net.SplitHostPort(address); port != "0" {
			break
		}
	}
	return nil, nil, last
}

// serveDNS answers on both until ctx ends, and closes them.
func serveDNS(ctx context.Context, services directory, p net.PacketConn, l net.Listener) error {
	handler := nameServer{services: services}
	started := make(chan struct{}, 2)
	servers := []*dns.Server{
		{PacketConn: p, Handler: handler, UDPSize: 4096},
		{
			Listener:      netutil.LimitListener(l, dnsConns),
			Handler:       handler,
			MaxTCPQueries: dnsQueries,
			IdleTimeout:   func() time.Duration { return dnsIdle },
		},
	}
	ended := make(chan error, len(servers))
	for _, s := range servers {
		s.NotifyStartedFunc = func() { started <- struct{}{} }
		go func() { ended <- s.ActivateAndServe() }()
	}
	var err error
	running := len(servers)
	// A server that has not started yet cannot be shut down.
	for range servers {
		select {
		case <-started:
		case e := <-ended:
			running--
			err = errors.Join(err, e)
		}
	}
	if err == nil {
		select {
		case <-ctx.Done():
		case err = <-ended:
			running--
		}
	}
	for _, s := range servers {
		// The context that has ended makes it close connections at once.
		_ = s.ShutdownContext(ctx)
	}
	_ = p.Close()
	_ = l.Close()
	for range running {
		err = errors.Join(err, <-ended)
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("dns: %w", err)
}
