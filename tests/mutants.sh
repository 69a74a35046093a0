#!/usr/bin/env bash
# Plants each known mistake in a copy of the code and plays the simulation until a seed finds it: first the stories of an
# ordinary run, then those that are told on purpose.
#
#   tests/mutants.sh [NAME…]     all of tests/simulation/mutants, or those named
#
# Prints which seed found which mistake; fails where one is not found by any.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
# A target folder of its own: cargo takes the same crate of two trees for one, and a mistake that is planted here must not
# come into what is built elsewhere.
target=${CARGO_TARGET_DIR:-$root/target}/mutants
export CARGO_TARGET_DIR=$target/build
tree=$target/tree
trap 'rm -rf "$tree"' EXIT

if [ "$#" -gt 0 ]; then
    patches=()
    for name in "$@"; do
        patches+=("$root/tests/simulation/mutants/$name.patch")
    done
else
    patches=("$root"/tests/simulation/mutants/*.patch)
fi

rm -rf "$tree"
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --touch --directory="$tree"

missed=0
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    patch --quiet --directory="$tree" --strip=1 <"$patch"
    if ! build=$(cd "$tree" && cargo test --quiet --release --locked -p kiln-simulation --no-run 2>&1); then
        echo "$name: can't be compiled" >&2
        echo "$build" >&2
        exit 1
    fi
    found=
    for stories in "--exact tests::every_seed_ends_well" "takeover::"; do
        # shellcheck disable=SC2086 # two words
        played=$(cd "$tree" && KILN_FAILURES=1 cargo test --quiet --release --locked -p kiln-simulation \
            -- $stories --nocapture 2>&1) || found=yes
        [ -z "$found" ] || break
    done
    if [ -n "$found" ]; then
        echo "$name: $(grep --max-count=1 '^seed [0-9]*: ' <<<"$played" | cut -c 1-160)"
    else
        echo "$name: NOT FOUND" >&2
        missed=$((missed + 1))
    fi
    patch --quiet --reverse --directory="$tree" --strip=1 <"$patch"
done
echo "${#patches[@]} mistakes planted, $missed not found"
[ "$missed" -eq 0 ]
