#!/usr/bin/env bash
# Start a site's SuperNode. Stays in the foreground; stop.sh stops it.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: site.sh FOLDER NAME NODE-CONFIG [OPTION OF flower-supernode]...
  FOLDER       holds ca.crt and the key that key.sh made
  NODE-CONFIG  e.g. 'partition-id=0 glue-dir="/data/glue"'
  options      --superlink HOST:PORT, --port PORT (its own on a machine with several)
END
    exit 2
}
[ $# -ge 3 ] || usage
folder=$1 name=$2 config=$3
shift 3
[ -f "$folder/ca.crt" ] || { echo "site.sh: $folder/ca.crt: no such file; ask whoever runs the SuperLink" >&2; exit 1; }
[ -f "$folder/$name" ] || { echo "site.sh: $folder/$name: no such key; run key.sh $folder $name" >&2; exit 1; }
folder=$(cd "$folder" && pwd)
command -v flower-supernode >/dev/null || { echo "site.sh: no flower-supernode; activate fedfrom's environment" >&2; exit 1; }

export FLWR_TELEMETRY_ENABLED="${FLWR_TELEMETRY_ENABLED:-0}" FLWR_DISABLE_UPDATE_CHECK="${FLWR_DISABLE_UPDATE_CHECK:-1}"
echo $$ >"$folder/site-$name.pid"
exec flower-supernode --root-certificates "$folder/ca.crt" --auth-supernode-private-key "$folder/$name" \
    --node-config "$config" "$@"
