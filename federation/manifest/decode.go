package manifest

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/weftmesh/weft/federation"
)

func (d *decoder) policy(spec *yaml.Node, p *federation.Policy) {
	before := len(d.err.Problems)
	d.mapping(spec, "spec", fields{
		"target": func(n *yaml.Node, path string) { d.target(n, path, p) },
		"order": func(n *yaml.Node, path string) {
			d.each(n, path, func(n *yaml.Node, path string) { p.Order = append(p.Order, d.step(n, path)) })
			if len(p.Order) > maxSteps {
				d.invalid(n, path, "%d steps, at most %d are allowed", len(p.Order), maxSteps)
			}
		},
		"spillBelow": func(n *yaml.Node, path string) { p.SpillBelow, _ = parsed(d, n, path, parsePercent) },
		"deny": func(n *yaml.Node, path string) {
			d.mapping(n, path, fields{
				"clusters":          func(n *yaml.Node, path string) { p.Deny.Clusters = d.clusters(n, path) },
				"regions":           func(n *yaml.Node, path string) { p.Deny.Regions = d.regions(n, path) },
				"unattestedCallers": func(n *yaml.Node, path string) { p.Deny.Unattested = d.boolean(n, path) },
			})
		},
		"liveness": func(n *yaml.Node, path string) { d.liveness(n, path, &p.Liveness) },
	}, "target")
	if err := p.Check(); err != nil && len(d.err.Problems) == before {
		d.invalid(spec, "spec", "%v", err)
	}
}

const maxSteps = 32

func (d *decoder) target(n *yaml.Node, path string, p *federation.Policy) {
	var service string
	var all, mesh bool
	d.mapping(n, path, fields{
		"service":     func(n *yaml.Node, path string) { service, _ = d.label(n, path) },
		"allServices": func(n *yaml.Node, path string) { all = d.boolean(n, path) },
		"mesh":        func(n *yaml.Node, path string) { mesh = d.boolean(n, path) },
	})
	p.TargetNamespace = p.ID.Namespace
	switch {
	case mesh && (all || service != ""), all && service != "":
		d.invalid(n, path, "name one target: service, allServices or mesh")
	case mesh && p.ID.Namespace != MeshNamespace && p.ID.Namespace != "":
		d.invalid(n, path+".mesh", "only a policy in the namespace %s may be for the whole mesh", MeshNamespace)
	case mesh:
		p.TargetNamespace = ""
	case service != "":
		p.TargetService = service
	case !all && len(d.err.Problems) == 0:
		d.invalid(n, path, "name a target: service: NAME, or allServices: true for all of the namespace")
	}
}

func (d *decoder) step(n *yaml.Node, path string) (s federation.Step) {
	words := map[string]federation.StepKind{
		"local": federation.StepLocal, "region": federation.StepRegion, "any": federation.StepAny,
	}
	if n.Kind == yaml.ScalarNode {
		s.Kind = choice(d, n, path, words)
		return s
	}
	named := 0
	word := func(n *yaml.Node, path string) {
		if d.boolean(n, path) {
			s.Kind = words[path[strings.LastIndexByte(path, '.')+1:]]
			named++
		}
	}
	d.mapping(n, path, fields{
		"local": word, "region": word, "any": word,
		"clusters": func(n *yaml.Node, path string) {
			s.Kind, s.Clusters = federation.StepClusters, d.clusters(n, path)
			named++
		},
		"regions": func(n *yaml.Node, path string) {
			s.Kind, s.Regions = federation.StepRegions, d.regions(n, path)
			named++
		},
		"split": func(n *yaml.Node, path string) { s.Split = d.weights(n, path) },
	})
	if named != 1 && n.Kind == yaml.MappingNode {
		d.invalid(n, path, "a step names one of local, region, clusters, regions and any")
	}
	if s.Kind == federation.StepClusters {
		for _, w := range s.Split {
			if !slices.Contains(s.Clusters, w.Cluster) {
				d.invalid(n, join(path, "split"), "%s has a weight, but is not among the step's clusters", w.Cluster)
			}
		}
	}
	return s
}

func (d *decoder) weights(n *yaml.Node, path string) (list []federation.Weight) {
	d.entries(n, path, func(key, value *yaml.Node, path string) {
		c, err := federation.ParseClusterID(key.Value)
		if err != nil {
			d.invalid(key, path, "%v", err)
			return
		}
		list = append(list, federation.Weight{
			Cluster: c, Weight: d.number(value, path, 0, federation.MaxWeight, federation.CodeFieldInvalid),
		})
	})
	return list
}

// parsePercent reads "70%" or "12.5%".
func parsePercent(s string) (federation.PerMille, error) {
	number, ok := strings.CutSuffix(s, "%")
	v, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || v < 0 || v > 100 || math.Round(v*10) != v*10 || strings.Trim(number, "0123456789.") != "" {
		return 0, fmt.Errorf("%q: write a percentage from 0%% to 100%%, with one decimal at most, for example 70%%", clip(s))
	}
	return federation.PerMille(v * 10), nil
}

func (d *decoder) liveness(n *yaml.Node, path string, l *federation.LivenessRule) {
	actions := map[string]federation.LivenessAction{
		"keep": federation.ActionKeep, "deprioritise": federation.ActionDeprioritise, "remove": federation.ActionRemove,
	}
	const low = time.Second // below it, the control link's own heartbeat would trip it
	d.mapping(n, path, fields{
		"suspectAfter": func(n *yaml.Node, path string) { l.SuspectAfter = d.duration(n, path, low) },
		"expireAfter":  func(n *yaml.Node, path string) { l.ExpireAfter = d.duration(n, path, low) },
		"onSuspect":    func(n *yaml.Node, path string) { l.OnSuspect = choice(d, n, path, actions) },
		"onExpired":    func(n *yaml.Node, path string) { l.OnExpired = choice(d, n, path, actions) },
	})
}

// Lists of a service are read before what refers to them, wherever they stand.
func (d *decoder) service(spec *yaml.Node, s *Service) {
	var endpoints, check, mode *yaml.Node
	d.mapping(spec, "spec", fields{
		"export": func(n *yaml.Node, path string) { s.Export = d.boolean(n, path) },
		"mode": func(n *yaml.Node, path string) {
			mode = n
			s.Mode = choice(d, n, path, map[string]federation.Mode{
				"terminate": federation.Terminate, "passthrough": federation.Passthrough,
			})
		},
		"visibility": func(n *yaml.Node, path string) {
			d.mapping(n, path, fields{
				"clusters": func(n *yaml.Node, path string) { s.Visible.Clusters = d.clusters(n, path) },
				"regions":  func(n *yaml.Node, path string) { s.Visible.Regions = d.regions(n, path) },
			})
			slices.Sort(s.Visible.Clusters)
			slices.Sort(s.Visible.Regions)
		},
		"serviceAccounts": func(n *yaml.Node, path string) {
			s.ServiceAccounts = d.regions(n, path)
			slices.Sort(s.ServiceAccounts)
		},
		"ports": func(n *yaml.Node, path string) {
			before := len(d.err.Problems)
			d.each(n, path, func(n *yaml.Node, path string) { s.Ports = append(s.Ports, d.servicePort(n, path)) })
			switch {
			case n.Kind == yaml.SequenceNode && len(n.Content) == 0:
				d.invalid(n, path, "name at least one port")
			case len(d.err.Problems) > before:
			default:
				if err := federation.SortPorts(s.Ports); err != nil {
					d.invalid(n, path, "%v", err)
				}
			}
		},
		"endpoints":   func(n *yaml.Node, _ string) { endpoints = n },
		"healthCheck": func(n *yaml.Node, _ string) { check = n },
	}, "ports")
	if s.Mode == federation.Passthrough && len(s.ServiceAccounts) == 0 {
		d.invalid(mode, "spec.serviceAccounts", "passthrough mode needs the service accounts that the service's proxies run as, so that callers can verify whom they reach")
	}
	if endpoints != nil {
		seen := make(map[string]bool)
		d.each(endpoints, "spec.endpoints", func(n *yaml.Node, path string) {
			e := d.endpoint(n, path, s)
			s.Endpoints = append(s.Endpoints, e)
			at := make([]string, 0, len(s.Ports))
			for _, p := range s.Ports {
				at = append(at, e.At(p).String())
			}
			key := strings.Join(at, " ")
			if e.Address.IsValid() && seen[key] {
				d.invalid(n, path, "the endpoint stands there twice: keep one")
			}
			seen[key] = true
		})
	}
	if check != nil {
		s.HealthCheck = d.healthCheck(check, "spec.healthCheck", s.Ports)
	}
}

func (d *decoder) servicePort(n *yaml.Node, path string) federation.Port {
	p := federation.Port{Protocol: federation.TCP}
	before := len(d.err.Problems)
	d.mapping(n, path, fields{
		"name": func(n *yaml.Node, path string) { p.Name, _ = d.label(n, path) },
		"port": func(n *yaml.Node, path string) { p.Number = d.port(n, path) },
		"protocol": func(n *yaml.Node, path string) {
			p.Protocol = choice(d, n, path, map[string]federation.Protocol{
				"TCP": federation.TCP, "UDP": federation.UDP, "SCTP": federation.SCTP,
			})
		},
		"appProtocol": func(n *yaml.Node, path string) { p.AppProtocol, _ = d.text(n, path) },
	}, "port")
	if err := p.Check(); err != nil && len(d.err.Problems) == before {
		d.invalid(n, path, "%v", err)
	}
	return p
}

// servicePortNamed finds a port of the service by its name or number.
func servicePortNamed(ports []federation.Port, s string) (federation.Port, error) {
	var all []string
	for _, p := range ports {
		if s == p.Name && s != "" || s == strconv.Itoa(int(p.Number)) {
			return p, nil
		}
		if name := portName(p); name != "0" && !slices.Contains(all, name) {
			all = append(all, name)
		}
	}
	return federation.Port{}, fmt.Errorf("%q is no port of the service: its ports are %s", clip(s), strings.Join(all, ", "))
}

func (d *decoder) endpoint(n *yaml.Node, path string, s *Service) Endpoint {
	e := Endpoint{Ports: make(map[federation.Port]uint16)}
	d.mapping(n, path, fields{
		"address": func(n *yaml.Node, path string) { e.Address, _ = parsed(d, n, path, parseIP) },
		"ports": func(n *yaml.Node, path string) {
			d.entries(n, path, func(key, value *yaml.Node, path string) {
				p, err := servicePortNamed(s.Ports, key.Value)
				if err != nil {
					d.invalid(key, path, "%v", err)
					return
				}
				e.Ports[p] = d.port(value, path)
			})
		},
		"zone":  func(n *yaml.Node, path string) { e.Zone, _ = d.label(n, path) },
		"proxy": func(n *yaml.Node, path string) { e.Proxy, _ = parsed(d, n, path, parseIPPort) },
	}, "address")
	for _, p := range s.Ports {
		if _, said := e.Ports[p]; !said {
			e.Ports[p] = p.Number
		}
	}
	if s.Mode == federation.Passthrough && !e.Proxy.IsValid() && n.Kind == yaml.MappingNode {
		d.invalid(n, join(path, "proxy"), "passthrough mode needs the IP:PORT of the endpoint's own proxy")
	}
	return e
}

func (d *decoder) healthCheck(n *yaml.Node, path string, ports []federation.Port) *HealthCheck {
	h := &HealthCheck{
		Interval: DefaultInterval, Timeout: DefaultTimeout,
		UnhealthyAfter: DefaultUnhealthyAfter, HealthyAfter: DefaultHealthyAfter,
	}
	probes, timed := 0, false
	port := func(n *yaml.Node, path string) {
		if n.ShortTag() == "!!int" { // a number is as good as a name
			n = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: n.Value, Line: n.Line}
		}
		h.Port, _ = parsed(d, n, path, func(s string) (federation.Port, error) { return servicePortNamed(ports, s) })
	}
	d.mapping(n, path, fields{
		"http": func(n *yaml.Node, path string) {
			probes++
			h.Path = "/"
			d.mapping(n, path, fields{
				"port": port,
				"path": func(n *yaml.Node, path string) {
					h.Path, _ = parsed(d, n, path, func(s string) (string, error) {
						if !strings.HasPrefix(s, "/") || len(s) > 1024 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' }) {
							return "", fmt.Errorf("%q: write a path that begins with /, without spaces", clip(s))
						}
						return s, nil
					})
				},
			})
		},
		"tcp": func(n *yaml.Node, path string) {
			probes++
			d.mapping(n, path, fields{"port": port})
		},
		"interval": func(n *yaml.Node, path string) { h.Interval = d.duration(n, path, 10*time.Millisecond) },
		"timeout":  func(n *yaml.Node, path string) { h.Timeout, timed = d.duration(n, path, time.Millisecond), true },
		"unhealthyAfter": func(n *yaml.Node, path string) {
			h.UnhealthyAfter = d.number(n, path, 1, 100, federation.CodeFieldInvalid)
		},
		"healthyAfter": func(n *yaml.Node, path string) {
			h.HealthyAfter = d.number(n, path, 1, 100, federation.CodeFieldInvalid)
		},
	})
	if probes != 1 && n.Kind == yaml.MappingNode {
		d.invalid(n, path, "write one of http: {path: /healthz} and tcp: {}")
	}
	switch tcp := slices.IndexFunc(ports, func(p federation.Port) bool { return p.Protocol == federation.TCP }); {
	case h.Port != (federation.Port{}) && h.Port.Protocol != federation.TCP:
		d.invalid(n, path, "port %s cannot be checked: only TCP ports can", h.Port)
	case h.Port == (federation.Port{}) && tcp < 0:
		d.invalid(n, path, "the service has no TCP port to check")
	case h.Port == (federation.Port{}):
		h.Port = ports[tcp]
	}
	if !timed {
		h.Timeout = min(h.Timeout, h.Interval)
	}
	if h.Timeout > h.Interval {
		d.invalid(n, path+".timeout", "%v is longer than the interval, %v", h.Timeout, h.Interval)
	}
	return h
}
