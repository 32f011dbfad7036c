package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes of every command.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// app is what the commands share: where they talk and whom they talk to.
type app struct {
	in       io.Reader
	out, err io.Writer

	contextsFile string
	context      string
	format       string
	timeout      time.Duration

	dial dialer
}

// usageError is a call whose words are off: exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// quietError fails a command that has already said everything it has to say.
type quietError struct{}

func (quietError) Error() string { return "" }

// run is the whole program but for the process around it.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	a := &app{in: in, out: out, err: errOut, dial: dialController}
	root := a.command()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	ran, err := root.ExecuteContextC(ctx)
	return a.explain(ran, err)
}

// explain prints err for a person and turns it into an exit code.
func (a *app) explain(ran *cobra.Command, err error) int {
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, new(quietError)):
		return exitFailed
	case errors.As(err, &usage), isCobraUsage(err):
		fmt.Fprintf(a.err, "error: %v\nSee '%s --help'.\n", err, ran.CommandPath())
		return exitUsage
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(a.err, "interrupted")
		return exitFailed
	}
	fmt.Fprintf(a.err, "error: %s\n", message(err))
	return exitFailed
}

// message is an error as a person should read it: the controller's own words
// without gRPC's wrapping.
func message(err error) string {
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.Unknown {
		return err.Error()
	}
	switch s.Code() {
	case codes.Unimplemented:
		return "the controller does not know this call: it is older than this CLI; upgrade it first"
	case codes.DeadlineExceeded:
		return "the controller did not answer in time: " + s.Message() + "; look at 'weft status', or allow more with --timeout"
	default:
		return s.Message()
	}
}

// isCobraUsage recognises the parser's own complaints, which have no type.
func isCobraUsage(err error) bool {
	for _, p := range []string{
		"unknown command", "unknown flag", "unknown shorthand flag", "accepts ", "requires at least",
		"requires at most", "required flag", "flag needs an argument", "invalid argument", "if any flags in the group",
		"bad flag syntax",
	} {
		if strings.HasPrefix(err.Error(), p) {
			return true
		}
	}
	return false
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "weft",
		Short:         "One service mesh over many clusters",
		Long:          "weft joins clusters into one mesh, shows where traffic goes, and says why.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	f := root.PersistentFlags()
	f.StringVar(&a.contextsFile, "contexts", "", "file of contexts (default $WEFT_CONTEXTS, else weft/contexts.yaml in your configuration folder)")
	f.StringVar(&a.context, "context", "", "context to use (default the file's current one)")
	f.StringVarP(&a.format, "output", "o", "table", "table, wide, json, yaml or name")
	f.DurationVar(&a.timeout, "timeout", 15*time.Second, "how long to wait for the controller")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		_, err := parseFormat(a.format)
		return err
	}
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json", "yaml", "name"}, cobra.ShellCompDirectiveNoFileComp))
	_ = root.RegisterFlagCompletionFunc("context", a.completeContexts)

	root.AddGroup(
		&cobra.Group{ID: "see", Title: "See:"},
		&cobra.Group{ID: "understand", Title: "Understand:"},
		&cobra.Group{ID: "change", Title: "Change:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("see", a.getCommand(), a.describeCommand(), a.statusCommand(), a.trustCommand())
	add("understand", a.whyCommand(), a.callCommand(), a.checkCommand(), a.diffCommand())
	add("change", a.clusterCommand(), a.applyCommand(), a.deleteCommand(), a.drainCommand(), a.undrainCommand())
	root.AddCommand(a.demoCommand(), a.versionCommand())
	return root
}

// say talks to the person, beside the data: results go to out, words to err.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.err, format+"\n", args...)
}

// next says what to do after a success.
func (a *app) next(format string, args ...any) {
	if isTerminal(a.err) || a.format == "table" || a.format == "wide" {
		fmt.Fprintf(a.err, "Next: "+format+"\n", args...)
	}
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colours reports whether text on w may be coloured.
func colours(w io.Writer) bool {
	return isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
