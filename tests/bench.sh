#!/usr/bin/env bash
# Runs one benchmark against its peer, both on the same work in turn, and prints one JSON line last. Ends with 1 where the
# line's `ratio` is below its `least_ratio`.
#
#   tests/bench.sh launch|replace|replicas|cold-bake|cold-bake-empty-store|rebake-package|rebake-file|rebake-nothing|ansible|eight-builds
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    launch | replace | replicas | cold-bake | cold-bake-empty-store | rebake-package | rebake-file | rebake-nothing | ansible | eight-builds) ;;
    *)
        sed -n 's/^#   /usage: /p' "$0" >&2
        exit 2
        ;;
esac

deploy/prerequisites.sh --benchmarks >&2
cargo build --quiet --release --workspace --bins --locked >&2
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(tests/as-root.sh)
exec "${as_root[@]}" "${CARGO_TARGET_DIR:-target}/release/kiln-bench" "$1"
