package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/federation"
	v1 "github.com/weftmesh/weft/federation/v1"
)

// parseServicePort reads NS/NAME or NS/NAME:PORT.
func parseServicePort(s string) (federation.ServiceID, uint16, error) {
	name, port, has := strings.Cut(s, ":")
	id, err := federation.ParseServiceID(name)
	if err != nil {
		return id, 0, usageError{err}
	}
	if !has {
		return id, 0, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return id, 0, usagef("service %q: the port must be a number from 1 to 65535", s)
	}
	return id, uint16(n), nil
}

func (a *app) whyCommand() *cobra.Command {
	var from, caller string
	c := &cobra.Command{
		Use:   "why SERVICE --from CLUSTER",
		Short: "Say where a service's traffic goes from a cluster, and why",
		Long: `Why shows the plan that a cluster's proxies follow for a service: its tiers and
shares, every candidate with the reason for which it is used or not, the policy,
and whether the proxies have acknowledged it. The answer comes from the
cluster's own agent; where that is away, the controller predicts it and says so.`,
		Example: `  weft why shop/payments --from eu-1
  weft why shop/payments:8080 --from eu-1 -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, port, err := parseServicePort(args[0])
			if err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.Why(ctx, &v1.WhyRequest{Namespace: id.Namespace, Name: id.Name, Port: uint32(port), From: from, Caller: caller})
				if err != nil {
					return err
				}
				switch f := mustFormat(a.format); {
				case f.structured():
					return printMessage(a.out, f, r)
				case f == formatName:
					for _, v := range r.GetPlan().GetVerdicts() {
						if v.GetTier() == 0 {
							fmt.Fprintf(a.out, "cluster/%s\n", v.GetCluster())
						}
					}
					return nil
				default:
					printWhy(a.out, r, f == formatWide)
					return nil
				}
			})
		},
	}
	c.Flags().StringVar(&from, "from", "", "cluster whose callers are meant")
	c.Flags().StringVar(&caller, "caller", "", "SPIFFE ID of the caller (default: one without an identity)")
	_ = c.MarkFlagRequired("from")
	c.ValidArgsFunction = a.completeServices
	_ = c.RegisterFlagCompletionFunc("from", a.completeClusters)
	return c
}

// printWhy is the plan as a person reads it.
func printWhy(w io.Writer, r *v1.WhyResponse, wide bool) {
	p := r.GetPlan()
	policy := p.GetPolicy()
	if policy == "" {
		policy = "none (same cluster, then same region, then anywhere)"
	}
	port := ""
	if p.GetPort() != 0 {
		port = fmt.Sprintf(":%d", p.GetPort())
	}
	fmt.Fprintf(w, "%s/%s%s  from %s   catalog %s   policy %s\n\n", p.GetNamespace(), p.GetName(), port, p.GetCallerCluster(), revision(p.GetRevision()), policy)
	if len(p.GetVerdicts()) == 0 {
		fmt.Fprintf(w, "No cluster exports it to %s.\n", p.GetCallerCluster())
	} else {
		printTable(w, verdictColumns(), p.GetVerdicts(), wide)
	}
	fmt.Fprintln(w)
	if r.GetPredicted() {
		fmt.Fprintf(w, "Predicted by the controller: %s.\n", r.GetPredictedBecause())
		return
	}
	if len(r.GetProxies()) == 0 {
		fmt.Fprintf(w, "No proxy in %s is connected to its agent.\n", p.GetCallerCluster())
		return
	}
	for _, g := range r.GetProxies() {
		switch {
		case g.GetNack() != "":
			fmt.Fprintf(w, "%s refuses it: %s\n", g.GetName(), g.GetNack())
		case g.GetAcked():
			fmt.Fprintf(w, "%s has applied this (acked revision %s).\n", g.GetName(), revision(g.GetRevision()))
		default:
			fmt.Fprintf(w, "%s has not acknowledged this yet (it is at revision %s).\n", g.GetName(), revision(g.GetRevision()))
		}
	}
}

func verdictColumns() []column[*v1.Verdict] {
	return []column[*v1.Verdict]{
		{title: "TIER", value: func(v *v1.Verdict) cell {
			if v.GetTier() < 0 {
				return cell{}
			}
			return text("%d", v.GetTier())
		}},
		{title: "CLUSTER", value: func(v *v1.Verdict) cell { return text("%s", v.GetCluster()) }},
		{title: "LOCALITY", value: func(v *v1.Verdict) cell {
			return text("%s", strings.Trim(v.GetRegion()+"/"+v.GetZone(), "/"))
		}},
		{title: "READY", right: true, value: func(v *v1.Verdict) cell {
			return readyCell(v.GetReadiness().GetReady(), v.GetReadiness().GetTotal())
		}},
		{title: "SHARE", right: true, value: func(v *v1.Verdict) cell {
			if v.GetTier() < 0 {
				return cell{}
			}
			return text("%s", perMille(v.GetSharePerMille()))
		}},
		{title: "WHY", value: func(v *v1.Verdict) cell { return text("%s", v.GetWhy()) }},
		{title: "MODE", wide: true, value: func(v *v1.Verdict) cell { return text("%s", modeName(v.GetMode())) }},
		{title: "GATEWAYS", wide: true, value: func(v *v1.Verdict) cell { return text("%s", addresses(v.GetGateways())) }},
	}
}

func (a *app) callCommand() *cobra.Command {
	var req v1.CallRequest
	c := &cobra.Command{
		Use:   "call SERVICE --from CLUSTER",
		Short: "Send one real request through the mesh, and show its path",
		Example: `  weft call shop/payments --from eu-1
  weft call shop/payments:8080 --from eu-1 --path /healthz`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, port, err := parseServicePort(args[0])
			if err != nil {
				return err
			}
			req.Namespace, req.Name, req.Port = id.Namespace, id.Name, uint32(port)
			req.Timeout = durationpb.New(a.timeout)
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.Call(ctx, &req)
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					err = printMessage(a.out, f, r)
				} else {
					printCall(a.out, args[0], req.GetFrom(), r)
				}
				if err == nil && (r.GetError() != "" || r.GetStatus() >= 500) {
					a.next("weft why %s --from %s", args[0], req.GetFrom())
					return quietError{}
				}
				return err
			})
		},
	}
	c.Flags().StringVar(&req.From, "from", "", "cluster to call from")
	c.Flags().StringVar(&req.Path, "path", "/", "path of the HTTP request")
	_ = c.MarkFlagRequired("from")
	c.ValidArgsFunction = a.completeServices
	_ = c.RegisterFlagCompletionFunc("from", a.completeClusters)
	return c
}

func printCall(w io.Writer, service, from string, r *v1.CallResponse) {
	outcome := cell{fmt.Sprintf("HTTP %d in %s", r.GetStatus(), r.GetDuration().AsDuration().Round(10_000)), good}
	if r.GetError() != "" {
		outcome = cell{r.GetError(), bad}
	} else if r.GetStatus() >= 500 {
		outcome.tone = bad
	}
	fields := []field{{"Call", text("%s from %s", service, from)}, {"Outcome", outcome}}
	if x := r.GetAccess(); x != nil {
		path := from
		if x.GetCluster() != from {
			path += " -> gateway " + x.GetGateway() + " of " + x.GetCluster()
		}
		if x.GetEndpoint() != "" {
			path += " -> endpoint " + x.GetEndpoint()
		}
		fields = append(fields,
			field{"Path", text("%s", path)},
			field{"Tier, attempts", text("%d, %d", x.GetTier(), x.GetAttempts())},
			field{"Peer", text("%s", x.GetPeer())},
			field{"Decision", text("%s", x.GetDecision())},
			field{"Revision", text("%s", x.GetRevision())},
		)
	}
	printFields(w, fields)
	if body := strings.TrimSpace(r.GetBody()); body != "" {
		fmt.Fprintf(w, "\n%s\n", body)
	}
}
