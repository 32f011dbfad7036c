package tunnel

import (
	"errors"
	"fmt"

	"golang.org/x/net/http2"
)

// Why a tunnel takes no new stream, or ended. Open's errors wrap them.
var (
	// ErrDraining: this side or the peer has asked for no more streams.
	ErrDraining = errors.New("tunnel is draining")
	// ErrFull: as many streams are open as the peer or the configuration allows.
	ErrFull = errors.New("tunnel has no room for another stream")
	// ErrNoAnswer: the far side did not answer a stream in time.
	ErrNoAnswer = errors.New("no answer in time")
	// ErrClosed: this side closed the tunnel or the stream.
	ErrClosed = errors.New("tunnel is closed")
)

// Refusal is an answer other than 200: no backend is connected, and the next
// candidate may be tried.
type Refusal struct {
	Status int
	Header Header
}

func (r *Refusal) Error() string { return fmt.Sprintf("far side answered %d", r.Status) }

// OpenError says that a stream got no answer at all.
type OpenError struct {
	// Safe means that no byte of this stream can have reached a backend, so that
	// the same bytes may go elsewhere. Without early data it is always true.
	Safe bool
	Err  error
}

func (e *OpenError) Error() string { return "open stream: " + e.Err.Error() }
func (e *OpenError) Unwrap() error { return e.Err }

// ResetError ended a stream before its proper end.
type ResetError struct {
	Code   http2.ErrCode
	Remote bool // the peer reset it, else this side did
}

func (e *ResetError) Error() string {
	who := "this side"
	if e.Remote {
		who = "the peer"
	}
	return fmt.Sprintf("stream reset by %s: %v", who, e.Code)
}

// LostError ended a tunnel, and with it every stream in it.
type LostError struct {
	Code   http2.ErrCode // NO_ERROR when the connection simply broke
	Remote bool          // the peer gave the code, else this side did
	Err    error         // what happened, never nil
}

func (e *LostError) Error() string {
	if e.Code == http2.ErrCodeNo {
		return "tunnel lost: " + e.Err.Error()
	}
	who := "refused by this side"
	if e.Remote {
		who = "closed by the peer"
	}
	return fmt.Sprintf("tunnel %s with %v: %v", who, e.Code, e.Err)
}

func (e *LostError) Unwrap() error { return e.Err }

// Lost tells it from the reset of one stream.
func (e *LostError) Lost() bool { return true }

// violation is a connection error of the peer's making.
func violation(code http2.ErrCode, format string, args ...any) error {
	return &LostError{Code: code, Err: fmt.Errorf(format, args...)}
}
