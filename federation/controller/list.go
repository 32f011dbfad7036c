package controller

import (
	"cmp"
	"context"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
)

// watchEvery is how often, at most, a watched list is made again, and how often
// it is where only agents' statuses may have changed.
const watchEvery = 200 * time.Millisecond

// List answers with the objects of one kind, in the order of their names.
func (s *adminServer) List(_ context.Context, req *federationv1.ListRequest) (*federationv1.ListResponse, error) {
	if _, known := federationv1.Kind_name[int32(req.GetKind())]; !known || req.GetKind() == federationv1.Kind_KIND_UNSPECIFIED {
		return nil, invalid("no kind of objects is asked for that this controller knows")
	}
	return s.list(req), nil
}

// Watch answers as List does, and again whenever the answer differs.
func (s *adminServer) Watch(req *federationv1.WatchRequest, stream federationv1.Admin_WatchServer) error {
	c := s.c
	if _, err := s.List(stream.Context(), req.GetList()); err != nil {
		return err
	}
	var last *federationv1.ListResponse
	pause := c.cfg.Clock.NewTimer(watchEvery)
	defer pause.Stop()
	for {
		now := s.list(req.GetList())
		if last == nil || !sameObjects(last, now) {
			if err := stream.Send(&federationv1.WatchResponse{List: now}); err != nil {
				return err
			}
			last = now
		}
		pause.Reset(watchEvery)
		select {
		case <-pause.C():
		case <-c.draining:
			return errStopping()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// sameObjects compares two lists but for their revisions.
func sameObjects(a, b *federationv1.ListResponse) bool {
	return slices.EqualFunc(a.GetObjects(), b.GetObjects(), func(a, b *federationv1.Object) bool {
		return proto.Equal(unheard(a), unheard(b))
	})
}

// unheard is an object without the time at which its agent was heard last,
// which goes on by itself.
func unheard(o *federationv1.Object) *federationv1.Object {
	if o.GetCluster() == nil {
		return o
	}
	o = proto.CloneOf(o)
	o.GetCluster().LastHeard = nil
	return o
}

func (s *adminServer) list(req *federationv1.ListRequest) *federationv1.ListResponse {
	now := s.c.state.current()
	resp := &federationv1.ListResponse{Revision: federationv1.EncodeRevision(now.Catalog.Revision())}
	add := func(o *federationv1.Object) { resp.Objects = append(resp.Objects, o) }
	inService := func(ns, name string) bool {
		return (req.GetNamespace() == "" || req.GetNamespace() == ns) && (req.GetName() == "" || req.GetName() == name)
	}
	inCluster := func(c string) bool { return req.GetCluster() == "" || req.GetCluster() == c }
	switch req.GetKind() {
	case federationv1.Kind_KIND_CLUSTER:
		for m := range now.Catalog.Members() {
			if inCluster(string(m.Cluster)) && (req.GetName() == "" || req.GetName() == string(m.Cluster)) {
				add(&federationv1.Object{Object: &federationv1.Object_Cluster{Cluster: s.cluster(federationv1.EncodeMember(*m), now)}})
			}
		}
	case federationv1.Kind_KIND_SERVICE:
		for svc := range now.Catalog.Services() {
			if inService(svc.ID.Namespace, svc.ID.Name) && (req.GetCluster() == "" || slices.ContainsFunc(svc.Offers, func(o federation.Offer) bool { return inCluster(string(o.Cluster)) })) {
				add(&federationv1.Object{Object: &federationv1.Object_Service{Service: service(svc, now)}})
			}
		}
	case federationv1.Kind_KIND_EXPORT:
		for svc := range now.Catalog.Services() {
			for _, o := range svc.Offers {
				if inService(svc.ID.Namespace, svc.ID.Name) && inCluster(string(o.Cluster)) {
					add(&federationv1.Object{Object: &federationv1.Object_Export{Export: exportStatus(o, now)}})
				}
			}
		}
	case federationv1.Kind_KIND_GATEWAY:
		for _, g := range s.c.gateways() {
			if inCluster(g.GetCluster()) && (req.GetName() == "" || req.GetName() == g.GetName()) {
				add(&federationv1.Object{Object: &federationv1.Object_Gateway{Gateway: g}})
			}
		}
	case federationv1.Kind_KIND_POLICY:
		for p := range now.Catalog.Policies() {
			if inService(p.ID.Namespace, p.ID.Name) && inCluster(p.ID.Origin) {
				add(&federationv1.Object{Object: &federationv1.Object_Policy{Policy: federationv1.EncodePolicy(*p)}})
			}
		}
	case federationv1.Kind_KIND_FINDING:
		for _, f := range s.c.findings(now) {
			if req.GetName() == "" || req.GetName() == string(f.Code) {
				if inCluster(f.ReportedBy) || req.GetCluster() != "" && f.Subject.Name == req.GetCluster() {
					add(&federationv1.Object{Object: &federationv1.Object_Finding{Finding: federationv1.EncodeFinding(f)}})
				}
			}
		}
	}
	return resp
}

// cluster is a registration and what is known of its agent.
func (s *adminServer) cluster(m *federationv1.Member, now *snapshot) *federationv1.Cluster {
	c := s.c
	id := federation.ClusterID(m.GetCluster())
	out := &federationv1.Cluster{Member: m, Liveness: liveness(now.World.Silence(id)).String()}
	if f, ok := c.state.fact(federationv1.DrainKey(id)); ok {
		out.Drain = f.Record().GetDrain()
	}
	if p := c.store.Presences()[id]; p != nil {
		out.LastHeard = timestamppb.New(c.cfg.Clock.Now())
		out.Session, out.AgentVersion = p.GetController(), p.GetAgentVersion()
		out.Applied, out.Acked = p.GetStatus().GetApplied(), p.GetStatus().GetAcked()
		out.Gateways = int32(min(len(p.GetStatus().GetGateways()), 1<<30))
	} else if silent := now.World.Silence(id); silent > 0 {
		out.LastHeard = timestamppb.New(c.cfg.Clock.Now().Add(-silent))
	}
	for range now.Catalog.ExportsOf(id) {
		out.Exports++
	}
	return out
}

// liveness is a silence by the default thresholds.
func liveness(silent time.Duration) federation.Liveness {
	switch {
	case silent >= federation.DefaultExpireAfter:
		return federation.Expired
	case silent >= federation.DefaultSuspectAfter:
		return federation.Suspect
	}
	return federation.Fresh
}

func service(svc *federation.Service, now *snapshot) *federationv1.Service {
	out := &federationv1.Service{Namespace: svc.ID.Namespace, Name: svc.ID.Name}
	merged := federationv1.EncodeExport(federation.Export{Ports: svc.Ports})
	out.Ports = merged.GetPorts()
	for _, o := range svc.Offers {
		out.Exports = append(out.Exports, exportStatus(o, now))
	}
	if p, ok := now.Catalog.PolicyFor(svc.ID, ""); ok {
		out.Policy = p.ID.String()
	}
	for _, f := range svc.Findings {
		out.Findings = append(out.Findings, federationv1.EncodeFinding(f))
	}
	return out
}

func exportStatus(o federation.Offer, now *snapshot) *federationv1.ExportStatus {
	out := &federationv1.ExportStatus{Export: federationv1.EncodeExport(*o.Export)}
	if r, ok := now.World.Readiness(o.ID()); ok {
		out.Readiness = federationv1.EncodeReadiness(r)
	}
	if !o.InUse {
		if out.Unused = o.Detail; out.Unused == "" {
			out.Unused = o.Reason.String()
		}
	}
	return out
}

// gateways are all gateways and proxies that agents tell of, by cluster and
// name.
func (c *Controller) gateways() []*federationv1.Gateway {
	var out []*federationv1.Gateway
	for id, p := range c.store.Presences() {
		for _, g := range p.GetStatus().GetGateways() {
			g = proto.CloneOf(g)
			g.Cluster = string(id) // what an agent says of another cluster does not count
			out = append(out, g)
		}
	}
	slices.SortFunc(out, func(a, b *federationv1.Gateway) int {
		return cmp.Or(cmp.Compare(a.GetCluster(), b.GetCluster()), cmp.Compare(a.GetName(), b.GetName()))
	})
	return out
}

// findings are those of the catalog, those that agents report, and those that
// this controller sees, the gravest first.
func (c *Controller) findings(now *snapshot) []federation.Finding {
	list := now.Catalog.Findings()
	for _, f := range c.state.all(federationv1.KindFinding) {
		list = append(list, f.Body.(federation.Finding))
	}
	silent := 0
	members := 0
	for m := range now.Catalog.Members() {
		if m.State != federation.MemberActive {
			continue
		}
		members++
		d := now.World.Silence(m.Cluster)
		ref := federation.Ref{Kind: "cluster", Name: string(m.Cluster)}
		switch liveness(d) {
		case federation.Suspect:
			silent++
			list = append(list, federation.NewFinding(federation.CodeMemberSuspect, ref, "its agent has been silent for %v or more", d))
		case federation.Expired:
			silent++
			list = append(list, federation.NewFinding(federation.CodeMemberExpired, ref, "its agent has been silent for %v or more", d))
		}
	}
	if silent >= massClusters && silent*1000 >= massPerMille*members {
		list = append(list, federation.NewFinding(federation.CodeManyMembersSilent, federation.Ref{Kind: "mesh", Name: c.cfg.TrustDomain.Name()},
			"%d of %d clusters are silent; those that fell silent at once do not expire", silent, members))
	}
	now2 := c.cfg.Clock.Now()
	for _, s := range c.trust.all() {
		if s.state == stateActive && now2.After(s.authority.NotAfter().Add(-s.authority.NotAfter().Sub(s.authority.Certificate().NotBefore)/8)) {
			list = append(list, federation.NewFinding(federation.CodeAuthorityAging, federation.Ref{Kind: "authority", Name: s.place + "/" + s.name},
				"it ends at %s and has no successor in use", s.authority.NotAfter().UTC().Format(time.RFC3339)))
		}
	}
	slices.SortFunc(list, federation.Finding.Compare)
	return list
}

// GetStatus says how the mesh and its controllers are.
func (s *adminServer) GetStatus(ctx context.Context, _ *federationv1.GetStatusRequest) (*federationv1.GetStatusResponse, error) {
	c := s.c
	now := c.state.current()
	resp := &federationv1.GetStatusResponse{
		TrustDomain: c.cfg.TrustDomain.Name(), Revision: federationv1.EncodeRevision(now.Catalog.Revision()), Recovering: now.recovering,
	}
	leader, err := c.store.Leader(ctx, election)
	if err != nil {
		return nil, c.storeError(err)
	}
	presences := c.store.Presences()
	for _, other := range c.store.Controllers() {
		out := &federationv1.Controller{
			Name: other.GetName(), Address: other.GetAddress(), Version: other.GetVersion(),
			Leader: other.GetName() == leader, Started: other.GetStarted(),
		}
		for _, p := range presences {
			if p.GetController() == other.GetName() {
				out.Sessions++
			}
		}
		if other.GetName() == c.cfg.Name {
			out.Revision = resp.Revision
		}
		resp.Controllers = append(resp.Controllers, out)
	}
	st, err := c.store.Status(ctx)
	if err != nil {
		return nil, c.storeError(err)
	}
	resp.Store = storeStatus(st)
	for m := range now.Catalog.Members() {
		if m.State == federation.MemberDeregistered {
			continue
		}
		resp.Clusters++
		if m.State == federation.MemberActive && presences[m.Cluster] != nil && liveness(now.World.Silence(m.Cluster)) == federation.Fresh {
			resp.ClustersFresh++
		}
	}
	for range now.Catalog.ServiceIDs() {
		resp.Services++
	}
	for range now.Catalog.Exports() {
		resp.Exports++
	}
	for range now.Catalog.Policies() {
		resp.Policies++
	}
	for _, f := range c.findings(now) {
		resp.Findings = append(resp.Findings, federationv1.EncodeFinding(f))
	}
	return resp, nil
}

func storeStatus(st store.Status) *federationv1.StoreStatus {
	return &federationv1.StoreStatus{
		Embedded: st.Embedded, Endpoints: st.Endpoints, SizeBytes: st.SizeBytes, QuotaBytes: st.QuotaBytes,
		Version: st.Version, Leader: st.Leader, Alarms: st.Alarms,
	}
}

// journalCount is how many identities each authority has in the journal. To
// count goes through all of it, so the answer is kept for a while.
type journalCount struct {
	mu    sync.Mutex
	at    time.Time
	known map[string]int64 // by sealPath
}

const journalCountKept = 30 * time.Second

func (j *journalCount) count(ctx context.Context, st *store.Store, now time.Time) (map[string]int64, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.known != nil && now.Sub(j.at) < journalCountKept {
		return j.known, nil
	}
	known := map[string]int64{}
	err := st.EachIssued(ctx, func(i *federationv1.Issuance) bool {
		known[sealPath(i.GetRegion(), i.GetSlot())]++
		return true
	})
	if err != nil {
		return nil, err
	}
	j.known, j.at = known, now
	return known, nil
}

// GetTrust says whom the mesh trusts.
func (s *adminServer) GetTrust(ctx context.Context, _ *federationv1.GetTrustRequest) (*federationv1.GetTrustResponse, error) {
	c := s.c
	if err := c.trust.reload(ctx); err != nil {
		return nil, c.storeError(err)
	}
	bundle, err := c.bundle()
	if err != nil {
		return nil, err
	}
	pin, err := c.trust.pin()
	if err != nil {
		return nil, c.storeError(err)
	}
	issued, err := c.issued.count(ctx, c.store, c.cfg.Clock.Now())
	if err != nil {
		return nil, c.storeError(err)
	}
	resp := &federationv1.GetTrustResponse{TrustDomain: c.cfg.TrustDomain.Name(), Bundle: bundle, CaHash: pin.String()}
	for _, sl := range c.trust.all() {
		cert := sl.authority.Certificate()
		a := &federationv1.Authority{
			Kind: sl.authority.Kind().String(), Region: sl.authority.Region(), Slot: sl.name, State: sl.state,
			NotBefore: timestamppb.New(cert.NotBefore), NotAfter: timestamppb.New(cert.NotAfter),
			SubjectKeyId: hex.EncodeToString(cert.SubjectKeyId), Issued: issued[sl.path()],
		}
		resp.Authorities = append(resp.Authorities, a)
	}
	for _, f := range c.state.all(federationv1.KindDenial) {
		resp.Denials = append(resp.Denials, f.Record().GetDenial())
	}
	slices.SortFunc(resp.Denials, func(a, b *federationv1.Denial) int {
		return cmp.Or(cmp.Compare(a.GetCluster(), b.GetCluster()), cmp.Compare(a.GetGeneration(), b.GetGeneration()))
	})
	return resp, nil
}
