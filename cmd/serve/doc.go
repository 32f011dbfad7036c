// Package serve runs a server process: what every long-running main of Weft
// does the same way, so that a main is flags, wiring and a list of tasks.
//
// Settings come from flags, from the environment and from one YAML file
// (--config), under the same names; a flag goes before the environment, the
// environment before the file. The flag --kek-file of weft-controller is
// WEFT_CONTROLLER_KEK_FILE, or WEFT_KEK_FILE for every process at once, in the
// environment, and kek-file in the file. A name in the file that the program
// does not know is refused. The environment is not searched for such names:
// Kubernetes puts variables like WEFT_CONTROLLER_SERVICE_HOST there.
//
// The process then has a logger on stderr, a metrics registry of its own, an
// admin listener on loopback (/metrics, /healthz, /readyz, /debug/pprof), and
// its tasks. The first SIGTERM or SIGINT, or a task that fails, stops the
// tasks in the reverse order of their list, each before the next, within
// --drain-timeout; a second signal ends the process at once. It exits with 0
// after a clean stop, 1 after a failure, 2 when its settings are wrong.
package serve
