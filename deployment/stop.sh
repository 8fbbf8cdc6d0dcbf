#!/usr/bin/env bash
# Stop what link.sh and site.sh started from a folder on this machine: the SuperNodes first, so that each can sign off,
# then the SuperLink. What has not ended within a minute is killed.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: stop.sh FOLDER" >&2; exit 2; }
shopt -s nullglob

runs() { # PID PROGRAM: a number that another program was given meanwhile is none of ours, nor is a process that ended
    local found
    found=$(ps -o stat= -o args= -p "$1" 2>/dev/null) && [[ $found != Z* && $found == *"$2"* ]]
}

stop() { # PROGRAM PIDFILE...
    local program=$1 file waited=0
    shift
    for file in "$@"; do
        if runs "$(<"$file")" "$program"; then kill -TERM "$(<"$file")" || true; fi
    done
    for file in "$@"; do
        while runs "$(<"$file")" "$program"; do
            if [ "$waited" -eq 60 ]; then
                echo "stop.sh: $program $(<"$file") did not end within a minute and is killed" >&2
                kill -KILL "$(<"$file")" || true
                break
            fi
            sleep 1
            waited=$((waited + 1))
        done
        rm -f "$file"
    done
}

stop flower-supernode "$1"/site-*.pid
stop flower-superlink "$1"/link.pid
