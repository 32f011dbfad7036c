// Command weft-gateway carries a cluster's traffic to and from other clusters.
package main

import (
	"context"
	"errors"

	"github.com/weftmesh/weft/cmd/serve"
	"github.com/weftmesh/weft/gateway/process"
)

var version = "" // set by the linker

func main() {
	const name = "weft-gateway"
	serve.Main(serve.Program{
		Name:    name,
		Summary: "carries a cluster's traffic to and from other clusters",
		Version: version,
		Admin:   "127.0.0.1:9903",
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
