// Command weft is the mesh's command line: it registers clusters, applies
// policies, shows what is there, and answers where traffic goes and why.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// version is set by the linker.
var version = "" //nolint:gochecknoglobals // the linker's -X needs a package variable

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
