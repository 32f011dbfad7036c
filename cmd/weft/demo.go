package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weftmesh/weft/e2e/demo"
)

func (a *app) demoCommand() *cobra.Command {
	var o demo.Options
	c := &cobra.Command{
		Use:   "demo",
		Short: "Run a whole mesh of three clusters on this machine, and break it",
		Long: `Demo starts a controller and three clusters as real processes on loopback, sends
a steady load through them, and plays five steps: steady, kill-backends, drain,
kill-controller, return. It says after each what the callers noticed, and why
the traffic went where it went. It exits with 0 only if every promise was kept,
and leaves nothing behind. It takes about a minute.`,
		Example: `  weft demo
  weft demo --steps steady,kill-backends
  weft demo --keep            # go on afterwards, to play with
  weft demo -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f := mustFormat(a.format)
			o.Out, o.Terminal = a.out, colours(a.out)
			if f.structured() {
				o.Out, o.Terminal = a.err, false
				if !isTerminal(a.err) {
					o.Out = io.Discard
				}
			}
			for _, s := range o.Steps {
				if !slices.Contains(demo.StepNames(), s) {
					return usagef("no step %q; there are %s", s, strings.Join(demo.StepNames(), ", "))
				}
			}
			report, err := demo.Run(cmd.Context(), o)
			if report != nil && f.structured() {
				err = errors.Join(err, printValue(a.out, f, report))
			}
			if err == nil && !report.OK {
				return quietError{}
			}
			return err
		},
	}
	fl := c.Flags()
	fl.StringSliceVar(&o.Steps, "steps", nil, "steps to play (default all: "+strings.Join(demo.StepNames(), ", ")+")")
	fl.BoolVar(&o.Keep, "keep", false, "leave the mesh running afterwards, until Ctrl-C")
	fl.IntVar(&o.Rate, "rate", 200, "requests per second")
	fl.StringVar(&o.Binaries, "binaries", "", "folder with Weft's programs (default beside this one, then PATH)")
	_ = c.RegisterFlagCompletionFunc("steps", cobra.FixedCompletions(demo.StepNames(), cobra.ShellCompDirectiveNoFileComp))
	c.AddCommand(a.demoBackendCommand())
	return c
}

// demoBackendCommand serves one backend of the demo; the demo starts it.
func (a *app) demoBackendCommand() *cobra.Command {
	var cluster, name, http, echo string
	c := &cobra.Command{
		Use:    "backend",
		Short:  "Serve one backend of the demo",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := demo.Backend(cmd.Context(), cluster, name, http, echo)
			if errors.Is(err, context.Canceled) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("backend %s/%s: %w", cluster, name, err)
			}
			return nil
		},
	}
	c.Flags().StringVar(&cluster, "cluster", "", "cluster it says it is in")
	c.Flags().StringVar(&name, "name", "", "its own name")
	c.Flags().StringVar(&http, "http", "", "address of its HTTP service")
	c.Flags().StringVar(&echo, "echo", "", "address of its echo service")
	return c
}
