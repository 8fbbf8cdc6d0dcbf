#!/usr/bin/env bash
# Submit a run, show its log, and exit with 0 only where it was completed: `flwr run --stream` exits with 0 always.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: run.sh CONNECTION [OPTION OF flwr run]..." >&2; exit 2; }
connection=$1
shift
app=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

field() { # of the first run in `flwr list`'s JSON, or of `flwr run`'s
    python3 -c 'import json, sys; found = json.load(sys.stdin); print((found.get("runs") or [found])[0][sys.argv[1]])' "$1"
}

answer=$(flwr run "$app" "$connection" --format json "$@" </dev/null) || true
run=$(field run-id <<<"$answer" 2>/dev/null) || { echo "run.sh: not started: $answer" >&2; exit 1; }
echo "run.sh: run $run; Ctrl-C leaves it going, flwr stop $run $connection ends it"
flwr log "$run" "$connection" --stream || true # ends with the run, or earlier with the connection

unknown=0
while [ "$unknown" -lt 10 ]; do
    found=$(flwr list --run-id "$run" "$connection" --format json 2>/dev/null) || true
    status=$(field status <<<"$found" 2>/dev/null) || status=
    case $status in
        finished:completed) echo "run.sh: run $run completed"; exit 0 ;;
        finished:*)
            echo "run.sh: run $run $status: $(field status-details <<<"$found")" >&2
            exit 1
            ;;
        "") unknown=$((unknown + 1)) ;;
        *) unknown=0 ;;
    esac
    sleep 5
done
echo "run.sh: run $run: the SuperLink no longer answers; how it ended is not known" >&2
exit 1
