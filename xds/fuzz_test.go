package xds

import (
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
)

// FuzzRead: whatever bytes come as a resource, the reader takes them or refuses
// them with a reason, and what it takes can be looked at.
func FuzzRead(f *testing.F) {
	for name, r := range sample(f) {
		f.Add(uint8(name.Type), name.Name, r.Body)
	}
	f.Fuzz(func(t *testing.T, typ uint8, name string, body []byte) {
		r := &Resource{Name: Name{Type(typ % typeCount), name}, Version: "v", Body: body}
		value, err := readResource(r.Type, name, wire(r))
		if err != nil {
			if err.Error() == "" {
				t.Error("refused without a reason")
			}
			return
		}
		s := newState()
		m := response(r.Type, []*Resource{r})
		st := s.step(r.Type, m)
		if len(st.refused) > 0 {
			t.Fatalf("read once, then refused: %v", st.refused)
		}
		st.commit(nil)
		s.references()
		switch v := value.(type) {
		case *RouteTable:
			v.Admits("spiffe://mesh.example/x", "")
			for _, route := range v.Routes {
				route.Admits("spiffe://mesh.example/x")
			}
		case *Trust:
			v.Admits("spiffe://mesh.example/x")
		}
	})
}

// FuzzRequest: whatever a proxy sends, its stream's state stays whole.
func FuzzRequest(f *testing.F) {
	for t := range Type(typeCount) {
		b, err := proto.Marshal(&discoveryv3.DeltaDiscoveryRequest{
			TypeUrl: t.url(), ResourceNamesSubscribe: []string{"*", "out/shop/s1/80"},
			InitialResourceVersions: map[string]string{"out/shop/s1/80": "v"}, ResponseNonce: "1",
		})
		must(f, err)
		f.Add(b, b)
	}
	resources := sample(f)
	f.Fuzz(func(t *testing.T, first, second []byte) {
		v := newView(testView)
		d := Delta{}
		for _, r := range resources {
			d.Changed = append(d.Changed, r)
		}
		server := NewServer(ServerConfig{Clock: clock.Real(), Logger: testLogger(t)})
		s := newStream(t.Context(), server, v, deltaProtocol{}, nil)
		v.streams[s] = struct{}{}
		for i, body := range [][]byte{first, second, first} {
			var m discoveryv3.DeltaDiscoveryRequest
			if proto.Unmarshal(body, &m) != nil {
				return
			}
			must(t, s.handle(t.Context(), deltaRequest(&m)))
			if i == 0 {
				v.set(federation.Revision{Incarnation: "t", Number: 1}, d)
			}
			for range 100 {
				b := s.next()
				if b == nil {
					break
				}
				s.subs[b.typ].accept()
			}
		}
		s.status()
	})
}
