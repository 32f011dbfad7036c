package federation

// Event is one change of what the catalog is made from: PutMember, DeleteMember,
// PutExport, DeleteExport, PutPolicy or DeletePolicy. Deleting what is not there
// and putting what is there already change nothing.
type Event interface {
	// change carries the event out on a catalog that nobody else has seen yet.
	change(*Catalog)
}

type (
	// PutMember adds or replaces a registration.
	PutMember struct{ Member Member }
	// DeleteMember forgets a registration. The exports of the cluster stay, not
	// used, until they are deleted themselves.
	DeleteMember struct{ Cluster ClusterID }
	// PutExport adds or replaces an export.
	PutExport struct{ Export Export }
	// DeleteExport withdraws an export.
	DeleteExport struct{ Export ExportID }
	// PutPolicy adds or replaces a policy.
	PutPolicy struct{ Policy Policy }
	// DeletePolicy takes a policy out of force.
	DeletePolicy struct{ Policy PolicyID }
)

// Apply is the catalog after the events, in their order, at revision rev. It
// equals the Merge of what is there then, costs O(log n) for each event, and
// leaves c as it is. Events are copied.
func (c *Catalog) Apply(rev Revision, events ...Event) *Catalog {
	next := *c.orEmpty()
	next.revision = rev
	for _, e := range events {
		e.change(&next)
	}
	return &next
}

func (e PutMember) change(c *Catalog) {
	r := &record[Member]{value: normalMember(e.Member)}
	if old, ok := c.members.get(r.value.Cluster); !ok || !sameMember(old, r) {
		c.putMember(r)
	}
}

func (e DeleteMember) change(c *Catalog) { c.dropMember(e.Cluster) }

func (e PutExport) change(c *Catalog) {
	r := &record[Export]{value: normalExport(e.Export)}
	o, _ := c.services.get(r.value.Service)
	if old, ok := o.get(r.value.Cluster); !ok || !sameExport(old, r) {
		c.putExport(r)
	}
}

func (e DeleteExport) change(c *Catalog) { c.dropExport(e.Export) }

func (e PutPolicy) change(c *Catalog) {
	r := &record[Policy]{value: normalPolicy(e.Policy)}
	if old, ok := c.policies.get(r.value.ID); !ok || !samePolicy(old, r) {
		c.putPolicy(r)
	}
}

func (e DeletePolicy) change(c *Catalog) { c.dropPolicy(e.Policy) }
