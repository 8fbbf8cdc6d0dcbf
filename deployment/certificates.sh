#!/usr/bin/env bash
# Make a certificate authority of one's own, and with it a SuperLink's TLS certificate. For tests and closed groups:
# where the SuperLink has a certificate that the machines trust already, none of this is needed.
set -euo pipefail

usage() {
    echo "usage: certificates.sh FOLDER HOST...   HOST: a name or address under which the SuperLink is reached" >&2
    exit 2
}
[ $# -ge 2 ] || usage
folder=$1
shift
command -v openssl >/dev/null || { echo "certificates.sh: openssl is not installed" >&2; exit 1; }
if [ -e "$folder/ca.crt" ]; then
    echo "certificates.sh: $folder/ca.crt exists; every site trusts it: remove it yourself to start anew" >&2
    exit 1
fi

umask 077 # keys are their owner's alone
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The app's process on the SuperLink's machine comes in over loopback, so both of its names are always there.
names="DNS:localhost,IP:127.0.0.1"
for host in "$@"; do
    case $host in
        localhost | 127.0.0.1) ;;
        *:*) names="$names,IP:$host" ;; # IPv6
        *[!0-9.]*) names="$names,DNS:$host" ;;
        *) names="$names,IP:$host" ;;
    esac
done

# The key of the authority signs this one certificate and is then thrown away: nobody can sign another with it.
openssl req -x509 -newkey rsa:3072 -sha256 -days 365 -nodes -subj "/CN=fedfrom test authority" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$work/ca.key" -out "$work/ca.crt" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
openssl req -new -newkey rsa:3072 -sha256 -nodes -subj "/CN=$1" \
    -keyout "$work/server.key" -out "$work/server.csr" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
cat >"$work/extensions" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END
openssl x509 -req -sha256 -days 365 -in "$work/server.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial \
    -extfile "$work/extensions" -out "$work/server.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }

chmod 644 "$work/ca.crt" "$work/server.pem"
mv "$work/server.key" "$work/server.pem" "$folder/"
mv "$work/ca.crt" "$folder/" # last: it stands for a finished set
echo "$folder/ca.crt      for every site, and for whoever submits runs"
echo "$folder/server.pem  and server.key stay on the SuperLink's machine; for $names, 365 days"
