package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	v1 "github.com/weftmesh/weft/federation/v1"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the mesh on one screen: controllers, store, clusters, findings",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				s, err := c.GetStatus(ctx, &v1.GetStatusRequest{})
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, s)
				}
				printStatus(a.out, s)
				if len(s.GetFindings()) > 0 {
					a.next("weft check")
				}
				return nil
			})
		},
	}
}

func printStatus(w io.Writer, s *v1.GetStatusResponse) {
	clusters := cell{fmt.Sprintf("%d, all heard", s.GetClusters()), good}
	if s.GetClusters() == 0 {
		clusters = cell{"none yet", plain}
	} else if silent := s.GetClusters() - s.GetClustersFresh(); silent > 0 {
		clusters = cell{fmt.Sprintf("%d, %d silent", s.GetClusters(), silent), warn}
	}
	store := "external etcd " + strings.Join(s.GetStore().GetEndpoints(), ", ")
	if s.GetStore().GetEmbedded() {
		store = "embedded etcd"
	}
	store += fmt.Sprintf(" %s, %s of %s", s.GetStore().GetVersion(), bytesText(s.GetStore().GetSizeBytes()), bytesText(s.GetStore().GetQuotaBytes()))
	storeCell := cell{store, plain}
	if alarms := s.GetStore().GetAlarms(); len(alarms) > 0 {
		storeCell = cell{store + ", ALARM " + strings.Join(alarms, " "), bad}
	}
	fields := []field{
		{"Trust domain", text("%s", s.GetTrustDomain())},
		{"Revision", text("%s", revision(s.GetRevision()))},
		{"Clusters", clusters},
		{"Services", text("%d in %d exports", s.GetServices(), s.GetExports())},
		{"Policies", text("%d", s.GetPolicies())},
		{"Store", storeCell},
	}
	if s.GetRecovering() {
		fields = append(fields, field{"Recovering", cell{"yes: restored from a backup, nothing is removed until every cluster has reported", warn}})
	}
	printFields(w, fields)
	fmt.Fprintln(w)
	printTable(w, []column[*v1.Controller]{
		{title: "CONTROLLER", value: func(c *v1.Controller) cell { return text("%s", c.GetName()) }},
		{title: "ADDRESS", value: func(c *v1.Controller) cell { return text("%s", c.GetAddress()) }},
		{title: "LEADS", value: func(c *v1.Controller) cell {
			if c.GetLeader() {
				return cell{"yes", good}
			}
			return cell{text: "no"}
		}},
		{title: "SESSIONS", right: true, value: func(c *v1.Controller) cell { return text("%d", c.GetSessions()) }},
		{title: "REVISION", right: true, value: func(c *v1.Controller) cell { return text("%s", revision(c.GetRevision())) }},
		{title: "UP", right: true, value: func(c *v1.Controller) cell { return text("%s", age(time.Since(c.GetStarted().AsTime()))) }},
		{title: "VERSION", value: func(c *v1.Controller) cell { return text("%s", c.GetVersion()) }},
	}, s.GetControllers(), false)
	errs, warnings := countFindings(s.GetFindings())
	fmt.Fprintf(w, "\nFindings: %s, %s\n", count(errs, "error"), count(warnings, "warning"))
}

func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	default:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
}

// count is a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func countFindings(list []*v1.Finding) (errs, warnings int) {
	for _, f := range list {
		switch f.GetSeverity() {
		case v1.Severity_SEVERITY_ERROR:
			errs++
		case v1.Severity_SEVERITY_WARNING:
			warnings++
		default:
		}
	}
	return errs, warnings
}

func (a *app) checkCommand() *cobra.Command {
	var failOn string
	var all bool
	c := &cobra.Command{
		Use:   "check",
		Short: "List what is wrong in the mesh, causes first, with the way to mend it",
		Long: `Check lists every finding. What another finding causes is folded under it unless
--all is given. It exits with 1 if there is an error, or with --fail-on=warning
if there is a warning.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if failOn != "error" && failOn != "warning" && failOn != "never" {
				return usagef("--fail-on %q: choose error, warning or never", failOn)
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.List(ctx, &v1.ListRequest{Kind: v1.Kind_KIND_FINDING})
				if err != nil {
					return err
				}
				var list []*v1.Finding
				for _, o := range r.GetObjects() {
					list = append(list, o.GetFinding())
				}
				if f := mustFormat(a.format); f == formatTable || f == formatWide {
					printCheck(a.out, list, all)
				} else if err := printList(a, findingView(), r.GetRevision(), list, false); err != nil {
					return err
				}
				errs, warnings := countFindings(list)
				if failOn != "never" && errs > 0 || failOn == "warning" && warnings > 0 {
					return quietError{}
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&failOn, "fail-on", "error", "exit with 1 from this severity on: error, warning or never")
	c.Flags().BoolVar(&all, "all", false, "also show findings that another finding causes")
	_ = c.RegisterFlagCompletionFunc("fail-on", cobra.FixedCompletions([]string{"error", "warning", "never"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func printCheck(w io.Writer, list []*v1.Finding, all bool) {
	slices.SortStableFunc(list, func(x, y *v1.Finding) int { return int(y.GetSeverity()) - int(x.GetSeverity()) })
	present := map[string]bool{}
	for _, f := range list {
		present[f.GetCode()] = true
	}
	hidden := 0
	for _, f := range list {
		cause := slices.IndexFunc(f.GetDependsOn(), func(code string) bool { return present[code] })
		if cause >= 0 && !all {
			hidden++
			continue
		}
		s := severityCell(f)
		if colours(w) {
			s.text = s.tone.paint(s.text)
		}
		fmt.Fprintf(w, "%s  %s  %s\n    %s\n", f.GetCode(), s.text, f.GetSubject(), f.GetMessage())
		if f.GetFix() != "" {
			fmt.Fprintf(w, "    fix: %s\n", f.GetFix())
		}
	}
	if hidden > 0 {
		fmt.Fprintf(w, "%d more follow from these (show them with --all)\n", hidden)
	}
	errs, warnings := countFindings(list)
	if len(list) == 0 {
		fmt.Fprintln(w, "No findings: all is well.")
		return
	}
	fmt.Fprintf(w, "\n%s, %s, %s\n", count(errs, "error"), count(warnings, "warning"), count(len(list)-errs-warnings, "note"))
}

func (a *app) trustCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "trust",
		Short: "Show the trust domain: roots, authorities, their expiry, and who is denied",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				t, err := c.GetTrust(ctx, &v1.GetTrustRequest{})
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, t)
				}
				printTrust(a.out, t)
				return nil
			})
		},
	}
}

func printTrust(w io.Writer, t *v1.GetTrustResponse) {
	printFields(w, []field{
		{"Trust domain", text("spiffe://%s", t.GetTrustDomain())},
		{"CA hash", text("%s", t.GetCaHash())},
		{"Bundle", text("sequence %d, %d roots", t.GetBundle().GetSequence(), len(t.GetBundle().GetRoots()))},
	})
	fmt.Fprintln(w)
	printTable(w, []column[*v1.Authority]{
		{title: "AUTHORITY", value: func(x *v1.Authority) cell { return text("%s", x.GetKind()) }},
		{title: "REGION", value: func(x *v1.Authority) cell { return text("%s", x.GetRegion()) }},
		{title: "STATE", value: func(x *v1.Authority) cell { return text("%s", x.GetState()) }},
		{title: "EXPIRES", value: func(x *v1.Authority) cell {
			left := time.Until(x.GetNotAfter().AsTime())
			c := text("%s (in %s)", x.GetNotAfter().AsTime().Format(time.DateOnly), age(left))
			if life := x.GetNotAfter().AsTime().Sub(x.GetNotBefore().AsTime()); left < life/6 {
				c.tone = warn
			}
			if left <= 0 {
				c.tone = bad
			}
			return c
		}},
		{title: "ISSUED", right: true, value: func(x *v1.Authority) cell { return text("%d", x.GetIssued()) }},
		{title: "KEY ID", value: func(x *v1.Authority) cell { return text("%s", x.GetSubjectKeyId()) }},
	}, t.GetAuthorities(), false)
	if len(t.GetDenials()) == 0 {
		return
	}
	fmt.Fprintln(w)
	printTable(w, []column[*v1.Denial]{
		{title: "DENIED CLUSTER", value: func(d *v1.Denial) cell { return text("%s", d.GetCluster()) }},
		{title: "GENERATION", right: true, value: func(d *v1.Denial) cell { return text("%d", d.GetGeneration()) }},
		{title: "REASON", value: func(d *v1.Denial) cell { return text("%s", d.GetReason()) }},
	}, t.GetDenials(), false)
}
