package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/manifest"
	v1 "github.com/weftmesh/weft/federation/v1"
)

func (a *app) applyCommand() *cobra.Command {
	var files []string
	var dryRun bool
	c := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create or change failover policies from YAML",
		Example: `  weft apply -f policy.yaml
  weft diff -f policy.yaml        # what would change, and for whom`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			policies, bad, err := a.readPolicies(files)
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				var errs []error
				for _, p := range policies {
					errs = append(errs, a.applyOne(ctx, c, p, dryRun))
				}
				return errors.Join(append(errs, bad)...)
			})
		},
	}
	c.Flags().StringSliceVarP(&files, "filename", "f", nil, "file to read, - for standard input; repeat for more")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "check and say what would happen, change nothing")
	_ = c.MarkFlagRequired("filename")
	return c
}

func (a *app) applyOne(ctx context.Context, c v1.AdminClient, p federation.Policy, dryRun bool) error {
	r, err := c.ApplyPolicy(ctx, &v1.ApplyPolicyRequest{Policy: v1.EncodePolicy(p), DryRun: dryRun})
	if err != nil {
		return fmt.Errorf("policy %s: %s", p.ID, message(err))
	}
	switch f := mustFormat(a.format); {
	case f.structured():
		err = printMessage(a.out, f, r)
	case f == formatName:
		fmt.Fprintf(a.out, "policy/%s\n", p.ID)
	default:
		suffix := ""
		if dryRun {
			suffix = " (dry run)"
		}
		fmt.Fprintf(a.out, "policy/%s %s%s\n", p.ID, r.GetOutcome(), suffix)
	}
	for _, f := range r.GetFindings() {
		a.say("%s %s: %s", f.GetCode(), severityCell(f).text, f.GetMessage())
	}
	if service := p.TargetService; service != "" && !dryRun {
		a.next("weft why %s/%s --from CLUSTER", p.TargetNamespace, service)
	}
	return err
}

// readPolicies reads every policy of the files. Documents that cannot be used
// come back as one error beside the good ones: one mistake does not keep the
// rest from being applied.
func (a *app) readPolicies(files []string) ([]federation.Policy, error, error) {
	var policies []federation.Policy
	var bad []error
	for _, name := range files {
		var data []byte
		var err error
		if name == "-" {
			data, err = io.ReadAll(io.LimitReader(a.in, manifest.MaxSize+1))
			name = "standard input"
		} else {
			data, err = readFile(name)
		}
		if err != nil {
			return nil, nil, err
		}
		docs, wrong := manifest.Decode(name, data)
		for _, w := range wrong {
			bad = append(bad, w)
		}
		for _, d := range docs {
			if d.Policy == nil {
				bad = append(bad, fmt.Errorf("%s:%d: %s %s is not applied: put it into the source folder of its cluster's agent", d.File, d.Line, d.Kind(), d.Name()))
				continue
			}
			policies = append(policies, *d.Policy)
		}
	}
	if len(policies) == 0 && len(bad) == 0 {
		bad = append(bad, fmt.Errorf("%s: no object in it", strings.Join(files, ", ")))
	}
	if len(policies) == 0 {
		return nil, nil, errors.Join(bad...)
	}
	return policies, errors.Join(bad...), nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, manifest.MaxSize+1))
}

func (a *app) deleteCommand() *cobra.Command {
	var files []string
	var dryRun bool
	c := &cobra.Command{
		Use:   "delete policy NS/NAME... | delete -f FILE",
		Short: "Delete failover policies",
		Example: `  weft delete policy shop/payments
  weft delete -f policy.yaml`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var ids []federation.ServiceID
			switch {
			case len(files) > 0 && len(args) == 0:
				policies, bad, err := a.readPolicies(files)
				if err = errors.Join(err, bad); err != nil {
					return err
				}
				for _, p := range policies {
					ids = append(ids, federation.ServiceID{Namespace: p.ID.Namespace, Name: p.ID.Name})
				}
			case len(files) == 0 && len(args) >= 2 && (args[0] == "policy" || args[0] == "policies"):
				for _, arg := range args[1:] {
					ns, name, ok := strings.Cut(arg, "/")
					if !ok {
						return usagef("policy %q: write NAMESPACE/NAME", arg)
					}
					ids = append(ids, federation.ServiceID{Namespace: ns, Name: name})
				}
			default:
				return usagef("say what to delete: 'weft delete policy NS/NAME' or 'weft delete -f FILE'; clusters leave with 'weft cluster deregister NAME'")
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				var errs []error
				for _, id := range ids {
					r, err := c.DeletePolicy(ctx, &v1.DeletePolicyRequest{Namespace: id.Namespace, Name: id.Name, DryRun: dryRun})
					switch f := mustFormat(a.format); {
					case err != nil:
						errs = append(errs, fmt.Errorf("policy %s: %s", id, message(err)))
					case f.structured():
						errs = append(errs, printMessage(a.out, f, r))
					default:
						fmt.Fprintf(a.out, "policy/%s deleted\n", id)
					}
				}
				return errors.Join(errs...)
			})
		},
	}
	c.Flags().StringSliceVarP(&files, "filename", "f", nil, "file whose policies to delete, - for standard input")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "check only, change nothing")
	return c
}

func (a *app) diffCommand() *cobra.Command {
	var files []string
	c := &cobra.Command{
		Use:   "diff -f FILE",
		Short: "Show what applying policies would change, and whose traffic would move",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			policies, bad, err := a.readPolicies(files)
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				errs := []error{bad}
				for _, p := range policies {
					r, err := c.ApplyPolicy(ctx, &v1.ApplyPolicyRequest{Policy: v1.EncodePolicy(p), DryRun: true})
					switch f := mustFormat(a.format); {
					case err != nil:
						errs = append(errs, fmt.Errorf("policy %s: %s", p.ID, message(err)))
					case f.structured():
						errs = append(errs, printMessage(a.out, f, r))
					default:
						errs = append(errs, a.printDiff(p, r))
					}
				}
				return errors.Join(errs...)
			})
		},
	}
	c.Flags().StringSliceVarP(&files, "filename", "f", nil, "file to read, - for standard input; repeat for more")
	_ = c.MarkFlagRequired("filename")
	return c
}

func (a *app) printDiff(p federation.Policy, r *v1.ApplyPolicyResponse) error {
	var before string
	if r.GetBefore() != nil {
		old, err := r.GetBefore().Decode()
		if err != nil {
			return err
		}
		before = string(manifest.EncodePolicy(old))
	}
	after := string(manifest.EncodePolicy(p))
	fmt.Fprintf(a.out, "policy/%s would be %s\n", p.ID, r.GetOutcome())
	for _, l := range lineDiff(before, after) {
		fmt.Fprintln(a.out, colourDiff(l, colours(a.out)))
	}
	for _, ch := range r.GetChanges() {
		fmt.Fprintf(a.out, "\n%s/%s from %s\n", ch.GetAfter().GetNamespace(), ch.GetAfter().GetName(), ch.GetAfter().GetCallerCluster())
		for _, l := range lineDiff(planLines(ch.GetBefore()), planLines(ch.GetAfter())) {
			fmt.Fprintln(a.out, colourDiff(l, colours(a.out)))
		}
	}
	if n := r.GetMoreChanges(); n > 0 {
		fmt.Fprintf(a.out, "\nand %d more plans\n", n)
	}
	return nil
}

// planLines is a plan with one candidate a line, for comparing.
func planLines(p *v1.Plan) string {
	var out strings.Builder
	for _, v := range p.GetVerdicts() {
		tier := "-"
		if v.GetTier() >= 0 {
			tier = fmt.Sprint(v.GetTier())
		}
		fmt.Fprintf(&out, "tier %s  %-12s %6s  %s\n", tier, v.GetCluster(), perMille(v.GetSharePerMille()), v.GetWhy())
	}
	return out.String()
}

func colourDiff(line string, on bool) string {
	if !on || line == "" {
		return line
	}
	switch line[0] {
	case '+':
		return good.paint(line)
	case '-':
		return bad.paint(line)
	default:
		return line
	}
}

// lineDiff compares two texts line by line: common lines begin with a space,
// the others with - or +. It is quadratic, and meant for policies and plans.
func lineDiff(before, after string) []string {
	split := func(s string) []string {
		if s == "" {
			return nil
		}
		return strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	}
	x, y := split(before), split(after)
	// common[i][j] is the length of the longest common subsequence of x[i:], y[j:].
	common := make([][]int, len(x)+1)
	for i := range common {
		common[i] = make([]int, len(y)+1)
	}
	for i := range slices.Backward(x) {
		for j := range slices.Backward(y) {
			if x[i] == y[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out []string
	i, j := 0, 0
	for i < len(x) || j < len(y) {
		switch {
		case i < len(x) && j < len(y) && x[i] == y[j]:
			out = append(out, " "+x[i])
			i, j = i+1, j+1
		case j == len(y) || i < len(x) && common[i+1][j] >= common[i][j+1]:
			out = append(out, "-"+x[i])
			i++
		default:
			out = append(out, "+"+y[j])
			j++
		}
	}
	return out
}
