#!/usr/bin/env bash
# Start a SuperLink over TLS that only registered SuperNodes get into. Stays in the foreground; stop.sh stops it.
set -euo pipefail

usage() {
    echo "usage: link.sh FOLDER [OPTION OF flower-superlink]...   FOLDER: what certificates.sh filled" >&2
    exit 2
}
[ $# -ge 1 ] || usage
folder=$1
shift
for file in ca.crt server.pem server.key; do
    [ -f "$folder/$file" ] || { echo "link.sh: $folder/$file: no such file; run certificates.sh" >&2; exit 1; }
done
folder=$(cd "$folder" && pwd)
command -v flower-superlink >/dev/null || { echo "link.sh: no flower-superlink; activate fedfrom's environment" >&2; exit 1; }

export FLWR_TELEMETRY_ENABLED="${FLWR_TELEMETRY_ENABLED:-0}" FLWR_DISABLE_UPDATE_CHECK="${FLWR_DISABLE_UPDATE_CHECK:-1}"
echo $$ >"$folder/link.pid"
# The database keeps registered keys over a restart. Without the last option every run would install all of the
# app's dependencies anew, without the extras and constraints that it needs.
exec flower-superlink \
    --ssl-ca-certfile "$folder/ca.crt" --ssl-certfile "$folder/server.pem" --ssl-keyfile "$folder/server.key" \
    --enable-supernode-auth --database "$folder/link.db" --disable-runtime-dependency-installation "$@"
