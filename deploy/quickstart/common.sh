# What the quickstart and its check share. Sourced, in the folder of the checkout.
# shellcheck shell=bash

target=${CARGO_TARGET_DIR:-target}
bin=$(realpath -m "$target")/release
EDITOR_HINT=${EDITOR:-nano}
KILN_HINT=$bin/kiln
[ "$(id -u)" -eq 0 ] || KILN_HINT="sudo $KILN_HINT"

say() {
    printf '\n== %s\n' "$*" >&2
}

root=()
[ "$(id -u)" -eq 0 ] || root=(sudo --)

as_root() {
    "${root[@]}" "$@"
}

kiln() {
    as_root "$bin/kiln" "$@"
}

# Packages, the broker, the binaries. Arguments go to cargo, beside those for Kiln itself.
prepare() {
    say "Looking for what is missing on this machine"
    deploy/prerequisites.sh
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
        echo "quickstart: instances are run by root: run this as root, or install sudo" >&2
        exit 1
    fi
    say "Building Kiln"
    cargo build --release --locked --bin kiln --bin kiln-builder --bin kiln-deployer --bin kiln-monitor \
        --bin kiln-node "$@"
}

# make_repository FOLDER: the example as the first commit of a new repository, in a folder named as the server.
make_repository() {
    mkdir -p "$1"
    cp -RT deploy/examples/web "$1/web"
    # The schema's path is that of the checkout.
    sed -i '/yaml-language-server/,/^#$/d' "$1/web/server.yaml"
    git -C "$1" init --quiet --initial-branch main
    # The next commits are the user's: on a machine where git knows nobody, they would be refused.
    git -C "$1" config user.name >/dev/null || git -C "$1" config user.name Quickstart
    git -C "$1" config user.email >/dev/null || git -C "$1" config user.email quickstart@localhost
    commit "$1" "Begin"
}

# commit FOLDER MESSAGE: everything that changed there; nobody is asked for the passphrase of a key.
commit() {
    git -C "$1" add --all
    git -C "$1" -c commit.gpgsign=false commit --quiet --message "$2"
}
