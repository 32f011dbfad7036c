package federation

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// script is a small mesh that testdata's scripts talk to. testdata/README.md
// documents the language.
type script struct {
	t        *testing.T
	catalog  *Catalog
	previous *Catalog // before the last command that changed the catalog
	world    *World
	oldWorld *World
	revision int64
	// What the catalog should be made of, for the check that Apply equals Merge.
	members  map[ClusterID]Member
	exports  map[ExportID]Export
	policies map[PolicyID]Policy
}

func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		if !strings.HasSuffix(path, ".txt") {
			return
		}
		s := &script{t: t}
		s.reset()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.t = t
			out := s.run(d)
			s.check(d)
			return out
		})
	})
}

func (s *script) reset() {
	s.catalog, s.previous, s.world, s.oldWorld, s.revision = nil, nil, nil, nil, 0
	s.members, s.exports, s.policies = map[ClusterID]Member{}, map[ExportID]Export{}, map[PolicyID]Policy{}
}

func (s *script) rev() Revision { return Revision{Incarnation: "test", Number: s.revision} }

// check compares the catalog with one merged from nothing: every script is also
// a test of Apply.
func (s *script) check(d *datadriven.TestData) {
	if d.Cmd == "merge" {
		return // its duplicates are no state that Apply can reach
	}
	merged := Merge(s.catalog.Revision(), values(s.members), values(s.exports), values(s.policies))
	if got, want := s.catalog.Describe(), merged.Describe(); got != want {
		d.Fatalf(s.t, "Apply gives\n%s\nMerge gives\n%s", got, want)
	}
	if changes := Diff(s.catalog, merged); len(changes) > 0 {
		d.Fatalf(s.t, "Apply differs from Merge: %v", changes)
	}
}

func values[K comparable, V any](m map[K]V) []V {
	var list []V
	for _, v := range m {
		list = append(list, v)
	}
	return list
}

func (s *script) run(d *datadriven.TestData) string {
	switch d.Cmd {
	case "reset":
		s.reset()
		return ""
	case "cluster", "export", "policy", "delete", "apply":
		lines := []string{d.Cmd}
		if d.Cmd == "apply" {
			lines = strings.Split(d.Input, "\n")
		}
		return s.apply(d, lines)
	case "merge":
		return s.merge(d)
	case "ready", "silence", "probe", "drain":
		s.oldWorld = s.world
		s.observe(d.Cmd, d.CmdArgs)
		return ""
	case "plan":
		return s.plan(d)
	case "diff":
		return s.diff()
	case "findings":
		return s.findings(d)
	case "catalog":
		return s.catalog.Describe()
	case "explain":
		doc, ok := Explain(Code(d.CmdArgs[0].Key))
		if !ok {
			return "no such code\n"
		}
		return fmt.Sprintf("%s %s: %s\n%s\nfix: %s\n", doc.Code, doc.Severity, doc.Title, doc.Explanation, doc.Fix)
	case "service":
		svc, ok := s.catalog.Service(must(ParseServiceID(d.CmdArgs[0].Key)))
		if !ok {
			return "no such service\n"
		}
		return svc.Describe()
	default:
		d.Fatalf(s.t, "unknown command %q", d.Cmd)
		return ""
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// args are the words of a command: "name" or "key=value" or "key=(a, b)".
type args struct {
	words  []string
	values map[string][]string
}

func argsOf(list []datadriven.CmdArg) args {
	a := args{values: map[string][]string{}}
	for _, arg := range list {
		if len(arg.Vals) == 0 {
			a.words = append(a.words, arg.Key)
		} else {
			a.values[arg.Key] = arg.Vals
		}
	}
	return a
}

func (a args) get(key, def string) string {
	if v := a.values[key]; len(v) > 0 {
		return v[0]
	}
	return def
}

func (a args) number(key string, def int64) int64 {
	return must(strconv.ParseInt(a.get(key, strconv.FormatInt(def, 10)), 10, 64))
}

func (a args) clusters(key string) []ClusterID {
	var list []ClusterID
	for _, v := range a.values[key] {
		list = append(list, must(ParseClusterID(v)))
	}
	return list
}

// parseLine reads one command that stands inside an apply or merge.
func parseLine(line string) (string, []datadriven.CmdArg) {
	cmd, list, err := datadriven.ParseLine(line)
	if err != nil {
		panic(err)
	}
	return cmd, list
}

func (s *script) apply(d *datadriven.TestData, lines []string) string {
	s.revision++
	s.oldWorld = s.world
	var events []Event
	for _, line := range lines {
		cmd, list := d.Cmd, d.CmdArgs
		if d.Cmd == "apply" {
			cmd, list = parseLine(line)
		}
		switch cmd {
		case "ready", "silence", "probe", "drain":
			s.observe(cmd, list)
		default:
			events = append(events, s.event(cmd, argsOf(list)))
		}
	}
	s.previous = s.catalog
	s.catalog = s.catalog.Apply(s.rev(), events...)
	return ""
}

// event reads one command and keeps book of it for check.
func (s *script) event(cmd string, a args) Event {
	switch cmd {
	case "cluster":
		m := s.member(a)
		s.members[m.Cluster] = m
		return PutMember{m}
	case "export":
		e := s.export(a)
		if old, ok := s.exports[e.ID()]; ok && a.values["accepted"] == nil {
			e.Accepted = old.Accepted
		}
		s.exports[e.ID()] = e
		return PutExport{e}
	case "policy":
		p := s.policy(a)
		if old, ok := s.policies[p.ID]; ok && a.values["accepted"] == nil {
			p.Accepted = old.Accepted
		}
		s.policies[p.ID] = p
		return PutPolicy{p}
	case "delete":
		switch what, name := a.words[0], a.words[1]; what {
		case "cluster":
			delete(s.members, ClusterID(name))
			return DeleteMember{ClusterID(name)}
		case "export":
			c, svc, _ := strings.Cut(name, "/")
			id := ExportID{ClusterID(c), must(ParseServiceID(svc))}
			delete(s.exports, id)
			return DeleteExport{id}
		case "policy":
			id := policyID(name, a.get("origin", OriginController))
			delete(s.policies, id)
			return DeletePolicy{id}
		}
	}
	panic(fmt.Sprintf("no event %q %v", cmd, a))
}

func (s *script) merge(d *datadriven.TestData) string {
	var members []Member
	var exports []Export
	var policies []Policy
	for line := range strings.SplitSeq(d.Input, "\n") {
		cmd, list := parseLine(line)
		switch a := argsOf(list); cmd {
		case "cluster":
			members = append(members, s.member(a))
		case "export":
			exports = append(exports, s.export(a))
		case "policy":
			policies = append(policies, s.policy(a))
		default:
			d.Fatalf(s.t, "merge: unknown line %q", line)
		}
	}
	s.revision++
	s.previous = s.catalog
	s.catalog = Merge(s.rev(), members, exports, policies)
	return s.catalog.Describe()
}

func (s *script) member(a args) Member {
	m := Member{
		Cluster:    must(ParseClusterID(a.words[0])),
		Region:     a.get("region", ""),
		Zone:       a.get("zone", ""),
		Network:    a.get("network", ""),
		Generation: a.number("generation", 1),
		State: map[string]MemberState{
			"active": MemberActive, "pending": MemberPending, "quarantined": MemberQuarantined, "deregistered": MemberDeregistered,
		}[a.get("state", "active")],
	}
	grants, ok := a.values["grants"]
	if !ok {
		grants = []string{"*/*"}
	}
	for _, g := range grants {
		if g != "none" {
			m.Grants = append(m.Grants, must(ParseGrant(g)))
		}
	}
	m.Gateways = addresses(a, m.Cluster)
	return m
}

// addresses of a cluster's gateways: one by default, named after it.
func addresses(a args, c ClusterID) []Address {
	list, ok := a.values["gateways"]
	if !ok {
		list = []string{string(c) + ".gw:15443"}
	}
	var out []Address
	for _, g := range list {
		if g != "none" {
			out = append(out, must(ParseAddress(g)))
		}
	}
	return out
}

func (s *script) export(a args) Export {
	c, svc, _ := strings.Cut(a.words[0], "/")
	e := Export{
		Cluster:  must(ParseClusterID(c)),
		Service:  must(ParseServiceID(svc)),
		Accepted: a.number("accepted", s.revision),
		Gateways: addresses(a, ClusterID(c)),
		Visible:  Selector{Clusters: a.clusters("visible"), Regions: a.values["visible-regions"]},
	}
	if a.get("mode", "") == "passthrough" {
		e.Mode = Passthrough
	}
	for _, id := range a.values["serves"] {
		e.Serves = append(e.Serves, spiffeid.RequireFromString(id))
	}
	ports, ok := a.values["ports"]
	if !ok {
		ports = []string{"http:8080"}
	}
	for _, p := range ports {
		e.Ports = append(e.Ports, parsePort(p))
	}
	return e
}

// parsePort reads [NAME:]NUMBER[/PROTOCOL][@APP].
func parsePort(s string) Port {
	var p Port
	s, p.AppProtocol, _ = strings.Cut(s, "@")
	if name, rest, ok := strings.Cut(s, ":"); ok {
		p.Name, s = name, rest
	}
	number, protocol, ok := strings.Cut(s, "/")
	if !ok {
		protocol = "TCP"
	}
	p.Number, p.Protocol = uint16(must(strconv.ParseUint(number, 10, 16))), Protocol(protocol)
	return p
}

func policyID(name, origin string) PolicyID {
	id := must(ParseServiceID(name))
	return PolicyID{Origin: origin, Namespace: id.Namespace, Name: id.Name}
}

func (s *script) policy(a args) Policy {
	p := Policy{ID: policyID(a.words[0], a.get("origin", OriginController)), Accepted: a.number("accepted", s.revision)}
	p.TargetNamespace = p.ID.Namespace
	switch target := a.get("target", p.ID.Name); target {
	case "mesh":
		p.TargetNamespace = ""
	case "namespace":
	default:
		p.TargetService = target
	}
	for _, step := range a.values["order"] {
		p.Order = append(p.Order, parseStep(step))
	}
	if v := a.get("spill-below", ""); v != "" {
		p.SpillBelow = PerMille(10 * must(strconv.Atoi(strings.TrimSuffix(v, "%"))))
	}
	p.Deny = Deny{Clusters: a.clusters("deny"), Regions: a.values["deny-regions"], Unattested: slices.Contains(a.words, "deny-unattested")}
	p.Liveness.SuspectAfter = must(time.ParseDuration(a.get("suspect-after", "0s")))
	p.Liveness.ExpireAfter = must(time.ParseDuration(a.get("expire-after", "0s")))
	actions := map[string]LivenessAction{"": ActionDefault, "keep": ActionKeep, "deprioritise": ActionDeprioritise, "remove": ActionRemove}
	p.Liveness.OnSuspect = actions[a.get("on-suspect", "")]
	p.Liveness.OnExpired = actions[a.get("on-expired", "")]
	return p
}

// parseStep reads local, region, any, clusters:A+B, regions:R+S, each followed
// by |CLUSTER=WEIGHT for a split.
func parseStep(text string) Step {
	parts := strings.Split(text, "|")
	kind, names, _ := strings.Cut(parts[0], ":")
	var s Step
	switch kind {
	case "local":
		s.Kind = StepLocal
	case "region":
		s.Kind = StepRegion
	case "clusters":
		s.Kind = StepClusters
		for n := range strings.SplitSeq(names, "+") {
			s.Clusters = append(s.Clusters, ClusterID(n))
		}
	case "regions":
		s.Kind = StepRegions
		s.Regions = strings.Split(names, "+")
	case "any":
		s.Kind = StepAny
	default:
		panic("no step " + text)
	}
	for _, w := range parts[1:] {
		c, n, _ := strings.Cut(w, "=")
		s.Split = append(s.Split, Weight{ClusterID(c), must(strconv.Atoi(n))})
	}
	return s
}

// observe changes the world: each argument is NAME=VALUE.
func (s *script) observe(cmd string, list []datadriven.CmdArg) {
	for _, arg := range list {
		value := "unknown"
		if len(arg.Vals) > 0 {
			value = arg.Vals[0]
		}
		switch cmd {
		case "ready":
			c, svc, _ := strings.Cut(arg.Key, "/")
			id := ExportID{ClusterID(c), must(ParseServiceID(svc))}
			if value == "unknown" {
				s.world = s.world.WithoutReadiness(id)
				continue
			}
			ready, total, _ := strings.Cut(value, "/")
			s.world = s.world.WithReadiness(id, Readiness{must(strconv.Atoi(ready)), must(strconv.Atoi(total))})
		case "silence":
			s.world = s.world.WithSilence(ClusterID(arg.Key), must(time.ParseDuration(value)))
		case "probe":
			probe := map[string]Probe{"unknown": ProbeUnknown, "answers": ProbeAnswers, "silent": ProbeSilent}[value]
			s.world = s.world.WithProbe(ClusterID(arg.Key), probe)
		case "drain":
			percent := must(strconv.ParseFloat(strings.TrimSuffix(value, "%"), 64))
			s.world = s.world.WithDrain(ClusterID(arg.Key), PerMille(percent*10))
		}
	}
}

func (s *script) plan(d *datadriven.TestData) string {
	a := argsOf(d.CmdArgs)
	name, port, _ := strings.Cut(a.words[0], ":")
	from := Caller{Cluster: ClusterID(a.get("from", ""))}
	if id := a.get("as", ""); id != "" {
		from.ID = spiffeid.RequireFromString(id)
	}
	number := uint64(0)
	if port != "" {
		number = must(strconv.ParseUint(port, 10, 16))
	}
	id := must(ParseServiceID(name))
	p := s.catalog.PlanPort(id, uint16(number), from, s.world)
	checkPlan(s.t, s.catalog, p)
	if view := s.catalog.View(from.Cluster).PlanPort(id, uint16(number), from, s.world); view.String() != p.String() {
		d.Fatalf(s.t, "from the caller's view the plan is\n%s\ninstead of\n%s", view, p)
	}
	return p.String()
}

func (s *script) diff() string {
	var b strings.Builder
	for _, c := range Diff(s.previous, s.catalog) {
		fmt.Fprintln(&b, c)
	}
	for _, c := range DiffWorlds(s.catalog, s.oldWorld, s.world) {
		fmt.Fprintln(&b, "world:", c)
	}
	if b.Len() == 0 {
		return "nothing\n"
	}
	return b.String()
}

func (s *script) findings(d *datadriven.TestData) string {
	var b strings.Builder
	for _, f := range s.catalog.Findings() {
		if argsOf(d.CmdArgs).get("describe", "") == string(f.Code) {
			fmt.Fprintln(&b, f.Describe())
		} else {
			fmt.Fprintln(&b, f)
		}
	}
	if b.Len() == 0 {
		return "none\n"
	}
	return b.String()
}

// checkPlan checks what holds for every plan.
func checkPlan(t interface {
	Helper()
	Fatalf(string, ...any)
}, c *Catalog, p Plan,
) {
	t.Helper()
	tierOf := map[ClusterID]int{}
	shares := map[ClusterID]PerMille{}
	for i, tier := range p.Tiers {
		if len(tier.Backends) == 0 {
			t.Fatalf("tier %d is empty:\n%s", i, p)
		}
		var sum PerMille
		for _, b := range tier.Backends {
			sum += b.Share
			if b.Share <= 0 {
				t.Fatalf("%s has share %v in tier %d:\n%s", b.Cluster, b.Share, i, p)
			}
			if _, twice := tierOf[b.Cluster]; twice {
				t.Fatalf("%s is in two tiers:\n%s", b.Cluster, p)
			}
			if b.Local != (b.Cluster == p.Caller.Cluster) {
				t.Fatalf("%s: Local is %v:\n%s", b.Cluster, b.Local, p)
			}
			tierOf[b.Cluster], shares[b.Cluster] = i, b.Share
		}
		if sum != All {
			t.Fatalf("shares of tier %d add up to %d:\n%s", i, sum, p)
		}
	}
	judged := map[ClusterID]bool{}
	for _, v := range p.Verdicts {
		tier, used := tierOf[v.Cluster]
		switch {
		case judged[v.Cluster]:
			t.Fatalf("two verdicts for %s:\n%s", v.Cluster, p)
		case used && (v.Tier != tier || v.Share != shares[v.Cluster]), !used && (v.Tier != -1 || v.Share != 0):
			t.Fatalf("verdict and tier of %s differ:\n%s", v.Cluster, p)
		case used && v.Readiness.Ready == 0:
			t.Fatalf("%s is used with no ready endpoint:\n%s", v.Cluster, p)
		case v.Detail == "":
			t.Fatalf("no reason for %s:\n%s", v.Cluster, p)
		case used != (v.Reason < ReasonNoReadyEndpoints):
			t.Fatalf("%s has the reason %v in tier %d:\n%s", v.Cluster, v.Reason, v.Tier, p)
		}
		judged[v.Cluster] = true
	}
	for e := range c.Exports() {
		if e.Service == p.Service && c.Sees(p.Caller.Cluster, e) != judged[e.Cluster] {
			t.Fatalf("%s: visible %v, judged %v:\n%s", e.Cluster, !judged[e.Cluster], judged[e.Cluster], p)
		}
	}
	for tier := range tierOf {
		if !judged[tier] {
			t.Fatalf("%s is used without a verdict:\n%s", tier, p)
		}
	}
}
