#!/usr/bin/env bash
# The whole story under load, in a site of its own; `deploy/quickstart.sh --check` builds and calls it.
set -euo pipefail
cd "$(dirname "$0")/../.."
source deploy/quickstart/common.sh

work=$(mktemp -d /tmp/kiln-check.XXXXXX)
export KILN_HOME=$work/home KILN_SITE=check-${work##*.}
KILN_SITE=${KILN_SITE,,}
repository=$work/repository
load_pids=()
finished=

kiln() {
    as_root "$bin/kiln" --home "$KILN_HOME" --site "$KILN_SITE" "$@"
}

cleanup() {
    local code=$?
    trap - EXIT INT TERM
    if [ -z "$finished" ]; then
        say "The check did not come to its end; what is known:"
        { kiln status web; kiln history web; kiln why web; } >&2 || true
        as_root sh -c 'tail -n 20 "$1"/logs/*.log' sh "$KILN_HOME" >&2 || true
        for pid in "${load_pids[@]}"; do as_root kill "$pid" 2>/dev/null || true; done
        kiln down --delete-state >&2 || true
        [ "$code" -ne 0 ] || code=1
    fi
    as_root rm -rf --one-file-system "$work"
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

problems=()
expect() { # expect WHAT CONDITION...: remembers what did not hold, and goes on
    local what=$1
    shift
    if "$@"; then return; fi
    problems+=("$what")
    say "NOT AS EXPECTED: $what"
}

now() { echo "$EPOCHREALTIME"; }
since() { jq -n "$EPOCHREALTIME - $1 | . * 100 | round / 100"; }

# status_is FILTER: whether the fleet is so.
status_is() { kiln status web -o json 2>/dev/null | jq -e "$1" >/dev/null 2>&1; }

# wait_until SECONDS WHAT FILTER
wait_until() {
    local deadline=$((SECONDS + $1))
    until status_is "$3"; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            say "waited $1 s in vain until $2"
            return 1
        fi
        sleep 0.1
    done
}

# The fleet runs this release, whole, and nothing of another one is left.
whole() {
    echo ".fleet.release == $1 and (.fleet.rollout == null or (.fleet.rollout.state | IN(\"running\", \"held\", \"rolling_back\") | not))
        and .fleet.healthy == 3
        and ([.instances[] | select(.state | IN(\"launching\", \"running\", \"draining\")) | .release] == [$1, $1, $1])"
}

start_load() {
    "$bin/kiln-load" --to "127.0.0.1:$port" --clients 8 --rate 300 --text Hello >"$work/$1.json" &
    load_pids+=($!)
}

end_load() {
    kill -INT "${load_pids[-1]}" 2>/dev/null || true
    wait "${load_pids[-1]}" || true
    unset 'load_pids[-1]'
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# The first process of an instance: in its cgroup, and number 1 in its own view.
pid_of() {
    local folder
    for folder in /proc/[0-9]*; do
        # A process may end while it is looked at.
        if grep -qs "/$1\b" "$folder/cgroup" && [ "$(awk '/^NSpid:/ { print $NF }' "$folder/status" 2>/dev/null)" = 1 ]; then
            basename "$folder"
            return
        fi
    done
    return 1
}

say "Starting a site of its own in $KILN_HOME"
port=$(free_port)
make_repository "$repository"
sed -i "s/listen: 8080/listen: $port/" "$repository/web/server.yaml"
commit "$repository" "Take a free port"
kiln up --config poll.git=1s >&2

say "Applying the example"
begun=$(now)
kiln apply "$repository" --branch main --wait >&2
first_s=$(since "$begun")
wait_until 30 "three instances of r1 are healthy" "$(whole 1)"
instances=$(kiln instances web -o json | jq '[.instances[] | select(.health == "healthy" and .on_edge)] | length')
expect "three healthy instances" test "$instances" -eq 3
# Not by the function: what is stopped later must be the command itself, or the sudo that passes root's signal on.
"${root[@]}" "$bin/kiln" --home "$KILN_HOME" events --follow -o json >"$work/events.jsonl" 2>"$work/events.log" &
load_pids+=($!)

say "A commit is followed, under load"
start_load planned
sed -i 's/Edition 1/Edition 2/' "$repository/web/site/index.html"
commit "$repository" "Second edition"
begun=$(now)
wait_until 120 "the fleet runs r2" "$(whole 2)"
commit_to_replaced_s=$(since "$begun")
expect "the page is that of the commit" grep -q "Edition 2" <(curl -fsS "http://127.0.0.1:$port/")

say "A bad commit is rolled back: its health check asks for a page that is not there"
sed -i 's/Edition 2/Edition 3/' "$repository/web/site/index.html"
sed -i 's|health: { http: { port: 80, path: / }|health: { http: { port: 80, path: /missing }|' "$repository/web/server.yaml"
commit "$repository" "Third edition"
begun=$(now)
wait_until 60 "r3 is being tried" '.fleet.rollout.to_release == 3 or (.fleet.quarantine | any(.release == 3))'
wait_until 120 "the fleet is back on r2" "(.fleet.quarantine | any(.release == 3)) and $(whole 2)"
bad_commit_to_rolled_back_s=$(since "$begun")
expect "the page is that of the good commit" grep -q "Edition 2" <(curl -fsS "http://127.0.0.1:$port/")
# Three polls of Git later the bad commit has not been tried again.
sleep 3
end_load
releases=$(kiln history web -n 0 -o json | jq '.releases | length')
expect "three releases, and no second attempt at the bad one" test "$releases" -eq 3
expect "the definition is quarantined" status_is '.server.quarantined'

say "An instance is killed, and replaced"
victim=$(kiln instances web -o json | jq -r '.instances[0].id')
start_load killed
sleep 1
as_root kill -KILL "$(pid_of "$victim")"
begun=$(now)
wait_until 60 "$victim is replaced" \
    "$(whole 2) and ([.instances[] | select(.state == \"running\") | .id] | index(\"$victim\") == null)"
killed_to_replaced_s=$(since "$begun")
sleep 1
end_load

say "A write into a running instance is refused"
survivor=$(kiln instances web -o json | jq -r '.instances[0].id')
refused=true
# Even for root of this machine, inside the instance's own view of its files.
for command in 'echo changed > /var/www/html/index.html' 'rm /etc/nginx/nginx.conf' 'touch /usr/bin/new'; do
    if as_root nsenter --target "$(pid_of "$survivor")" --mount -- /bin/sh -c "$command" 2>>"$work/refused"; then
        refused=false
    fi
done
expect "writes into a running instance are refused" "$refused"
expect "they are refused because the file system is read-only" \
    test "$(grep -c 'Read-only file system' "$work/refused")" -eq 3

say "Taking everything down"
as_root kill "${load_pids[-1]}" 2>/dev/null || true
wait "${load_pids[-1]}" || true
unset 'load_pids[-1]'
rolled_back=$(jq -s '[.[] | select(.type == "kiln.deployer.rollout.rolled_back.v1")] | length' "$work/events.jsonl")
expect "the rollback was told as an event" test "$rolled_back" -eq 1
rollback_s=$(jq -s '
    def seconds: sub("\\.[0-9]+"; "") as $whole | (capture("(?<part>\\.[0-9]+)").part // "0" | tonumber)
        + ($whole | fromdateiso8601);
    def at($verb): map(select(.type == "kiln.deployer.rollout.\($verb).v1") | .time | seconds) | last;
    (at("rolled_back") - at("rolling_back")) * 100 | round / 100' "$work/events.jsonl" || echo null)
id=$(as_root sed -n 's/^id *= *"\(.*\)"/\1/p' "$KILN_HOME/site.toml")
down=$(kiln down --delete-state -o json) || true
leftovers=$(jq '.leftovers | length' <<<"$down" || true)
leftovers=${leftovers:-null}
expect "nothing is left: $(jq -c .leftovers <<<"$down")" test "$leftovers" = 0

# The command's own word is checked by other means.
seen() {
    local file line
    for file in /proc/[0-9]*/cmdline; do
        # Read by the shell itself: a program that was given the text to look for would find itself.
        line=$(tr '\0' ' ' 2>/dev/null <"$file") || continue
        if [[ $line == *"$KILN_HOME"* ]]; then echo "process $line"; fi
    done
    grep -F -e "$work/" -e "$id" /proc/self/mountinfo || true
    find /run/netns -name "*$id*" 2>/dev/null || true
    as_root nft list tables | grep -F "$id" || true
    find /sys/class/net -name "*kiln-${id:0:6}*"
    find /sys/fs/cgroup -maxdepth 4 -name "*kiln-$id*" 2>/dev/null || true
}
left=$(seen)
expect "nothing is left on the machine: $left" test -z "$left"
finished=yes

total() { jq -s "map(.$1) | add" "$work/planned.json" "$work/killed.json"; }
# A load that came to nothing prints nothing.
of() { jq ".$1" "$work/$2.json" 2>/dev/null | grep . || echo null; }
failed_planned=$(of failed planned)
failed_after_kill=$(of failed killed)
expect "there was load while instances were replaced" test "$(of requests planned)" -ge 1000
expect "there was load when an instance was killed" test "$(of requests killed)" -ge 300
expect "no request failed while instances were replaced: $(jq -c '.failures[:5]' "$work/planned.json")" \
    test "$failed_planned" -eq 0
# What was in flight (8 clients) and 100 ms of traffic (300 requests a second).
expect "few requests failed when an instance was killed: $(jq -c '.failures[:5]' "$work/killed.json")" \
    test "$failed_after_kill" -le 38

if [ "${#problems[@]}" -eq 0 ]; then
    say "All as expected"
else
    say "Not as expected:"
    printf '  %s\n' "${problems[@]}" >&2
fi
jq -cn \
    --argjson instances "$instances" --argjson releases "$releases" --argjson requests "$(total requests)" \
    --argjson failed_planned "$failed_planned" --argjson failed_after_kill "$failed_after_kill" \
    --argjson commit_to_replaced_s "$commit_to_replaced_s" --argjson rollback_s "$rollback_s" \
    --argjson leftovers "$leftovers" --argjson apply_to_healthy_s "$first_s" \
    --argjson bad_commit_to_rolled_back_s "$bad_commit_to_rolled_back_s" \
    --argjson killed_to_replaced_s "$killed_to_replaced_s" \
    --argjson write_refused "$refused" --argjson problems "${#problems[@]}" '$ARGS.named'
[ "${#problems[@]}" -eq 0 ]
