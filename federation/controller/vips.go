package controller

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"net/netip"
	"time"

	"github.com/weftmesh/weft/federation"
)

// vipQuarantine is how long the address of a service that has vanished goes to
// no other service: clients may still have it.
const vipQuarantine = 24 * time.Hour

var errNoVIPLeft = errors.New("every address of the cluster's range is in use")

// chooseVIP picks the address of a service in a cluster's range: the first free
// one from a place that follows from the service's name, so that a mesh that
// is built anew mostly has its addresses again. taken reports addresses that
// are in use or in quarantine.
func chooseVIP(prefix netip.Prefix, s federation.ServiceID, taken func(netip.Addr) bool) (netip.Addr, error) {
	first, count := vipRange(prefix)
	h := fnv.New64a()
	h.Write([]byte(s.String()))
	start := h.Sum64() % count
	for i := range count {
		addr := addToAddr(first, (start+i)%count)
		if !taken(addr) {
			return addr, nil
		}
	}
	return netip.Addr{}, errNoVIPLeft
}

// vipRange is the first usable address of a prefix and how many there are:
// without the network's and the broadcast address where there is room, and at
// most 2^20 of a wide IPv6 prefix.
func vipRange(prefix netip.Prefix) (netip.Addr, uint64) {
	prefix = prefix.Masked()
	bits := min(prefix.Addr().BitLen()-prefix.Bits(), 20)
	count := uint64(1) << bits
	first := prefix.Addr()
	if bits < 2 {
		return first, count
	}
	return first.Next(), count - 2
}

func addToAddr(a netip.Addr, n uint64) netip.Addr {
	b := a.As16()
	low := binary.BigEndian.Uint64(b[8:])
	binary.BigEndian.PutUint64(b[8:], low+n)
	out := netip.AddrFrom16(b)
	if a.Is4() {
		return out.Unmap()
	}
	return out
}
