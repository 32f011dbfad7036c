package process

import (
	"flag"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/weftmesh/weft/gateway"
)

// Settings are the flags that weft-gateway and weft-proxy share.
type Settings struct {
	agent, name, stateDir, accessLog string
	engine, sdsSocket, bootstrap     string
	drain                            time.Duration
}

// Define registers the flags; program is the binary's name.
func Define(f *flag.FlagSet, program string) *Settings {
	s := &Settings{}
	host, err := os.Hostname()
	if err != nil {
		host = program
	}
	f.StringVar(&s.agent, "agent", "unix:/run/weft/"+program+".sock", "socket of the agent that stands for this process's identity, unix:`path`")
	f.StringVar(&s.name, "name", host, "`name` in the agent's status")
	f.StringVar(&s.stateDir, "state-dir", "", "`folder` for key and SVID, this process's alone")
	f.StringVar(&s.accessLog, "access-log", "-", "`file` for one JSON line per cross-cluster connection; - is stderr, empty is none")
	f.StringVar(&s.engine, "engine", BuiltIn, "who carries the traffic: built-in, or external, an Envoy that others start with --bootstrap")
	f.StringVar(&s.sdsSocket, "sds-socket", "", "unix socket, a `path`, on which an external engine gets key and SVID; its admin interface will be beside it, with -admin in the name")
	f.StringVar(&s.bootstrap, "bootstrap", "", "`file` to write, *.json, with which an external engine is to be started")
	f.DurationVar(&s.drain, "drain-connections", 15*time.Second, "how long open connections may go on after SIGTERM; less than --drain-timeout")
	return s
}

// Apply fills c in. The returned function closes the access log; call it after
// Run.
func (s *Settings) Apply(c *Config) (closeLog func() error, err error) {
	c.Agent, c.Name, c.StateDir, c.Drain = s.agent, s.name, s.stateDir, s.drain
	c.Engine, c.SDSSocket, c.Bootstrap = s.engine, s.sdsSocket, s.bootstrap
	closeLog = func() error { return nil }
	switch {
	case s.accessLog == "", s.engine == External: // an external engine writes its own
		return closeLog, nil
	case s.accessLog == "-":
		c.Access = gateway.LogAccess(c.Log)
		return closeLog, nil
	}
	// Appended to line by line, so that a log shipper may move it away; it is
	// opened anew by the next start.
	f, err := os.OpenFile(s.accessLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return closeLog, err
	}
	c.Access = gateway.LogAccess(slog.New(slog.NewJSONHandler(io.Writer(f), nil)))
	return f.Close, nil
}
