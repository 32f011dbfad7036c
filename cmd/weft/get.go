package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	v1 "github.com/weftmesh/weft/federation/v1"
)

// resource is one of the kinds that get and describe know.
type resource struct {
	plural, singular string
	kind             v1.Kind
	namespaced       bool
	// list prints what a list request found.
	list func(a *app, r *v1.ListResponse, one bool) error
	// describe prints one object at length.
	describe func(w io.Writer, o *v1.Object)
}

func resources() []resource {
	return []resource{
		{"clusters", "cluster", v1.Kind_KIND_CLUSTER, false, lister((*v1.Object).GetCluster, clusterView()), describeCluster},
		{"services", "service", v1.Kind_KIND_SERVICE, true, lister((*v1.Object).GetService, serviceView()), describeService},
		{"exports", "export", v1.Kind_KIND_EXPORT, true, lister((*v1.Object).GetExport, exportView()), describeExport},
		{"gateways", "gateway", v1.Kind_KIND_GATEWAY, false, lister((*v1.Object).GetGateway, gatewayView()), describeGateway},
		{"policies", "policy", v1.Kind_KIND_POLICY, true, lister((*v1.Object).GetPolicy, policyView()), describePolicy},
		{"findings", "finding", v1.Kind_KIND_FINDING, false, lister((*v1.Object).GetFinding, findingView()), describeFinding},
	}
}

func findResource(name string) (resource, error) {
	var known []string
	for _, r := range resources() {
		if name == r.plural || name == r.singular {
			return r, nil
		}
		known = append(known, r.plural)
	}
	return resource{}, usagef("no kind %q; there are %s", name, strings.Join(known, ", "))
}

// lister adapts a kind's view to the objects of a response.
func lister[T interface {
	comparable
	protoMessage
}](pick func(*v1.Object) T, v view[T]) func(*app, *v1.ListResponse, bool) error {
	return func(a *app, r *v1.ListResponse, one bool) error {
		var zero T
		items := make([]T, 0, len(r.GetObjects()))
		for _, o := range r.GetObjects() {
			if it := pick(o); it != zero {
				items = append(items, it)
			}
		}
		return printList(a, v, r.GetRevision(), items, one)
	}
}

func (a *app) getCommand() *cobra.Command {
	var namespace, cluster string
	var watch bool
	c := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "List clusters, services, exports, gateways, policies or findings",
		Example: `  weft get clusters
  weft get services -n shop -o wide
  weft get policies shop/payments -o yaml
  weft get exports --cluster eu-1 -w`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := findResource(args[0])
			if err != nil {
				return err
			}
			req := &v1.ListRequest{Kind: r.kind, Namespace: namespace, Cluster: cluster}
			one := len(args) == 2
			if one {
				if err := nameOf(r, args[1], req); err != nil {
					return err
				}
			}
			if watch {
				return a.watch(cmd.Context(), r, req, one)
			}
			return a.call(cmd.Context(), func(ctx context.Context, c v1.AdminClient) error {
				resp, err := c.List(ctx, req)
				if err != nil {
					return err
				}
				if one && len(resp.GetObjects()) == 0 {
					return fmt.Errorf("no %s %q; see 'weft get %s'", r.singular, args[1], r.plural)
				}
				if len(resp.GetObjects()) == 0 && !mustFormat(a.format).structured() {
					a.say("no %s%s", r.plural, emptyHint(r.kind))
					return nil
				}
				return r.list(a, resp, one)
			})
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "only of this namespace")
	c.Flags().StringVar(&cluster, "cluster", "", "only of this cluster")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and print again whenever something changes")
	c.ValidArgsFunction = a.completeObjects
	return c
}

// emptyHint is what to do when there is nothing yet.
func emptyHint(k v1.Kind) string {
	switch k {
	case v1.Kind_KIND_CLUSTER:
		return " yet: register one with 'weft cluster register NAME --region R --grant NS/NAME --gateway HOST:PORT'"
	case v1.Kind_KIND_POLICY:
		return ": without one, traffic stays in its cluster, then its region, then goes anywhere"
	case v1.Kind_KIND_SERVICE, v1.Kind_KIND_EXPORT:
		return " yet: put a Service with 'export: true' into an agent's source folder"
	case v1.Kind_KIND_FINDING:
		return ": all is well"
	default:
		return ""
	}
}

// nameOf reads NAME, or NAMESPACE/NAME for kinds that have namespaces.
func nameOf(r resource, arg string, req *v1.ListRequest) error {
	switch ns, name, ok := strings.Cut(arg, "/"); {
	case r.namespaced && ok:
		req.Namespace, req.Name = ns, name
	case r.namespaced && req.GetNamespace() == "":
		return usagef("%s %q: write NAMESPACE/NAME, or give the namespace with -n", r.singular, arg)
	default:
		req.Name = arg
	}
	return nil
}

// watch prints the list each time that it differs.
func (a *app) watch(ctx context.Context, r resource, req *v1.ListRequest, one bool) error {
	return a.stream(ctx, func(ctx context.Context, c v1.AdminClient) error {
		s, err := c.Watch(ctx, &v1.WatchRequest{List: req})
		if err != nil {
			return err
		}
		for n := 0; ; n++ {
			resp, err := s.Recv()
			if err != nil {
				return err
			}
			if f := mustFormat(a.format); n > 0 && f != formatName && !f.structured() {
				fmt.Fprintf(a.out, "\n")
			}
			if f := mustFormat(a.format); !f.structured() && f != formatName && isTerminal(a.out) {
				fmt.Fprintf(a.out, "%s  revision %s\n", time.Now().Format(time.TimeOnly), revision(resp.GetList().GetRevision()))
			}
			if err := r.list(a, resp.GetList(), one); err != nil {
				return err
			}
		}
	})
}

func (a *app) describeCommand() *cobra.Command {
	var namespace string
	c := &cobra.Command{
		Use:   "describe KIND NAME",
		Short: "Show one cluster, service, export, gateway, policy or finding at length",
		Example: `  weft describe service shop/payments
  weft describe cluster eu-1`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := findResource(args[0])
			if err != nil {
				return err
			}
			return a.describe(cmd.Context(), r, namespace, args[1])
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace of NAME")
	c.ValidArgsFunction = a.completeObjects
	return c
}

func (a *app) describe(ctx context.Context, r resource, namespace, name string) error {
	req := &v1.ListRequest{Kind: r.kind, Namespace: namespace}
	if err := nameOf(r, name, req); err != nil {
		return err
	}
	return a.call(ctx, func(ctx context.Context, c v1.AdminClient) error {
		resp, err := c.List(ctx, req)
		if err != nil {
			return err
		}
		if len(resp.GetObjects()) == 0 {
			return fmt.Errorf("no %s %q; see 'weft get %s'", r.singular, name, r.plural)
		}
		if f := mustFormat(a.format); f != formatTable && f != formatWide {
			return r.list(a, resp, true)
		}
		for i, o := range resp.GetObjects() {
			if i > 0 {
				fmt.Fprintln(a.out)
			}
			r.describe(a.out, o)
		}
		return nil
	})
}

// mustFormat is the format of a string that the root command has checked.
func mustFormat(s string) format {
	f, err := parseFormat(s)
	if err != nil {
		return formatTable
	}
	return f
}
