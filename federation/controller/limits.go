package controller

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// limits are the rates at which one source may ask for signatures. Times come
// from the caller's clock.
type limits struct {
	enrolments, signatures *limiters
}

func newLimits() *limits {
	return &limits{
		enrolments: &limiters{rate: enrollPerSecond, burst: enrollBurst, by: map[string]*limiter{}},
		signatures: &limiters{rate: issuePerSecond, burst: issueBurst, by: map[string]*limiter{}},
	}
}

// enroll admits one attempt at enrolment from an address.
func (l *limits) enroll(addr string, now time.Time) error {
	if l.enrolments.allow(addr, now) {
		return nil
	}
	return status.Errorf(codes.ResourceExhausted, "too many enrolments from %s: at most %d a second; try again later", addr, enrollPerSecond)
}

// issue admits one signature for a cluster.
func (l *limits) issue(cluster string, now time.Time) error {
	if l.signatures.allow(cluster, now) {
		return nil
	}
	return status.Errorf(codes.ResourceExhausted, "too many identities for cluster %s: at most %d a second; try again later", cluster, issuePerSecond)
}

// limiters holds one rate for each source. A source that has been quiet is
// forgotten; where there are too many, all new ones share the last place.
type limiters struct {
	rate  rate.Limit
	burst int

	mu     sync.Mutex
	by     map[string]*limiter
	forgot time.Time
}

type limiter struct {
	*rate.Limiter
	used time.Time
}

func (l *limiters) allow(source string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	one := l.by[source]
	if one == nil {
		if len(l.by) >= limitersKept {
			l.forget(now)
		}
		if len(l.by) >= limitersKept {
			source = ""
			one = l.by[source]
		}
		if one == nil {
			one = &limiter{Limiter: rate.NewLimiter(l.rate, l.burst)}
			l.by[source] = one
		}
	}
	one.used = now
	return one.AllowN(now, 1)
}

// forget drops quiet sources. It goes through all of them, so it does so once a
// second at most.
func (l *limiters) forget(now time.Time) {
	if now.Sub(l.forgot) < time.Second {
		return
	}
	l.forgot = now
	for source, one := range l.by {
		if now.Sub(one.used) > limiterForgets {
			delete(l.by, source)
		}
	}
}
