// Package process is a gateway or a proxy as a process: it learns from its
// agent who it is, keeps its own key and SVID, runs the built-in engine on the
// resources that the agent serves, and tells the agent what the engine sees.
//
// Where an external engine stands in the built-in one's place (Config.Engine),
// the process keeps its key, serves it by SDS, and writes what that engine is
// started with.
//
// While the agent is away the engine goes on with what it has, and the SVID
// lives until its end. The process needs the agent only to start for the first
// time and to renew.
package process
