package federation

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// Each parser takes what it writes itself, and refuses everything else.
func TestNames(t *testing.T) {
	long := strings.Repeat("a", 63)
	kinds := []struct {
		name      string
		read      func(string) (string, error)
		good, bad []string
	}{
		{
			"cluster", func(s string) (string, error) { c, err := ParseClusterID(s); return c.String(), err },
			[]string{"a", "eu-1", "eu-1.west", "0", long, long + "." + long},
			[]string{"", ".", "a.", ".a", "a.b.c", "-a", "a-", "A", "a_b", "a/b", "a b", "ä", long + "a", "controller", "..", "a\x00"},
		},
		{
			"service", func(s string) (string, error) { v, err := ParseServiceID(s); return v.String(), err },
			[]string{"shop/payments", "a/b"},
			[]string{"", "a", "/", "a/", "/b", "a/b/c", "A/b", "a/..", "*/b"},
		},
		{
			"grant", func(s string) (string, error) { v, err := ParseGrant(s); return v.String(), err },
			[]string{"shop/*", "*/*", "*/a", "shop/payments"},
			[]string{"", "*", "shop", "shop/pay*", "**/a", "/", "a/b/c"},
		},
		{
			"address", func(s string) (string, error) { v, err := ParseAddress(s); return v.String(), err },
			[]string{"127.0.0.1:15443", "[::1]:1", "gw.example.com:65535", "gw:1", "gw.example.com.:1"},
			[]string{"", "gw", "gw:0", "gw:65536", "gw:http", ":1", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "a b:1", "a..b:1", "::1:1", "gw:+1", "gw:-1", strings.Repeat("a.", 127) + "a:1"},
		},
		{
			"revision", func(s string) (string, error) { v, err := ParseRevision(s); return v.String(), err },
			[]string{"-", "a/1", "a/0"},
			[]string{"", "a", "/1", "a/", "a/x", "1"},
		},
		{
			"subject", func(s string) (string, error) { v, err := ParseRef(s); return v.String(), err },
			[]string{"export eu-1/shop/payments", "file a b.yaml"},
			[]string{"", "export", "export ", " x", "Export x"},
		},
	}
	for _, k := range kinds {
		for _, s := range k.good {
			if got, err := k.read(s); err != nil || got != s {
				t.Errorf("%s %q reads as %q, %v", k.name, s, got, err)
			}
		}
		for _, s := range k.bad {
			if got, err := k.read(s); err == nil {
				t.Errorf("%s %q is taken, as %q", k.name, s, got)
			} else if len(err.Error()) > 600 {
				t.Errorf("%s: an error of %d bytes", k.name, len(err.Error()))
			}
		}
	}
	if err := CheckLabel("A"); err == nil {
		t.Error("A is taken for a label")
	}
}

func TestCovers(t *testing.T) {
	r := Revision{"a", 5}
	for o, want := range map[Revision]bool{{"a", 4}: true, {"a", 5}: true, {"a", 6}: false, {"b", 4}: false, {}: false} {
		if r.Covers(o) != want {
			t.Errorf("%v covers %v: %v", r, o, !want)
		}
	}
}

func TestGrants(t *testing.T) {
	m := Member{Grants: []Grant{{"shop", "*"}, {"*", "cart"}}}
	for s, want := range map[ServiceID]bool{{"shop", "payments"}: true, {"bank", "cart"}: true, {"bank", "payments"}: false} {
		if m.Allows(s) != want {
			t.Errorf("%v allowed: %v", s, !want)
		}
	}
	if (&Member{}).Allows(ServiceID{"shop", "cart"}) {
		t.Error("something is allowed without a grant")
	}
}

func TestSortPorts(t *testing.T) {
	http, dns := Port{"http", 80, TCP, ""}, Port{"dns", 53, UDP, ""}
	ports := []Port{http, dns, {"dns-tcp", 53, TCP, ""}}
	if err := SortPorts(ports); err != nil || !slices.IsSortedFunc(ports, Port.Compare) {
		t.Errorf("%v, %v", ports, err)
	}
	if err := SortPorts([]Port{{"", 80, TCP, ""}}); err != nil {
		t.Error(err)
	}
	for _, bad := range [][]Port{{http, {"", 81, TCP, ""}}, {http, {"http", 81, TCP, ""}}, {http, {"web", 80, TCP, ""}}} {
		if SortPorts(bad) == nil {
			t.Errorf("%v stand together", bad)
		}
	}
}

func TestLivenessRule(t *testing.T) {
	for _, c := range []struct {
		rule    LivenessRule
		silence time.Duration
		state   Liveness
		action  LivenessAction
	}{
		{LivenessRule{}, 0, Fresh, ActionKeep},
		{LivenessRule{}, DefaultSuspectAfter - 1, Fresh, ActionKeep},
		{LivenessRule{}, DefaultSuspectAfter, Suspect, ActionKeep},
		{LivenessRule{}, DefaultExpireAfter, Expired, ActionDeprioritise},
		{LivenessRule{OnSuspect: ActionRemove}, DefaultSuspectAfter, Suspect, ActionRemove},
		{LivenessRule{SuspectAfter: time.Second, ExpireAfter: time.Second, OnExpired: ActionKeep}, time.Second, Expired, ActionKeep},
	} {
		if state, action := c.rule.Of(c.silence); state != c.state || action != c.action {
			t.Errorf("%+v of %v: %v, %v", c.rule, c.silence, state, action)
		}
	}
}

// Every enum prints, also a value that is none of its constants.
func TestEnumsPrint(t *testing.T) {
	for want, got := range map[string]string{
		"terminate": Terminate.String(), "passthrough": Passthrough.String(),
		"pending": MemberPending.String(), "active": MemberActive.String(), "quarantined": MemberQuarantined.String(), "deregistered": MemberDeregistered.String(),
		"unknown": ProbeUnknown.String(), "answers": ProbeAnswers.String(), "silent": ProbeSilent.String(),
		"local": StepLocal.String(), "any": StepAny.String(), "fresh": Fresh.String(), "expired": Expired.String(),
		"default": ActionDefault.String(), "remove": ActionRemove.String(), "info": Info.String(), "error": Error.String(),
		"member": MemberChanged.String(), "service": ServiceChanged.String(), "changed": Changed.String(), "removed": Removed.String(),
		"unknown(99)": StepKind(99).String(), "unknown(98)": LivenessAction(98).String(), "12.5%": PerMille(125).String(), "100%": All.String(),
	} {
		if got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
}

// What was put in can be looked up, and an empty catalog has nothing.
func TestLookups(t *testing.T) {
	p := sized(3, 2)
	p.policies = []Policy{{ID: PolicyID{OriginController, "ns0", "p"}, TargetNamespace: "ns0"}}
	c := p.merge()
	for _, m := range p.members {
		if got, ok := c.Member(m.Cluster); !ok || got.Region != m.Region {
			t.Errorf("%s: %v %v", m.Cluster, got, ok)
		}
		count := 0
		for e := range c.ExportsOf(m.Cluster) {
			if e.Cluster != m.Cluster {
				t.Errorf("%s has the export %s", m.Cluster, e.ID())
			}
			count++
		}
		if count != 2 {
			t.Errorf("%s has %d exports", m.Cluster, count)
		}
	}
	for _, e := range p.exports {
		if got, ok := c.Export(e.ID()); !ok || got.Accepted != e.Accepted {
			t.Errorf("%s: %v %v", e.ID(), got, ok)
		}
	}
	if got, ok := c.Policy(p.policies[0].ID); !ok || got.Target() != "ns0/*" {
		t.Errorf("policy %v %v", got, ok)
	}
	s, ok := c.Service(service(0))
	if !ok || s.String() != "ns0/svc0000 http:8080/TCP(http) metrics:9090/TCP from c000 c001 c002" {
		t.Errorf("service %v %v", s, ok)
	}
	if port, ok := s.Port(9090, TCP); !ok || port.Name != "metrics" {
		t.Errorf("port %v %v", port, ok)
	}
	if _, ok := s.Port(9090, UDP); ok {
		t.Error("9090 is UDP as well")
	}
	for _, empty := range []*Catalog{nil, Merge(Revision{}, nil, nil, nil), c.Apply(Revision{})} {
		if empty == nil || len(Diff(empty, nil)) == 0 {
			if _, ok := empty.Member("c000"); ok || len(slices.Collect(empty.Services())) > 0 || empty.Revision() != (Revision{}) || len(empty.Findings()) > 0 {
				t.Error("an empty catalog has something")
			}
			if p := empty.Plan(service(0), Caller{Cluster: "c000"}, nil); len(p.Verdicts) > 0 || len(p.Tiers) > 0 {
				t.Errorf("a plan from nothing:\n%s", p)
			}
		}
	}
	// Stopping early stops.
	for range c.Services() {
		break
	}
	for range c.Exports() {
		break
	}
	for range c.Members() {
		break
	}
	for range c.ExportsOf("c001") {
		break
	}
}
