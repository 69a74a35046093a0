#!/usr/bin/env bash
# Runs every check and every test, from nothing but Rust, gcc and Python on Debian 12.
#
#   tests/run.sh          what a change must pass; long tests are sampled
#   tests/run.sh --full   the same with full counts, the scenarios on PostgreSQL as well, known mistakes planted for the
#                         simulation to find, what reads others' bytes fuzzed for a minute each, a site in containers, and
#                         an upgrade from the programs before their last change, which are compiled for it (the history
#                         has to be there)
#
# The tests are run as root, with sudo where this is not; all else is done as who calls.
set -euo pipefail
cd "$(dirname "$0")/.."

# Cases of each property test.
export PROPTEST_CASES=500
case "${1:-}" in
    "") ;;
    --full) export KILN_TEST_FULL=1 NEXTEST_PROFILE=full PROPTEST_CASES=50000 ;;
    *)
        echo "tests/run.sh: unknown argument '$1'; there is --full" >&2
        exit 2
        ;;
esac

started=$SECONDS
step() {
    echo
    echo "== $1 ($((SECONDS - started)) s)"
}

step "lints, while what the tests need is installed"
# The one waits for the processor, the other for the network and the disk.
{ deploy/prerequisites.sh --tests && tests/tools.sh; } &
installed=$!
# Whatever ends this, nothing is left half installed.
trap wait EXIT
cargo clippy --quiet --release --workspace --all-targets --locked -- -D warnings
wait "$installed"
export PATH="$PWD/target/tools:$PATH"

if [ "$(id -u)" -ne 0 ]; then
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${host}_RUNNER=$PWD/tests/as-root.sh"
fi

step "format, protocol, dependencies, mistakes to plant"
cargo fmt --all --check
tests/mutants.sh --check
(cd proto && buf lint && buf breaking --against ../tests/earlier/proto.binpb)
cargo deny --log-level error check bans licenses sources

step "build"
# At once, so that no core waits for the last of the programs before it begins with the tests.
cargo build --quiet --release --workspace --bins --tests --locked

# Several sites that write to one disk at once wait for it, most of all for its syncs.
memory=/dev/shm
if [ "$(df --output=avail --block-size=1G "$memory" 2>/dev/null | tail -n 1)" -ge 8 ] 2>/dev/null; then
    mkdir -p "$memory/kiln-tests"
    export KILN_TEST_FOLDER=$memory/kiln-tests
fi

step "tests"
cargo nextest run --release --workspace --locked

if [ "${1:-}" = --full ]; then
    step "scenarios on PostgreSQL"
    KILN_TEST_STORE=postgres cargo nextest run --release --workspace --locked -E \
        'package(kiln-tests) or test(traffic_flows_while_everything_of_kiln_is_down)'
fi

if [ "${1:-}" = --full ]; then
    step "planted mistakes"
    tests/mutants.sh

    step "readers of what others write, fuzzed"
    tests/fuzz.sh

    step "a site in containers"
    cargo nextest run --release --workspace --locked --run-ignored only -E 'package(kiln-tests) and test(/^contained::/)'

    step "an upgrade from the programs before"
    tests/upgrade.sh
else
    echo "not done (--full does it): planted mistakes, fuzzing and the upgrade from the programs before, which have to" \
        "be compiled, and a site in containers, for which a base and five images have to be made"
fi

step "the quickstart's own check"
deploy/quickstart.sh --check

step "done"
