package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weftmesh/weft/federation/access"
	v1 "github.com/weftmesh/weft/federation/v1"
)

// completionTimeout bounds a look-up of live names while a person types.
const completionTimeout = 700 * time.Millisecond

func (a *app) completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	path, err := a.contextsPath()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := access.Load(path)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, x := range c.Contexts {
		names = append(names, x.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// names asks the controller for the names of a kind, quietly.
func (a *app) names(ctx context.Context, kind v1.Kind) []string {
	a.timeout = completionTimeout
	var names []string
	_ = a.call(ctx, func(ctx context.Context, c v1.AdminClient) error {
		r, err := c.List(ctx, &v1.ListRequest{Kind: kind})
		for _, o := range r.GetObjects() {
			names = append(names, objectName(o))
		}
		return err
	})
	return names
}

func objectName(o *v1.Object) string {
	switch x := o.GetObject().(type) {
	case *v1.Object_Cluster:
		return x.Cluster.GetMember().GetCluster()
	case *v1.Object_Service:
		return serviceName(x.Service)
	case *v1.Object_Export:
		return exportName(x.Export)
	case *v1.Object_Gateway:
		return gatewayName(x.Gateway)
	case *v1.Object_Policy:
		return policyName(x.Policy)
	case *v1.Object_Finding:
		return x.Finding.GetCode()
	default:
		return ""
	}
}

func (a *app) completeClusters(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.names(c.Context(), v1.Kind_KIND_CLUSTER), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeServices(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.names(c.Context(), v1.Kind_KIND_SERVICE), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeObjects(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		var kinds []string
		for _, r := range resources() {
			kinds = append(kinds, r.plural)
		}
		return kinds, cobra.ShellCompDirectiveNoFileComp
	case 1:
		if r, err := findResource(args[0]); err == nil {
			return a.names(c.Context(), r.kind), cobra.ShellCompDirectiveNoFileComp
		}
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// buildVersion is the linker's version, else what the Go build recorded.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

func (a *app) versionCommand() *cobra.Command {
	var client bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this CLI and of the controllers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := map[string]any{"client": buildVersion(), "go": runtime.Version()}
			var controllers []string
			if !client {
				a.timeout = min(a.timeout, 3*time.Second)
				err := a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
					s, err := c.GetStatus(ctx, &v1.GetStatusRequest{})
					for _, x := range s.GetControllers() {
						controllers = append(controllers, x.GetName()+" "+x.GetVersion())
					}
					return err
				})
				if err != nil {
					a.say("no controller's version: %s", message(err))
				}
				v["controllers"] = controllers
			}
			if f := mustFormat(a.format); f.structured() {
				return printValue(a.out, f, v)
			}
			fmt.Fprintf(a.out, "weft %s (%s)\n", buildVersion(), runtime.Version())
			if len(controllers) > 0 {
				fmt.Fprintf(a.out, "controllers: %s\n", strings.Join(controllers, ", "))
			}
			return nil
		},
	}
	c.Flags().BoolVar(&client, "client", false, "only this CLI's version; ask no controller")
	return c
}
