package federation

import (
	"iter"
)

// key is what a pmap orders by. hash must depend on the key alone and be the
// same in every process, because it decides the shape of the map.
type key[K any] interface {
	comparable
	Compare(K) int
	hash() uint64
}

// pmap is a persistent sorted map: a change makes a new map that shares all but
// O(log n) nodes with the old one, and both stay good. It is a treap whose
// priorities are hashes of the keys, so a set of keys has one shape, whatever
// the order in which they came: maps of equal content are equal node by node,
// and two versions are compared by skipping what they share.
//
// The zero pmap is empty.
type pmap[K key[K], V any] struct{ root *node[K, V] }

type node[K key[K], V any] struct {
	key         K
	value       V
	priority    uint64
	size        int
	left, right *node[K, V]
}

func (n *node[K, V]) len() int {
	if n == nil {
		return 0
	}
	return n.size
}

// over reports whether n stands above m: by priority, and among equals by key.
func (n *node[K, V]) over(m *node[K, V]) bool {
	if n.priority != m.priority {
		return n.priority > m.priority
	}
	return n.key.Compare(m.key) < 0
}

// with is n with other children.
func (n *node[K, V]) with(left, right *node[K, V]) *node[K, V] {
	if n.left == left && n.right == right {
		return n
	}
	c := *n
	c.left, c.right, c.size = left, right, left.len()+right.len()+1
	return &c
}

func (m pmap[K, V]) len() int { return m.root.len() }

func (m pmap[K, V]) get(k K) (v V, ok bool) {
	for n := m.root; n != nil; {
		switch c := k.Compare(n.key); {
		case c == 0:
			return n.value, true
		case c < 0:
			n = n.left
		default:
			n = n.right
		}
	}
	return v, false
}

// set is m with v under k.
func (m pmap[K, V]) set(k K, v V) pmap[K, V] {
	return pmap[K, V]{insert(m.root, &node[K, V]{key: k, value: v, priority: k.hash(), size: 1})}
}

func insert[K key[K], V any](n, add *node[K, V]) *node[K, V] {
	if n == nil {
		return add
	}
	c := add.key.Compare(n.key)
	switch {
	case c == 0:
		add.left, add.right, add.size = n.left, n.right, n.size
		return add
	case add.over(n):
		left, right := split(n, add.key)
		return add.with(left, right)
	case c < 0:
		return n.with(insert(n.left, add), n.right)
	default:
		return n.with(n.left, insert(n.right, add))
	}
}

// without is m without k.
func (m pmap[K, V]) without(k K) pmap[K, V] {
	if _, ok := m.get(k); !ok {
		return m
	}
	return pmap[K, V]{remove(m.root, k)}
}

func remove[K key[K], V any](n *node[K, V], k K) *node[K, V] {
	switch c := k.Compare(n.key); {
	case c == 0:
		return join(n.left, n.right)
	case c < 0:
		return n.with(remove(n.left, k), n.right)
	default:
		return n.with(n.left, remove(n.right, k))
	}
}

// split parts a tree into what lies before k and what lies after it.
func split[K key[K], V any](n *node[K, V], k K) (before, after *node[K, V]) {
	if n == nil {
		return nil, nil
	}
	switch c := k.Compare(n.key); {
	case c == 0:
		return n.left, n.right
	case c < 0:
		before, after = split(n.left, k)
		return before, n.with(after, n.right)
	default:
		before, after = split(n.right, k)
		return n.with(n.left, before), after
	}
}

// join puts two trees together, all of a before all of b.
func join[K key[K], V any](a, b *node[K, V]) *node[K, V] {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case a.over(b):
		return a.with(a.left, join(a.right, b))
	default:
		return b.with(join(a, b.left), b.right)
	}
}

// all goes through m in the order of its keys.
func (m pmap[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { m.root.walk(yield) }
}

func (n *node[K, V]) walk(yield func(K, V) bool) bool {
	return n == nil || n.left.walk(yield) && yield(n.key, n.value) && n.right.walk(yield)
}

// from goes through m from the first key k for which before(k) is false;
// before must be true for a beginning of the keys only.
func (m pmap[K, V]) from(before func(K) bool) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) { m.root.walkFrom(before, yield) }
}

func (n *node[K, V]) walkFrom(before func(K) bool, yield func(K, V) bool) bool {
	if n == nil {
		return true
	}
	if before(n.key) {
		return n.right.walkFrom(before, yield)
	}
	return n.left.walkFrom(before, yield) && yield(n.key, n.value) && n.right.walk(yield)
}

// difference is one key that two maps hold differently.
type difference[K, V any] struct {
	key          K
	old, new     V
	inOld, inNew bool
}

// diff goes through the keys, in order, that a and b hold differently by the
// meaning of same. Its cost is that of the nodes that a and b do not share.
func diff[K key[K], V any](a, b pmap[K, V], same func(V, V) bool) iter.Seq[difference[K, V]] {
	return func(yield func(difference[K, V]) bool) { diffNodes(a.root, b.root, same, yield) }
}

func diffNodes[K key[K], V any](a, b *node[K, V], same func(V, V) bool, yield func(difference[K, V]) bool) bool {
	switch {
	case a == b:
		return true
	case a != nil && b != nil && a.key == b.key:
		return diffNodes(a.left, b.left, same, yield) &&
			(same(a.value, b.value) || yield(difference[K, V]{a.key, a.value, b.value, true, true})) &&
			diffNodes(a.right, b.right, same, yield)
	case b == nil || a != nil && a.over(b):
		// b would have the key at its root, if it had it.
		before, after := split(b, a.key)
		return diffNodes(a.left, before, same, yield) &&
			yield(difference[K, V]{key: a.key, old: a.value, inOld: true}) &&
			diffNodes(a.right, after, same, yield)
	default:
		before, after := split(a, b.key)
		return diffNodes(before, b.left, same, yield) &&
			yield(difference[K, V]{key: b.key, new: b.value, inNew: true}) &&
			diffNodes(after, b.right, same, yield)
	}
}

// FNV-1a 64 over the parts of a key with a zero byte after each, mixed so that
// keys that differ only in their last characters differ in all bits.
type hasher uint64

const (
	fnvOffset hasher = 14695981039346656037
	fnvPrime  hasher = 1099511628211
)

func (h hasher) add(s string) hasher {
	for i := range len(s) {
		h = (h ^ hasher(s[i])) * fnvPrime
	}
	return h * fnvPrime
}

func (h hasher) sum() uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return uint64(h ^ h>>33)
}

func (c ClusterID) hash() uint64 { return fnvOffset.add(string(c)).sum() }
func (s ServiceID) hash() uint64 { return fnvOffset.add(s.Namespace).add(s.Name).sum() }

func (p PolicyID) hash() uint64 {
	return fnvOffset.add(p.Origin).add(p.Namespace).add(p.Name).sum()
}
