#!/usr/bin/env bash
# Let sites in, by their public keys.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: register.sh CONNECTION KEY.pub..." >&2; exit 2; }
connection=$1
shift
for key in "$@"; do
    echo "$key"
    flwr supernode register "$key" "$connection"
done
