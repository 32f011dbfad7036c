package federation

import (
	"slices"
	"testing"
)

// What rounding down leaves over goes to the largest remainders; among equals
// to the first.
func TestSharesRound(t *testing.T) {
	for _, c := range []struct {
		amounts []uint64
		want    []PerMille
	}{
		{[]uint64{1}, []PerMille{1000}},
		{[]uint64{1, 1, 1}, []PerMille{334, 333, 333}},
		{[]uint64{1, 2, 3, 1}, []PerMille{143, 286, 428, 143}}, // remainders .857 .714 .571 .857
		{[]uint64{10, 5, 1}, []PerMille{625, 313, 62}},         // remainders 0 .5 .5
		{[]uint64{999_999, 1}, []PerMille{1000, 0}},
		{[]uint64{0, 0}, []PerMille{500, 500}},
		{[]uint64{1 << 50, 1 << 49}, []PerMille{667, 333}},
	} {
		list := make([]*candidate, len(c.amounts))
		for i := range list {
			list[i] = &candidate{tier: -1}
		}
		rest := give(list, slices.Clone(c.amounts), 3)
		var got []PerMille
		unused := 0
		for _, k := range list {
			got = append(got, k.share)
			if (k.tier == 3) != (k.share > 0) {
				t.Errorf("%v: share %d in tier %d", c.amounts, k.share, k.tier)
			}
			if k.share == 0 {
				unused++
			}
		}
		if !slices.Equal(got, c.want) || len(rest) != unused {
			t.Errorf("%v give %v instead of %v, %d left over", c.amounts, got, c.want, len(rest))
		}
	}
}

func TestMuldiv(t *testing.T) {
	const most = 1<<64 - 1
	for _, c := range [][4]uint64{{0, 5, 3, 0}, {5, 7, 7, 5}, {most, most, most, most}, {whole, 1, 3, whole / 3}, {most, 1, 2, most / 2}} {
		if got := muldiv(c[0], c[1], c[2]); got != c[3] {
			t.Errorf("%d * %d / %d = %d instead of %d", c[0], c[1], c[2], got, c[3])
		}
	}
}
