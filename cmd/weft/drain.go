package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "github.com/weftmesh/weft/federation/v1"
)

func (a *app) drainCommand() *cobra.Command {
	var over, closeExisting time.Duration
	var noWait, force bool
	c := &cobra.Command{
		Use:   "drain CLUSTER",
		Short: "Move new traffic away from a cluster, step by step",
		Long: `Drain lowers the cluster's share of new connections to nothing, evenly over the
given time. Established connections go on until they end, or until
--close-existing has passed since the share reached 0.`,
		Example: `  weft drain eu-1 --over 30s
  weft drain eu-1 --over 10m --close-existing 1h`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &v1.DrainRequest{Cluster: args[0], Over: durationpb.New(over), Force: force}
			if cmd.Flags().Changed("close-existing") {
				req.CloseExistingAfter = durationpb.New(closeExisting)
			}
			err := a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.Drain(ctx, req)
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, r)
				}
				fmt.Fprintf(a.out, "cluster/%s draining over %s\n", args[0], over)
				return nil
			})
			if err != nil || noWait || over == 0 {
				return err
			}
			if err := a.followShare(cmd.Context(), args[0], 0); err != nil {
				return err
			}
			a.next("weft undrain %s", args[0])
			return nil
		},
	}
	c.Flags().DurationVar(&over, "over", 30*time.Second, "time in which the share goes to 0")
	c.Flags().DurationVar(&closeExisting, "close-existing", 0, "close what is still connected this long after the share reached 0")
	c.Flags().BoolVar(&force, "force", false, "drain it although a service has nowhere else to go; such traffic stays")
	c.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until it is done")
	return c
}

func (a *app) undrainCommand() *cobra.Command {
	var over time.Duration
	c := &cobra.Command{
		Use:               "undrain CLUSTER",
		Short:             "Give a drained cluster its share back",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			err := a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				r, err := c.Undrain(ctx, &v1.UndrainRequest{Cluster: args[0], Over: durationpb.New(over)})
				if err != nil {
					return err
				}
				if f := mustFormat(a.format); f.structured() {
					return printMessage(a.out, f, r)
				}
				fmt.Fprintf(a.out, "cluster/%s gets its share back (revision %s)\n", args[0], revision(r.GetRevision()))
				return nil
			})
			if err != nil || over == 0 {
				return err
			}
			return a.followShare(cmd.Context(), args[0], 1000)
		},
	}
	c.Flags().DurationVar(&over, "over", 0, "time in which the share comes back (default at once)")
	return c
}

// followShare shows a cluster's share until it is at goal per mille.
func (a *app) followShare(ctx context.Context, cluster string, goal int32) error {
	bar := isTerminal(a.err)
	last := int32(-1)
	err := a.stream(ctx, func(ctx context.Context, c v1.AdminClient) error {
		s, err := c.Watch(ctx, &v1.WatchRequest{List: &v1.ListRequest{Kind: v1.Kind_KIND_CLUSTER, Name: cluster}})
		if err != nil {
			return err
		}
		for {
			r, err := s.Recv()
			if err != nil {
				return err
			}
			if len(r.GetList().GetObjects()) == 0 {
				return fmt.Errorf("cluster %s is no longer registered", cluster)
			}
			share := int32(1000)
			if d := r.GetList().GetObjects()[0].GetCluster().GetDrain(); d != nil {
				share = d.GetRemainingPerMille()
			}
			switch {
			case bar:
				n := int(share) * 30 / 1000
				fmt.Fprintf(a.err, "\r%s  [%s%s] %6s", cluster, strings.Repeat("#", n), strings.Repeat(".", 30-n), perMille(share))
			case last < 0 || abs(share-last) >= 200 || share == goal:
				a.say("%s has %s of its share", cluster, perMille(share))
				last = share
			}
			if share == goal {
				return nil
			}
		}
	})
	if bar {
		fmt.Fprintln(a.err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("stopped waiting; it goes on all the same: see 'weft get clusters -w'")
	}
	return err
}

func abs(n int32) int32 {
	if n < 0 {
		return -n
	}
	return n
}
