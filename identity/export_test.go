package identity

// SealName lets tests open an authority's sealed key, as a thief of the
// key-encryption key would.
var SealName = sealName

// Remembered is how many verified chains a verifier remembers.
func (v *Verifier) Remembered() int {
	if v.cache == nil {
		return 0
	}
	v.cache.mu.Lock()
	defer v.cache.mu.Unlock()
	return len(v.cache.young) + len(v.cache.old)
}

// Marked is how many parsed leaves PeerOf knows.
func (v *Verifier) Marked() int {
	n := 0
	v.marks.peers.Range(func(any, any) bool { n++; return true })
	return n
}
