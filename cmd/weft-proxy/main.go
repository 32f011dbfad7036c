// Command weft-proxy stands beside a workload: it ends the mTLS of its callers, and carries its own calls out.
package main

import (
	"context"
	"errors"

	"github.com/weftmesh/weft/cmd/serve"
	"github.com/weftmesh/weft/gateway/process"
)

var version = "" // set by the linker

func main() {
	const name = "weft-proxy"
	serve.Main(serve.Program{
		Name:    name,
		Summary: "stands beside a workload and ends the mTLS of its callers",
		Version: version,
		Admin:   "127.0.0.1:9904",
	}, func(f *serve.Flags) serve.Wire {
		settings := process.Define(f.FlagSet, name)
		return func(_ context.Context, p *serve.Process) ([]serve.Task, error) {
			c := process.Config{Version: p.Version, Clock: p.Clock, Log: p.Log, Metrics: p.Metrics}
			closeLog, err := settings.Apply(&c)
			if err != nil {
				return nil, err
			}
			engine, err := process.New(c)
			if err != nil {
				return nil, serve.Usagef("%w", err)
			}
			p.Ready.Add("mesh", engine.Ready)
			return []serve.Task{{Name: "engine", Run: func(ctx context.Context) error {
				return errors.Join(engine.Run(ctx), closeLog())
			}}}, nil
		}
	})
}
