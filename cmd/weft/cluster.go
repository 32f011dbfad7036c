package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weftmesh/weft/federation"
	v1 "github.com/weftmesh/weft/federation/v1"
)

func (a *app) clusterCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cluster",
		Short: "Register, list, describe, grant and deregister clusters",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.registerCommand(), a.tokenCommand(), a.clusterListCommand(), a.clusterDescribeCommand(), a.grantCommand(), a.deregisterCommand())
	return c
}

func (a *app) registerCommand() *cobra.Command {
	var (
		m        v1.Member
		grants   []string
		gateways []string
		ttl      time.Duration
	)
	c := &cobra.Command{
		Use:   "register NAME --region R --grant NS/NAME --gateway HOST:PORT",
		Short: "Let a new cluster into the mesh, and print the command to run in it",
		Long: `Register stores what the cluster may be and export, and prints one command
to run in that cluster. Its join token works once, for one key, and for 15
minutes unless --token-ttl says otherwise.`,
		Example: `  weft cluster register eu-1 --region eu --zone eu-a --grant 'shop/*' --gateway 203.0.113.7:15443`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			m.Cluster = args[0]
			if _, err := federation.ParseClusterID(m.GetCluster()); err != nil {
				return usageError{err}
			}
			for _, g := range grants {
				if _, err := federation.ParseGrant(g); err != nil {
					return usageError{err}
				}
			}
			m.Grants = grants
			for _, g := range gateways {
				addr, err := federation.ParseAddress(g)
				if err != nil {
					return usagef("--gateway: %w", err)
				}
				m.Gateways = append(m.Gateways, &v1.Address{Host: addr.Host, Port: uint32(addr.Port)})
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.RegisterCluster(ctx, &v1.RegisterClusterRequest{Member: &m, TokenTtl: durationpb.New(ttl)})
				if err != nil {
					return err
				}
				return a.printToken(r.GetCluster().GetMember().GetCluster(), "registered", r.GetToken(), r)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&m.Region, "region", "", "region it lies in")
	f.StringVar(&m.Zone, "zone", "", "zone it lies in")
	f.StringVar(&m.Network, "network", "", "network whose members reach each other's endpoints directly")
	f.StringSliceVar(&grants, "grant", nil, "services it may export, as NAMESPACE/NAME with * for any; repeat for more")
	f.StringSliceVar(&gateways, "gateway", nil, "address HOST:PORT of one of its gateways, as others reach it; repeat for more")
	f.StringVar(&m.Vips, "vips", "", "range of its clusterset addresses, for example 127.10.1.128/25")
	f.Int32Var(&m.MaxExports, "max-exports", 0, "most services it may export (default the mesh's limit)")
	f.DurationVar(&ttl, "token-ttl", 15*time.Minute, "how long the join token works")
	_ = c.MarkFlagRequired("region")
	return c
}

// joinCommand is the one line to run in a new cluster.
func joinCommand(t *v1.JoinToken) string {
	return fmt.Sprintf("weft-agent --controller %s --join %s --ca-hash %s",
		strings.Join(t.GetControllers(), ","), t.GetToken(), t.GetCaHash())
}

func (a *app) printToken(cluster, did string, t *v1.JoinToken, m protoMessage) error {
	switch f := mustFormat(a.format); {
	case f.structured():
		return printMessage(a.out, f, m)
	case f == formatName:
		fmt.Fprintf(a.out, "cluster/%s\n", cluster)
		return nil
	}
	a.say("cluster %s %s. Run this in it within %s:\n", cluster, did, age(time.Until(t.GetExpires().AsTime()).Round(time.Minute)))
	fmt.Fprintln(a.out, joinCommand(t))
	a.say("")
	a.next("weft get clusters -w")
	return nil
}

func (a *app) tokenCommand() *cobra.Command {
	var ttl time.Duration
	c := &cobra.Command{
		Use:   "token NAME",
		Short: "Make another join token for a registered cluster",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.CreateToken(ctx, &v1.CreateTokenRequest{Cluster: args[0], Ttl: durationpb.New(ttl)})
				if err != nil {
					return err
				}
				return a.printToken(args[0], "has a new join token", r.GetToken(), r)
			})
		},
	}
	c.Flags().DurationVar(&ttl, "ttl", 15*time.Minute, "how long the join token works")
	c.ValidArgsFunction = a.completeClusters
	return c
}

func (a *app) clusterListCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the clusters (the same as 'weft get clusters')",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			args := []string{"clusters"}
			get := a.getCommand()
			if watch {
				_ = get.Flags().Set("watch", "true")
			}
			get.SetContext(cmd.Context())
			return get.RunE(get, args)
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and print again whenever something changes")
	return c
}

func (a *app) clusterDescribeCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "describe NAME",
		Short:             "Show one cluster at length",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := findResource("cluster")
			if err != nil {
				return err
			}
			return a.describe(cmd.Context(), r, "", args[0])
		},
	}
}

func (a *app) grantCommand() *cobra.Command {
	var remove bool
	c := &cobra.Command{
		Use:   "grant NAME NS/NAME...",
		Short: "Allow a cluster to export services, or take that back with --remove",
		Example: `  weft cluster grant eu-1 'shop/*' media/video
  weft cluster grant eu-1 'shop/*' --remove`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, g := range args[1:] {
				if _, err := federation.ParseGrant(g); err != nil {
					return usageError{err}
				}
			}
			req := &v1.SetGrantsRequest{Cluster: args[0], Add: args[1:]}
			if remove {
				req.Add, req.Remove = nil, args[1:]
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.SetGrants(ctx, req)
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, r.GetCluster())
				}
				fmt.Fprintf(a.out, "cluster/%s may export %s\n", args[0], orNothing(r.GetCluster().GetMember().GetGrants()))
				a.next("weft get exports --cluster %s", args[0])
				return nil
			})
		},
	}
	c.Flags().BoolVar(&remove, "remove", false, "take the grants back; exports outside the rest are no longer used")
	c.ValidArgsFunction = a.completeClusters
	return c
}

func orNothing(list []string) string {
	if len(list) == 0 {
		return "nothing"
	}
	return strings.Join(list, ", ")
}

func (a *app) deregisterCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "deregister NAME",
		Short: "Take a cluster out of the mesh: withdraw its exports, deny its identities",
		Long: `Deregister withdraws what the cluster exports, denies its identities and
refuses its agent. Established connections to it end when they end, or when
their proxies renew their tunnels. To move traffic away first: weft drain NAME.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.DeregisterCluster(ctx, &v1.DeregisterClusterRequest{Cluster: args[0]})
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, r)
				}
				fmt.Fprintf(a.out, "cluster/%s deregistered, %d exports withdrawn (revision %s)\n", args[0], r.GetExportsWithdrawn(), revision(r.GetRevision()))
				a.next("weft check")
				return nil
			})
		},
	}
}
