package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	previousv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/federation"
)

// routeTable serves the own service ports that target chooses, in a checked
// table for those whom members and the export allow.
func (n *Node) routeTable(name string, exports []*Export, members []federation.ClusterID, target func(*Export, ExportPort) (cluster string, served bool)) (*Resource, error) {
	e := new(encoder)
	checked := name != localName
	table := &routev3.RouteConfiguration{Name: name}
	if checked {
		table.TypedPerFilterConfig = map[string]*anypb.Any{peersFilter: e.any(perRoute(peerPolicies(n.TrustDomain, members)))}
	}
	for _, x := range exports {
		for _, p := range x.Ports {
			if cluster, ok := target(x, p); ok {
				authority := Authority(x.Service, p.Number)
				host := virtualHost(e, authority, cluster)
				if checked {
					host.TypedPerFilterConfig = map[string]*anypb.Any{callersFilter: e.any(perRoute(callerPolicies(n.TrustDomain, x)))}
				}
				table.VirtualHosts = append(table.VirtualHosts, host)
			}
		}
	}
	unknown := unknownAuthority()
	if checked {
		// Whoever may open streams is told that there is no such service.
		unknown.TypedPerFilterConfig = map[string]*anypb.Any{callersFilter: e.any(perRoute(everyone()))}
	}
	table.VirtualHosts = append(table.VirtualHosts, unknown)
	return e.resource(TypeRoutes, name, table)
}

// virtualHost connects the streams for one authority to an endpoint, another
// one if that fails: one dead endpoint never makes the source eject the
// gateway.
func virtualHost(e *encoder, authority, cluster string) *routev3.VirtualHost {
	return &routev3.VirtualHost{
		Name:    authority,
		Domains: []string{authority},
		Routes: []*routev3.Route{{
			Match: connectMatch(),
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{
				ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
				Timeout:          seconds(0),
				IdleTimeout:      seconds(0),
				UpgradeConfigs: []*routev3.RouteAction_UpgradeConfig{{
					UpgradeType: "CONNECT", ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{},
				}},
				RetryPolicy: &routev3.RetryPolicy{
					RetryOn:    "connect-failure",
					NumRetries: u32(attempts - 1),
					RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
						Name: "envoy.retry_host_predicates.previous_hosts",
						ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{
							TypedConfig: e.any(&previousv3.PreviousHostsPredicate{}),
						},
					}},
					HostSelectionRetryMaxAttempts: attempts,
					RetryBackOff: &routev3.RetryPolicy_RetryBackOff{
						BaseInterval: seconds(firstBackoff), MaxInterval: seconds(lastBackoff),
					},
				},
			}},
			ResponseHeadersToAdd: []*corev3.HeaderValueOption{
				header(HeaderEndpoint, "%UPSTREAM_REMOTE_ADDRESS%"),
				header(HeaderAttempts, "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
			},
		}},
	}
}

func connectMatch() *routev3.RouteMatch {
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}}
}

func unknownAuthority() *routev3.VirtualHost {
	return &routev3.VirtualHost{
		Name:    "unknown",
		Domains: []string{"*"},
		Routes: []*routev3.Route{{
			Match:  connectMatch(),
			Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 404}},
		}},
	}
}

func perRoute(rules *rbacv3.RBAC) *rbacfilterv3.RBACPerRoute {
	return &rbacfilterv3.RBACPerRoute{Rbac: &rbacfilterv3.RBAC{Rules: rules}}
}

// allow makes rules that admit the principals, and nobody if there are none.
func allow(policies map[string][]*rbacv3.Principal) *rbacv3.RBAC {
	rules := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: make(map[string]*rbacv3.Policy, len(policies))}
	for name, principals := range policies {
		rules.Policies[name] = &rbacv3.Policy{
			Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_Any{Any: true}}},
			Principals:  principals,
		}
	}
	return rules
}

func everyone() *rbacv3.RBAC {
	return allow(map[string][]*rbacv3.Principal{"everyone": {{Identifier: &rbacv3.Principal_Any{Any: true}}}})
}

// peerPolicies: a gateway may speak for workloads of its own cluster, a
// workload for nobody but itself, and it needs no header for that.
func peerPolicies(td spiffeid.TrustDomain, members []federation.ClusterID) *rbacv3.RBAC {
	policies := make(map[string][]*rbacv3.Principal, len(members))
	for _, c := range members {
		sans := clusterSANs(td, c)
		policies[string(c)] = []*rbacv3.Principal{
			both(authenticated(sans[0]), either(not(callerHeader("")), callerHeader(workloadPrefix(td, c)))),
			both(authenticated(sans[1]), not(callerHeader(""))),
		}
	}
	return allow(policies)
}

// callerPolicies are the clusters that may use one export.
func callerPolicies(td spiffeid.TrustDomain, x *Export) *rbacv3.RBAC {
	if x.AllCallers {
		return everyone()
	}
	policies := make(map[string][]*rbacv3.Principal, len(x.Callers))
	for _, c := range x.Callers {
		for _, m := range clusterSANs(td, c) {
			policies[string(c)] = append(policies[string(c)], authenticated(m))
		}
	}
	return allow(policies)
}

func authenticated(m Match) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{
		Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: stringMatcher(m)},
	}}
}

// callerHeader matches requests that assert a caller: any, or one whose ID
// begins with prefix.
func callerHeader(prefix string) *rbacv3.Principal {
	m := &routev3.HeaderMatcher{Name: HeaderCaller}
	if prefix == "" {
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
	} else {
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: stringMatcher(Match{Prefix: prefix})}
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Header{Header: m}}
}

func both(ps ...*rbacv3.Principal) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: ps}}}
}

func either(ps ...*rbacv3.Principal) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ps}}}
}

func not(p *rbacv3.Principal) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: p}}
}
