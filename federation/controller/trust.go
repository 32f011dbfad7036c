package controller

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weftmesh/weft/federation"
	"github.com/weftmesh/weft/federation/clock"
	"github.com/weftmesh/weft/federation/store"
	federationv1 "github.com/weftmesh/weft/federation/v1"
	"github.com/weftmesh/weft/identity"
)

// Authorities lie at authority/R/SLOT, where R is a region, or one of these for
// the two kinds that a mesh has once. Slots count up.
const (
	placeRoot      = "root"
	placeOperators = "operators"
	firstSlot      = "1"
)

// checkRegion refuses names that cannot be a region's.
func checkRegion(region string) error {
	if region == placeRoot || region == placeOperators {
		return fmt.Errorf("region %q: the name is reserved, choose another", region)
	}
	if err := federation.CheckLabel(region); err != nil {
		return fmt.Errorf("region %q: %w", region, err)
	}
	return nil
}

// States of a stored authority.
const (
	statePrepared = "prepared" // made, signs nothing yet
	stateActive   = "active"   // signs
	stateRetired  = "retired"  // signs no more; its leaves may still live
)

// storedAuthority is what lies under an authority's key: its state, and the
// record with the sealed private key.
type storedAuthority struct {
	State  string                   `json:"state"`
	Record identity.AuthorityRecord `json:"record"`
}

// slot is one stored authority, opened.
type slot struct {
	place, name string
	state       string
	revision    int64 // of the store; a signature compares it
	authority   *identity.Authority
}

func (s *slot) path() string { return sealPath(s.place, s.name) }

// sealPath is what the sealed key is bound to.
func sealPath(place, name string) string { return "authority/" + place + "/" + name }

// trust holds the mesh's authorities as this controller knows them, and signs.
type trust struct {
	td        spiffeid.TrustDomain
	region    string
	lifetimes identity.Lifetimes
	kekFile   string
	store     *store.Store // set before start
	clock     clock.Clock
	log       *slog.Logger
	signed    func(kind string) // counts signatures

	loading sync.Mutex // one load at a time
	kek     *identity.KEK
	slots   atomic.Pointer[[]*slot] // sorted by place and name
}

var errNoAuthority = errors.New("this mesh has no such authority (yet)")

// start loads the authorities, and makes those that the mesh has not yet. Of
// several controllers that do so at once one succeeds; the others take what it
// made.
func (t *trust) start(ctx context.Context) error {
	if err := checkRegion(t.region); err != nil {
		return err
	}
	if err := t.lifetimes.Check(); err != nil {
		return err
	}
	for {
		stored, err := t.store.Authorities(ctx)
		if err != nil {
			return err
		}
		if err := t.openKEK(len(stored) > 0); err != nil {
			return err
		}
		if err := t.take(stored); err != nil {
			return err
		}
		if _, err := t.active(placeRoot); err == nil {
			if _, err := t.active(t.region); err == nil {
				return nil
			}
			err = t.makeRegion(ctx)
			if err != nil && !beaten(err) {
				return fmt.Errorf("make the authority of region %s: %w", t.region, err)
			}
			continue
		}
		if err := t.makeMesh(ctx); err != nil && !beaten(err) {
			return fmt.Errorf("make the mesh's authorities: %w", err)
		}
	}
}

// beaten reports whether another controller has made the same first.
func beaten(err error) bool {
	return errors.Is(err, store.ErrExists) || errors.Is(err, store.ErrConflict)
}

// openKEK reads the key file. It is made where nothing is sealed yet: later a
// new key would open nothing.
func (t *trust) openKEK(sealed bool) error {
	if t.kek != nil {
		return nil
	}
	var err error
	if sealed {
		t.kek, err = identity.LoadKEK(t.kekFile)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the mesh's authorities are sealed under a key-encryption key, and there is none at %s: give the mesh's own with --kek-file (it is kept apart from the store and its backups): %w", t.kekFile, err)
		}
	} else {
		t.kek, err = identity.LoadOrCreateKEK(t.kekFile)
	}
	if err != nil {
		return fmt.Errorf("key-encryption key: %w", err)
	}
	return nil
}

// take opens stored authorities.
func (t *trust) take(stored []store.Authority) error {
	known := map[string]*slot{}
	if old := t.slots.Load(); old != nil {
		for _, s := range *old {
			known[s.path()] = s
		}
	}
	slots := make([]*slot, 0, len(stored))
	for _, a := range stored {
		path := sealPath(a.Region, a.Slot)
		if s := known[path]; s != nil && s.revision == a.Revision {
			slots = append(slots, s)
			continue
		}
		var rec storedAuthority
		if err := json.Unmarshal(a.Sealed, &rec); err != nil {
			return fmt.Errorf("%s: its record cannot be read: %w", path, err)
		}
		authority, err := identity.OpenAuthority(rec.Record, t.kek, path)
		switch {
		case errors.Is(err, identity.ErrWrongKey):
			return fmt.Errorf("%s was sealed under another key-encryption key than the one in %s (%s): start with the mesh's own --kek-file; nothing was changed: %w", path, t.kekFile, t.kek.ID(), err)
		case err != nil:
			return fmt.Errorf("%s: %w", path, err)
		case authority.TrustDomain() != t.td:
			return fmt.Errorf("%s is of trust domain %s, and this controller of %s: start it with --trust-domain %s", path, authority.TrustDomain(), t.td, authority.TrustDomain())
		}
		slots = append(slots, &slot{place: a.Region, name: a.Slot, state: rec.State, revision: a.Revision, authority: authority})
	}
	t.slots.Store(&slots)
	return nil
}

// reload reads the authorities again: another controller has changed them.
func (t *trust) reload(ctx context.Context) error {
	t.loading.Lock()
	defer t.loading.Unlock()
	stored, err := t.store.Authorities(ctx)
	if err != nil {
		return err
	}
	return t.take(stored)
}

// all are the known authorities. The caller must not change them.
func (t *trust) all() []*slot {
	if s := t.slots.Load(); s != nil {
		return *s
	}
	return nil
}

// active is the authority that signs at a place.
func (t *trust) active(place string) (*slot, error) {
	for _, s := range t.all() {
		if s.place == place && s.state == stateActive {
			return s, nil
		}
	}
	return nil, fmt.Errorf("authority of %q: %w", place, errNoAuthority)
}

func (t *trust) write(place, name, state string, a *identity.Authority, at int64) (store.AuthorityWrite, error) {
	rec, err := a.Seal(t.kek, sealPath(place, name))
	if err != nil {
		return store.AuthorityWrite{}, err
	}
	sealed, err := json.Marshal(storedAuthority{State: state, Record: rec})
	return store.AuthorityWrite{Region: place, Slot: name, Sealed: sealed, At: at}, err
}

// makeMesh makes root, own region's and operators' authority, and the bundle.
func (t *trust) makeMesh(ctx context.Context) error {
	now := t.clock.Now()
	root, err := identity.NewRoot(t.td, t.lifetimes, now)
	if err != nil {
		return err
	}
	region, err := root.NewRegion(t.region, t.lifetimes, now)
	if err != nil {
		return err
	}
	operators, err := identity.NewOperators(t.td, t.lifetimes, now)
	if err != nil {
		return err
	}
	var writes []store.AuthorityWrite
	for place, a := range map[string]*identity.Authority{placeRoot: root, t.region: region, placeOperators: operators} {
		w, err := t.write(place, firstSlot, stateActive, a, 0)
		if err != nil {
			return err
		}
		writes = append(writes, w)
	}
	bundle := &federationv1.Bundle{TrustDomain: t.td.Name(), Sequence: 1, Roots: [][]byte{root.Root().Raw}}
	if _, err := t.store.CreateAuthorities(ctx, bundle, writes...); err != nil {
		return err
	}
	t.log.InfoContext(ctx, "made a new mesh", "trustDomain", t.td.Name(), "pin", identity.PinOf(root.Root()).String())
	return nil
}

// makeRegion makes the authority of a region that is new to the mesh.
func (t *trust) makeRegion(ctx context.Context) error {
	root, err := t.active(placeRoot)
	if err != nil {
		return err
	}
	region, err := root.authority.NewRegion(t.region, t.lifetimes, t.clock.Now())
	if err != nil {
		return err
	}
	w, err := t.write(t.region, firstSlot, stateActive, region, 0)
	if err != nil {
		return err
	}
	_, err = t.store.CreateAuthorities(ctx, nil, w)
	return err
}

// pin is what an agent that trusts nobody yet recognises the mesh by.
func (t *trust) pin() (identity.Pin, error) {
	root, err := t.active(placeRoot)
	if err != nil {
		return identity.Pin{}, err
	}
	return identity.PinOf(root.authority.Root()), nil
}

// Bundle is the operators' trust bundle, or nil: the anchors of people's
// certificates.
func (t *trust) Bundle() *identity.Bundle {
	var roots []*x509.Certificate
	for _, s := range t.all() {
		if s.place == placeOperators {
			roots = append(roots, s.authority.Root())
		}
	}
	if len(roots) == 0 {
		return nil
	}
	b, err := identity.NewBundle(t.td, uint64(len(roots)), roots)
	if err != nil {
		return nil
	}
	return b
}

// sign signs for an admitted identity, by the own region's authority, or the
// operators' for a person, and journals it. generation is that of the cluster
// that the identity lies under. The chain may leave: it is in the journal.
func (t *trust) sign(ctx context.Context, who identity.Admitted, generation int64, by string) ([]*x509.Certificate, error) {
	subject, err := identity.ParseID(who.ID)
	if err != nil {
		return nil, err
	}
	place := t.region
	if subject.Role == identity.RoleOperator {
		place = placeOperators
	}
	for again := false; ; again = true {
		s, err := t.active(place)
		if err != nil {
			return nil, err
		}
		chain, err := s.authority.SignLeaf(who, t.lifetimes, t.clock.Now())
		if err != nil {
			return nil, err
		}
		hash, err := identity.KeyHash(who.Key)
		if err != nil {
			return nil, err
		}
		leaf := chain[0]
		err = t.store.Journal(ctx, &federationv1.Issuance{
			Serial: identity.SerialOf(leaf), SpiffeId: who.ID.String(),
			Cluster: string(subject.Cluster), Generation: generation,
			Region: s.place, Slot: s.name,
			NotBefore: timestamppb.New(leaf.NotBefore), NotAfter: timestamppb.New(leaf.NotAfter),
			PublicKeyHash: []byte(hash), RequestedBy: by,
		}, s.revision)
		switch {
		case err == nil:
			t.signed(subject.Role.String())
			return chain, nil
		case !errors.Is(err, store.ErrStale) || again:
			return nil, err
		}
		// The authority may have been replaced, or the cluster denied: look again.
		if err := t.reload(ctx); err != nil {
			return nil, err
		}
	}
}

// The life of a region's authority: its successor is prepared when a third of
// it is left, and signs when a sixth is; a leaf lives a sixth of it at most.
func prepareAt(a *identity.Authority) time.Time  { return lifeLeft(a, 3) }
func activateAt(a *identity.Authority) time.Time { return lifeLeft(a, 6) }

func lifeLeft(a *identity.Authority, part time.Duration) time.Time {
	life := a.NotAfter().Sub(a.Certificate().NotBefore)
	return a.NotAfter().Add(-life / part)
}

// turn is one step of the rotation of a region's authorities.
type turn struct {
	prepare         bool    // make the next
	activate        *slot   // prepared: begins to sign in place of retire
	retire          *slot   // active
	remove          []*slot // retired and at its end
	next            string  // name of the slot to prepare
	wait            time.Duration
	nothingToBeDone bool
}

// nextTurn decides on a region's authorities at a time. wait is how long until
// something will be due.
func nextTurn(slots []*slot, now time.Time) turn {
	var active, prepared *slot
	var tn turn
	highest := 0
	for _, s := range slots {
		if n, err := strconv.Atoi(s.name); err == nil {
			highest = max(highest, n)
		}
		switch {
		case s.state == stateActive:
			active = s
		case s.state == statePrepared:
			prepared = s
		case s.state == stateRetired && now.After(s.authority.NotAfter()):
			tn.remove = append(tn.remove, s)
		}
	}
	tn.next = strconv.Itoa(highest + 1)
	if active == nil {
		tn.wait, tn.nothingToBeDone = time.Hour, len(tn.remove) == 0
		return tn
	}
	switch due := activateAt(active.authority); {
	case prepared == nil && !now.Before(prepareAt(active.authority)):
		tn.prepare = true
	case prepared == nil:
		tn.wait = prepareAt(active.authority).Sub(now)
	case !now.Before(due):
		tn.activate, tn.retire = prepared, active
	default:
		tn.wait = due.Sub(now)
	}
	tn.nothingToBeDone = !tn.prepare && tn.activate == nil && len(tn.remove) == 0
	return tn
}

// rotate carries one turn out for every region, as the leader, and says when
// to look again.
func (t *trust) rotate(ctx context.Context, term *store.Term) (time.Duration, error) {
	if err := t.reload(ctx); err != nil {
		return 0, err
	}
	byRegion := map[string][]*slot{}
	for _, s := range t.all() {
		if s.place != placeRoot && s.place != placeOperators {
			byRegion[s.place] = append(byRegion[s.place], s)
		}
	}
	wait := time.Hour
	for region, slots := range byRegion {
		tn := nextTurn(slots, t.clock.Now())
		if tn.nothingToBeDone {
			wait = min(wait, tn.wait)
			continue
		}
		wait = 0
		writes, err := t.turnWrites(region, tn)
		if err != nil {
			return 0, err
		}
		if _, err := term.PutAuthorities(ctx, nil, writes...); err != nil {
			return 0, fmt.Errorf("rotate the authority of region %s: %w", region, err)
		}
		t.log.InfoContext(ctx, "rotated a region's authority", "region", region,
			"prepared", tn.prepare, "activated", tn.activate != nil, "removed", len(tn.remove))
	}
	if wait > 0 {
		return wait, nil
	}
	return 0, t.reload(ctx)
}

func (t *trust) turnWrites(region string, tn turn) ([]store.AuthorityWrite, error) {
	var writes []store.AuthorityWrite
	add := func(name, state string, a *identity.Authority, at int64) error {
		w, err := t.write(region, name, state, a, at)
		writes = append(writes, w)
		return err
	}
	if tn.prepare {
		root, err := t.active(placeRoot)
		if err != nil {
			return nil, err
		}
		a, err := root.authority.NewRegion(region, t.lifetimes, t.clock.Now())
		if err != nil {
			return nil, err
		}
		if err := add(tn.next, statePrepared, a, 0); err != nil {
			return nil, err
		}
	}
	if tn.activate != nil {
		err := errors.Join(
			add(tn.retire.name, stateRetired, tn.retire.authority, tn.retire.revision),
			add(tn.activate.name, stateActive, tn.activate.authority, tn.activate.revision))
		if err != nil {
			return nil, err
		}
	}
	for _, s := range tn.remove {
		writes = append(writes, store.AuthorityWrite{Region: region, Slot: s.name, At: s.revision})
	}
	return slices.Clip(writes), nil
}
