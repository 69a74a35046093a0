#!/usr/bin/env bash
# From nothing to three web servers that follow a Git repository.
#
#   deploy/quickstart.sh           starts Kiln, applies deploy/examples/web from a Git repository that it makes, waits
#                                  for three healthy instances, and says what to try next
#   deploy/quickstart.sh --check   in a site of its own: the same, then a commit, a bad commit, a killed instance and a
#                                  write into a running one, all under load; takes everything down and prints one line
#                                  of JSON last
#
# On Debian 12 with Rust; as root, or with sudo.
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/quickstart/common.sh

case "${1:-}" in
    "") ;;
    --check)
        prepare --bin kiln-load
        exec deploy/quickstart/check.sh
        ;;
    *)
        echo "quickstart.sh: unknown argument '$1'; there is --check" >&2
        exit 2
        ;;
esac

prepare
repository=${KILN_QUICKSTART_REPOSITORY:-$HOME/kiln-quickstart}
if [ ! -d "$repository/.git" ]; then
    say "Making a Git repository in $repository"
    make_repository "$repository"
fi

say "Starting Kiln"
kiln up
say "Applying the branch main of $repository"
kiln apply "$repository" --branch main --wait

port=$(kiln status web -o json | jq -r '.fleet.ports[0].listen')
cat <<TEXT

Three instances of web answer on  http://127.0.0.1:$port/

Try:
  curl http://127.0.0.1:$port/
  $EDITOR_HINT $repository/web/site/index.html
  git -C $repository commit -am "Say more"      # no more than that: Kiln sees the commit,
  $KILN_HINT events --follow                    # bakes an image, and replaces the instances
  $KILN_HINT status web
  $KILN_HINT why web
  $KILN_HINT rollback web
  $KILN_HINT down                               # takes everything off this machine; the state stays
TEXT
