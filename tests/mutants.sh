#!/usr/bin/env bash
# Plants each known mistake in a copy of the code and plays the simulation until a seed finds it: first the stories that are
# told on purpose, which are few, then those of an ordinary run.
#
#   tests/mutants.sh [NAME…]     all of tests/simulation/mutants, or those named
#   tests/mutants.sh --check     only whether each can be planted in the code as it is
#
# Prints which seed found which mistake; fails where one is not found by any, and where the stories do not end well before
# anything is planted.
set -euo pipefail
# A mistake is found by the stories of an ordinary run, or it takes too long to be.
unset KILN_TEST_FULL
cd "$(dirname "$0")/.."
root=$PWD

# A patch that fits only nearly may plant something else one day.
if [ "${1:-}" = --check ]; then
    unfit=0
    for patch in tests/simulation/mutants/*.patch; do
        git apply --check "$patch" || { echo "$patch can't be planted" >&2 && unfit=1; }
    done
    exit "$unfit"
fi

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

build() {
    (cd "$tree" && cargo test --quiet --release --locked -p kiln-simulation --no-run 2>&1)
}

# What did not hold, with the seed that showed it; nothing where all holds. Whatever else ends the stories, such as a full
# disk, shows nothing, and ends this.
play() {
    local stories played
    for stories in "takeover:: purpose::" "--exact tests::every_seed_ends_well"; do
        # shellcheck disable=SC2086 # several words
        if played=$(cd "$tree" && KILN_FAILURES=1 cargo test --quiet --release --locked -p kiln-simulation \
            -- $stories --nocapture 2>&1); then
            continue
        fi
        if ! grep --max-count=1 '^seed [0-9]*: ' <<<"$played"; then
            tail -n 30 <<<"$played" >&2
            echo "the stories ended, and of none of them is said what does not hold" >&2
            return 1
        fi
        return
    done
}

if ! output=$(build); then
    echo "what nothing is planted in can't be compiled" >&2
    echo "$output" >&2
    exit 1
fi
found=$(play)
if [ -n "$found" ]; then
    echo "nothing is planted, and it does not hold: $found" >&2
    exit 1
fi

missed=0
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    patch --quiet --directory="$tree" --strip=1 <"$patch"
    if ! output=$(build); then
        echo "$name: can't be compiled" >&2
        echo "$output" >&2
        exit 1
    fi
    found=$(play)
    if [ -n "$found" ]; then
        echo "$name: ${found:0:160}"
    else
        echo "$name: NOT FOUND" >&2
        missed=$((missed + 1))
    fi
    patch --quiet --reverse --directory="$tree" --strip=1 <"$patch"
done
echo "${#patches[@]} mistakes planted, $missed not found"
[ "$missed" -eq 0 ]
