package serve

import (
	"log/slog"
	"net"
)

// notifier tells systemd of the process's state where NOTIFY_SOCKET asks for
// it (Type=notify), and does nothing elsewhere.
func notifier(getenv func(string) (string, bool), log *slog.Logger) func(state string) {
	path, _ := getenv("NOTIFY_SOCKET")
	if path == "" {
		return func(string) {}
	}
	return func(state string) {
		conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			log.Warn("cannot tell systemd", "state", state, "error", err)
			return
		}
		defer conn.Close()
		if _, err := conn.Write([]byte(state)); err != nil {
			log.Warn("cannot tell systemd", "state", state, "error", err)
		}
	}
}
