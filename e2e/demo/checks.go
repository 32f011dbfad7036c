package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
)

// finish checks what must hold over the whole play, prints it, and decides.
func (p *player) finish(context.Context) error {
	p.report.Checks = append(p.report.Checks, p.checkEcho(), p.checkWires(), p.checkPeers())
	p.report.conclude()
	p.print("%s\n", p.bold("Over the whole play:"))
	for _, c := range p.report.Checks {
		c.write(p.Out, p.Terminal)
	}
	verdict := colour("32", "All as promised.", p.Terminal)
	if !p.report.OK {
		verdict = colour("31", "A promise was broken.", p.Terminal)
	}
	fmt.Fprintf(p.Out, "\n%s\n", verdict)
	return nil
}

func (p *player) checkEcho() Check {
	c := Check{Name: "the echo stream lived"}
	lines, err := p.echo.state()
	c.OK = err == nil && lines > 0
	c.Detail = fmt.Sprintf("%d lines went there and back", lines)
	if err != nil {
		c.Detail += fmt.Sprintf(", then: %v", err)
	}
	return c
}

// checkWires asks the recorders between the gateways.
func (p *player) checkWires() Check {
	c := Check{Name: "no plain byte on the wire", OK: true}
	var conns, bytes, leaks, notTLS int64
	for _, name := range slices.Sorted(maps.Keys(p.stage.wires)) {
		w := p.stage.wires[name]
		conns += w.conns.Load()
		bytes += w.bytes.Load()
		leaks += w.leaks.Load()
		notTLS += w.notTLS.Load()
	}
	c.OK = conns > 0 && leaks == 0 && notTLS == 0
	c.Detail = fmt.Sprintf("%d connections between gateways, %.1f MB recorded, %d with a request's bytes, %d that did not begin with TLS", conns, float64(bytes)/1e6, leaks, notTLS)
	return c
}

// access is what the play reads of a gateway's access log.
type access struct {
	Direction string `json:"direction"`
	From      string `json:"from"`
	Cluster   string `json:"cluster"`
	Peer      string `json:"peer"`
}

// checkPeers reads every gateway's access log: each connection that left its
// cluster must have met the identity that it had to meet.
func (p *player) checkPeers() Check {
	c := Check{Name: "mTLS between the expected identities", OK: true}
	seen := map[string]int{}
	for _, name := range slices.Sorted(maps.Keys(p.stage.clusters)) {
		cluster := p.stage.clusters[name]
		err := eachLine(cluster.AccessLog(), func(a access) {
			if a.Direction == "through" || a.From == a.Cluster || a.Cluster == "" {
				return // opaque here, stayed at home, or was never connected
			}
			seen[a.Peer]++
			if !p.expected(a) {
				c.OK = false
			}
		})
		if err != nil {
			c.OK = false
			c.Detail = err.Error()
			return c
		}
	}
	var parts []string
	for _, peer := range slices.Sorted(maps.Keys(seen)) {
		parts = append(parts, fmt.Sprintf("%d with %s", seen[peer], peer))
	}
	if len(parts) == 0 {
		// A play without a fault needs no other cluster but for the echo stream,
		// which is not over yet.
		c.OK = c.OK && !p.moved()
		parts = append(parts, "no cross-cluster connection in any access log")
	}
	c.Detail = strings.Join(parts, ", ")
	return c
}

// moved reports whether some step was served by another cluster than eu-1.
func (p *player) moved() bool {
	return slices.ContainsFunc(p.report.Steps, func(s Step) bool { return s.ServedBy[eu1] < s.Requests-s.Failed })
}

// expected reports whether a is a connection between the identities that it
// must be between: outwards, whoever serves the cluster (the gateway where that
// ends the tunnel, the service's own account where it passes through); inwards,
// the gateway of the cluster that it came from.
func (p *player) expected(a access) bool {
	td := "spiffe://" + p.stage.lab.TrustDomain + "/cluster/"
	switch {
	case a.Direction == "in":
		return a.Peer == td+a.From+"/gateway"
	case a.Cluster == us1:
		return a.Peer == td+us1+"/ns/shop/sa/payments"
	default:
		return a.Peer == td+a.Cluster+"/gateway"
	}
}

// eachLine reads a file of JSON objects, one a line. A missing file has none.
func eachLine(path string, do func(access)) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		var line struct {
			Access access `json:"access"`
		}
		if err := json.Unmarshal(s.Bytes(), &line); err != nil {
			return fmt.Errorf("%s: %w in %.100q", path, err, s.Text())
		}
		do(line.Access)
	}
	return s.Err()
}
