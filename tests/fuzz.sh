#!/usr/bin/env bash
# Feeds every reader of bytes that are not Kiln's own with what libFuzzer makes of the examples in tests/fuzz/corpus.
# `tests/run.sh --full` does it.
#
#   tests/fuzz.sh [SECONDS [READER…]]    60 seconds for each where none are said
#
# Fails where one panics, takes more than a second for an input or more than 512 MiB; the input is in tests/fuzz/artifacts then.
# Once that is mended, it belongs into tests/fuzz/corpus, which `cargo nextest run` reads each time.
set -euo pipefail
cd "$(dirname "$0")/fuzz"
../../deploy/prerequisites.sh --fuzzing >&2

seconds=${1:-60}
shift || :
readers=("$@")
if [ "${#readers[@]}" -eq 0 ]; then
    for target in fuzz_targets/*.rs; do
        readers+=("$(basename "$target" .rs)")
    done
fi

# As cargo-fuzz has them, and nothing that a stable compiler would not take. With `--target` they are not for what builds.
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
target=${CARGO_TARGET_DIR:-../../target}/fuzz
cargo build --quiet --release --locked --target "$host" --target-dir "$target"

# What is found lasts until the next run, and changes nothing of the examples.
found=$target/found
for reader in "${readers[@]}"; do
    mkdir -p "$found/$reader" "artifacts/$reader"
    echo "$reader: $seconds s"
    if ! "$target/$host/release/$reader" "$found/$reader" "corpus/$reader" -max_total_time="$seconds" -timeout=1 \
        -rss_limit_mb=512 -max_len=65536 -artifact_prefix="artifacts/$reader/" -print_final_stats=1 &>"$found/$reader.log"; then
        tail -n 40 "$found/$reader.log" >&2
        echo "$reader fell over an input: see tests/fuzz/artifacts/$reader" >&2
        exit 1
    fi
    grep -E '^stat::(number_of_executed_units|peak_rss_mb)' "$found/$reader.log"
done
