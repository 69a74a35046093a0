# A dozen recipes, one command each.

# What there is
default:
    @just --list

# What this machine lacks to build and run Kiln
prerequisites:
    deploy/prerequisites.sh

# The programs
build:
    cargo build --release --workspace --bins

# Three web servers that follow a Git repository
quickstart:
    deploy/quickstart.sh

# The whole story under load, measured
check:
    deploy/quickstart.sh --check

# Every check and every test; `just test --full` for full counts
test *arguments:
    tests/run.sh {{ arguments }}

# One crate's tests: `just crate kiln-store`
crate name *filter:
    cargo nextest run --release -p {{ name }} {{ filter }}

# The lints
lint:
    cargo clippy --release --workspace --all-targets -- -D warnings

# The format
format:
    cargo fmt --all

# The code that is generated from proto/
generate:
    KILN_REGENERATE=1 cargo nextest run --release -p kiln-api

# A benchmark against its peer: `just bench launch`
bench name:
    tests/bench.sh {{ name }}

# One seed of the simulation, as a story: `just seed 17`
seed number:
    KILN_SEED={{ number }} KILN_ALOUD=1 cargo nextest run --release -p kiln-simulation --no-capture a_seed_of_ones_own
