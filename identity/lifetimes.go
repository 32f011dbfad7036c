package identity

import (
	"fmt"
	"time"
)

// minRatio is how many lives of its children a parent must have: with it, a
// child can be renewed well before its parent ends, and a new parent can be
// published and acknowledged everywhere while the old one still has time.
const minRatio = 6

// Lifetimes says how long each kind of certificate lives. Tests shorten them,
// or keep them and run a faster clock.
type Lifetimes struct {
	Root      time.Duration // the mesh's root
	Region    time.Duration // a region's authority
	Leaf      time.Duration // SVIDs of controllers, agents, gateways, workloads
	Operators time.Duration // the operators' authority
	Operator  time.Duration // the longest life of an operator's credential

	// Backdate is how far before the signer's present a certificate starts,
	// so that a verifier whose clock is a little slow accepts it.
	Backdate time.Duration
}

// DefaultLifetimes are 10 years, 90 days, 24 hours; 10 years and 1 year for
// people; back-dated by 2 minutes.
func DefaultLifetimes() Lifetimes {
	const day = 24 * time.Hour
	return Lifetimes{
		Root:      3650 * day,
		Region:    90 * day,
		Leaf:      day,
		Operators: 3650 * day,
		Operator:  365 * day,
		Backdate:  2 * time.Minute,
	}
}

// Check refuses lifetimes of which some parent lives less than 6 times its
// child. Call it at start-up, before anything is signed.
func (l Lifetimes) Check() error {
	if l.Backdate < 0 {
		return fmt.Errorf("identity: certificates are back-dated by %v, which is negative", l.Backdate)
	}
	pairs := []struct {
		parent, child             string
		parentLives, childrenLive time.Duration
	}{
		{"root", "region authority", l.Root, l.Region},
		{"region authority", "leaf", l.Region, l.Leaf},
		{"operators' authority", "operator credential", l.Operators, l.Operator},
	}
	for _, p := range pairs {
		if p.childrenLive < time.Second {
			return fmt.Errorf("identity: a %s would live %v; certificates count in seconds, so use at least 1s", p.child, p.childrenLive)
		}
		if p.parentLives < minRatio*p.childrenLive {
			return fmt.Errorf("identity: a %s lives %v, less than %d times the %v of a %s: lengthen the first or shorten the second to at most %v",
				p.parent, p.parentLives, minRatio, p.childrenLive, p.child, p.parentLives/minRatio)
		}
	}
	return nil
}
