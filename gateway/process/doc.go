// Package process is a gateway or a proxy as a process: it learns from its
// agent who it is, keeps its own key and SVID, runs the built-in engine on the
// resources that the agent serves, and tells the agent what the engine sees.
//
// While the agent is away the engine goes on with what it has, and the SVID
// lives until its end. The process needs the agent only to start for the first
// time and to renew.
package process
