#!/usr/bin/env bash
# Compiles the programs as they were before they changed last, and lets them be replaced by those of this commit, and put
# back, under a site that serves, once with its state in files and once in PostgreSQL. `tests/run.sh --full` does it.
#
#   tests/upgrade.sh             from the commit before the last one that changed a program
#   tests/upgrade.sh COMMIT      from another one
set -euo pipefail
cd "$(dirname "$0")/.."

# A commit of tests alone would be replaced by the same.
changed=$(git log --max-count=1 --format=%H -- \
    proto ':(glob)services/**/src/**' ':(glob)shared/**/src/**' ':(exclude,glob)**/tests/**' ':(exclude,glob)**/tests.rs')
from=${1:-${changed:-HEAD}~1}
if ! commit=$(git rev-parse --verify --quiet "$from^{commit}"); then
    echo "tests/upgrade.sh: there is no commit $from here to upgrade from; of a clone without history: git fetch --deepen 1" >&2
    exit 1
fi
target=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")

# In a folder of its own, which stays: cargo takes the same crate of two commits for one, and would take the programs of one
# for those of the other. It tells by their times which files changed, so those of this tree are new ones.
before=$target/before
rm -rf "$before/tree"
mkdir -p "$before/tree"
git archive "$commit" | tar --extract --touch --directory="$before/tree"
echo "compiling the programs of $(git log --max-count=1 --format='%h %s' "$commit")"
(cd "$before/tree" && CARGO_TARGET_DIR=$before cargo build --quiet --release --workspace --bins --locked)

cargo build --quiet --release --workspace --bins --locked
KILN_BEFORE=$before/release cargo nextest run --release --workspace --locked --run-ignored only \
    -E 'package(kiln-tests) and test(/^upgrade::/)'
