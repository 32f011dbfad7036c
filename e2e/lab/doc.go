// Package lab runs a whole mesh on one machine: the real binaries as separate
// processes, on addresses of their own in 127.0.0.0/8, with everything they
// write in one folder. The demo and the end-to-end suites are built on it.
//
// Nothing outlives a Lab: Close ends every process that it started, by its
// process id, and removes the folder. Should the lab's own process be killed,
// the kernel kills the children (PR_SET_PDEATHSIG).
package lab
