package agent

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/weftmesh/weft/federation"
)

// book is a directory for tests.
type book map[federation.ServiceID]struct {
	vip   string
	ports []federation.Port
}

func (b book) lookup(s federation.ServiceID) (netip.Addr, []federation.Port, bool) {
	e, ok := b[s]
	vip, _ := netip.ParseAddr(e.vip)
	return vip, e.ports, ok
}

func (b book) hasNamespace(ns string) bool {
	for s := range b {
		if s.Namespace == ns {
			return true
		}
	}
	return false
}

func sampleBook() book {
	http := federation.Port{Name: "http", Number: 80, Protocol: federation.TCP}
	stats := federation.Port{Name: "stats", Number: 9125, Protocol: federation.UDP}
	return book{
		{Namespace: "shop", Name: "payments"}: {"240.0.0.1", []federation.Port{http, stats}},
		{Namespace: "shop", Name: "six"}:      {"fd00::1", []federation.Port{http}},
		{Namespace: "shop", Name: "new"}:      {"", []federation.Port{http}},
		{Namespace: "shop", Name: "unnamed"}:  {"240.0.0.2", []federation.Port{{Number: 80, Protocol: federation.TCP}}},
	}
}

func TestDNSAnswers(t *testing.T) {
	n := nameServer{services: sampleBook()}
	const none, nx, refused = "none", "NXDOMAIN", "REFUSED"
	for _, tt := range []struct{ name, qtype, want string }{
		{"payments.shop.svc.clusterset.local.", "A", "240.0.0.1"},
		{"PayMents.Shop.svc.ClusterSet.Local.", "A", "240.0.0.1"},
		{"payments.shop.svc.clusterset.local.", "AAAA", none},
		{"payments.shop.svc.clusterset.local.", "MX", none},
		{"six.shop.svc.clusterset.local.", "AAAA", "fd00::1"},
		{"six.shop.svc.clusterset.local.", "A", none},
		{"new.shop.svc.clusterset.local.", "A", none},
		{"_http._tcp.payments.shop.svc.clusterset.local.", "SRV", "0 0 80 payments.shop.svc.clusterset.local."},
		{"_stats._udp.payments.shop.svc.clusterset.local.", "SRV", "0 0 9125 payments.shop.svc.clusterset.local."},
		{"_stats._tcp.payments.shop.svc.clusterset.local.", "SRV", nx},
		{"_http._tcp.new.shop.svc.clusterset.local.", "SRV", none},
		{"_http._tcp.payments.shop.svc.clusterset.local.", "A", none},
		{"_tcp.payments.shop.svc.clusterset.local.", "SRV", none},
		{"_tcp.unnamed.shop.svc.clusterset.local.", "SRV", nx},
		{"_sctp.payments.shop.svc.clusterset.local.", "SRV", nx},
		{"dns-version.clusterset.local.", "TXT", `"1.0.0"`},
		{"dns-version.clusterset.local.", "A", none},
		{"clusterset.local.", "SOA", "ns.clusterset.local."},
		{"clusterset.local.", "NS", "ns.clusterset.local."},
		{"clusterset.local.", "A", none},
		{"svc.clusterset.local.", "A", none},
		{"shop.svc.clusterset.local.", "A", none},
		{"other.svc.clusterset.local.", "A", nx},
		{"gone.shop.svc.clusterset.local.", "A", nx},
		{"pod.clusterset.local.", "A", nx},
		{"payments.shop.pod.clusterset.local.", "A", nx},
		// The service is one: no cluster's own name for it is published.
		{"eu-1.payments.shop.svc.clusterset.local.", "A", nx},
		{"pod-0.eu-1.payments.shop.svc.clusterset.local.", "A", nx},
		{"_http._tcp.eu-1.payments.shop.svc.clusterset.local.", "SRV", nx},
		{"example.com.", "A", refused},
		{"local.", "A", refused},
		{".", "NS", refused},
		{"notclusterset.local.", "A", refused},
		{"clusterset.local.", "AXFR", refused},
		{`pay\.ments.shop.svc.clusterset.local.`, "A", nx},
		{`\000.shop.svc.clusterset.local.`, "A", nx},
	} {
		q := new(dns.Msg)
		q.SetQuestion(tt.name, dns.StringToType[tt.qtype])
		m := n.answer(q)
		got := dns.RcodeToString[m.Rcode]
		switch {
		case len(m.Answer) > 0:
			got = strings.Fields(strings.SplitN(m.Answer[0].String(), tt.qtype, 2)[1])[0]
			if tt.qtype == "SRV" {
				got = strings.TrimSpace(strings.SplitN(m.Answer[0].String(), tt.qtype, 2)[1])
			}
			if h := m.Answer[0].Header(); h.Name != tt.name || h.Ttl != 5 && tt.qtype != "SOA" {
				t.Errorf("%s %s: the record is %s", tt.name, tt.qtype, m.Answer[0])
			}
		case m.Rcode == dns.RcodeSuccess:
			got = none
		}
		if got != tt.want && !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s %s: %s, want %s", tt.name, tt.qtype, got, tt.want)
		}
		// What is cached of an absence is bounded by the SOA.
		if (got == none || got == nx) != (len(m.Ns) == 1) {
			t.Errorf("%s %s: authority %v", tt.name, tt.qtype, m.Ns)
		}
		if m.Authoritative != (got != refused) {
			t.Errorf("%s %s: authoritative %v", tt.name, tt.qtype, m.Authoritative)
		}
		if _, err := m.Pack(); err != nil {
			t.Errorf("%s %s: %v", tt.name, tt.qtype, err)
		}
	}
}

func TestDNSOddQueries(t *testing.T) {
	n := nameServer{services: sampleBook()}
	q := func(change func(*dns.Msg)) *dns.Msg {
		m := new(dns.Msg)
		m.SetQuestion("payments.shop.svc.clusterset.local.", dns.TypeA)
		change(m)
		return n.answer(m)
	}
	if m := q(func(m *dns.Msg) { m.Response = true }); m != nil {
		t.Errorf("a response is answered: %v", m)
	}
	for name, tt := range map[string]struct {
		change func(*dns.Msg)
		rcode  int
	}{
		"no question":    {func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		"two questions":  {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		"an update":      {func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"another class":  {func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		"a later EDNS":   {func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
		"with EDNS":      {func(m *dns.Msg) { m.SetEdns0(1232, true) }, dns.RcodeSuccess},
		"in upper case":  {func(m *dns.Msg) { m.Question[0].Name = strings.ToUpper(m.Question[0].Name) }, dns.RcodeSuccess},
		"of any type":    {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeANY }, dns.RcodeSuccess},
		"of a zero type": {func(m *dns.Msg) { m.Question[0].Qtype = 0 }, dns.RcodeSuccess},
	} {
		if m := q(tt.change); m.Rcode != tt.rcode {
			t.Errorf("%s: %s, want %s", name, dns.RcodeToString[m.Rcode], dns.RcodeToString[tt.rcode])
		}
	}
}

// Over sockets: both transports, garbage in between, and a clean end.
func TestDNSServer(t *testing.T) {
	p, l, err := listenDNS(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if p.LocalAddr().String() != l.Addr().String() {
		t.Fatalf("UDP at %s, TCP at %s", p.LocalAddr(), l.Addr())
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveDNS(ctx, sampleBook(), p, l) }()

	for _, garbage := range [][]byte{{}, {0}, make([]byte, 11), make([]byte, 4096), []byte("GET / HTTP/1.1\r\n\r\n")} {
		for _, network := range []string{"udp", "tcp"} {
			conn, err := net.Dial(network, p.LocalAddr().String())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write(garbage)
			conn.Close()
		}
	}
	for _, network := range []string{"udp", "tcp"} {
		m := ask(t, p.LocalAddr(), network, "payments.shop.svc.clusterset.local.", dns.TypeA)
		if len(m.Answer) != 1 {
			t.Errorf("%s: %v", network, m)
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
	p, l, err = listenDNS(t.Context(), p.LocalAddr().String())
	if err != nil {
		t.Fatalf("its port is still taken: %v", err)
	}
	p.Close()
	l.Close()
}

func FuzzDNS(f *testing.F) {
	for _, name := range []string{"payments.shop.svc.clusterset.local.", "_http._tcp.payments.shop.svc.clusterset.local.", "clusterset.local."} {
		q := new(dns.Msg)
		q.SetQuestion(name, dns.TypeSRV)
		q.SetEdns0(512, true)
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	n := nameServer{services: sampleBook()}
	f.Fuzz(func(t *testing.T, b []byte) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		m := n.answer(q)
		if m == nil {
			return
		}
		m.Truncate(dns.MinMsgSize)
		out, err := m.Pack()
		if err != nil {
			return // the question itself cannot be packed again
		}
		if len(out) > dns.MinMsgSize {
			t.Fatalf("an answer of %d bytes to a question of %d", len(out), len(b))
		}
		if m.Rcode == dns.RcodeSuccess && len(m.Answer) > 2 {
			t.Fatalf("%d records", len(m.Answer))
		}
	})
}
