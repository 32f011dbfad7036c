// Package demo is the play that 'weft demo' puts on: three clusters as real
// processes, a steady load through the mesh, and five acts in which things
// break and mend. It measures what a caller would notice, and judges it.
package demo
