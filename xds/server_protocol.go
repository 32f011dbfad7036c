package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// protocol is one of xDS's two ways of sending resources.
type protocol interface {
	recv() (*request, error)
	send(*batch) error
	// whole reports whether responses of clusters and listeners replace all
	// that came before, and requests the names that were subscribed before.
	whole() bool
}

// request is a request of either protocol.
type request struct {
	url       string
	node      *corev3.Node
	nonce     string // of the response that it answers, if any
	cause     string // why that was refused
	refused   bool
	add, take []string          // names to subscribe and unsubscribe
	known     map[string]string // versions that the proxy has, by name
}

type (
	deltaStream interface {
		Send(*discoveryv3.DeltaDiscoveryResponse) error
		Recv() (*discoveryv3.DeltaDiscoveryRequest, error)
	}
	wholeStream interface {
		Send(*discoveryv3.DiscoveryResponse) error
		Recv() (*discoveryv3.DiscoveryRequest, error)
	}
)

type deltaProtocol struct{ deltaStream }

func (p deltaProtocol) whole() bool { return false }

func (p deltaProtocol) recv() (*request, error) {
	r, err := p.Recv()
	if err != nil {
		return nil, err
	}
	return deltaRequest(r), nil
}

func deltaRequest(r *discoveryv3.DeltaDiscoveryRequest) *request {
	return &request{
		url: r.GetTypeUrl(), node: r.GetNode(), nonce: r.GetResponseNonce(),
		refused: r.GetErrorDetail() != nil, cause: r.GetErrorDetail().GetMessage(),
		add: r.GetResourceNamesSubscribe(), take: r.GetResourceNamesUnsubscribe(),
		known: r.GetInitialResourceVersions(),
	}
}

func (p deltaProtocol) send(b *batch) error {
	r := &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: b.revision,
		TypeUrl:           b.typ.url(),
		Nonce:             b.nonce,
		RemovedResources:  b.removed,
		Resources:         make([]*discoveryv3.Resource, 0, len(b.live)+len(b.emptied)),
	}
	r.Resources = append(r.Resources, b.live...)
	for _, name := range b.emptied {
		r.Resources = append(r.Resources, &discoveryv3.Resource{Name: name, Version: "withdrawn", Resource: withdrawn(name)})
	}
	return p.Send(r)
}

// withdrawn is an assignment without endpoints.
func withdrawn(name string) *anypb.Any {
	return new(encoder).any(&endpointv3.ClusterLoadAssignment{ClusterName: name})
}

type wholeProtocol struct{ wholeStream }

func (p wholeProtocol) whole() bool { return true }

func (p wholeProtocol) recv() (*request, error) {
	r, err := p.Recv()
	if err != nil {
		return nil, err
	}
	return &request{
		url: r.GetTypeUrl(), node: r.GetNode(), nonce: r.GetResponseNonce(),
		refused: r.GetErrorDetail() != nil, cause: r.GetErrorDetail().GetMessage(),
		add: r.GetResourceNames(),
	}, nil
}

func (p wholeProtocol) send(b *batch) error {
	r := &discoveryv3.DiscoveryResponse{
		VersionInfo: b.revision,
		TypeUrl:     b.typ.url(),
		Nonce:       b.nonce,
		Resources:   make([]*anypb.Any, 0, len(b.live)+len(b.emptied)),
	}
	for _, w := range b.live {
		r.Resources = append(r.Resources, w.GetResource())
	}
	for _, name := range b.emptied {
		r.Resources = append(r.Resources, withdrawn(name))
	}
	return p.Send(r)
}
