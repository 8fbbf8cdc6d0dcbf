#!/usr/bin/env bash
# Make a site's key pair. The site keeps NAME; NAME.pub goes to whoever runs the SuperLink, to be registered.
set -euo pipefail

[ $# -eq 2 ] || { echo "usage: key.sh FOLDER NAME" >&2; exit 2; }
folder=$1 name=$2
command -v ssh-keygen >/dev/null || { echo "key.sh: ssh-keygen is not installed (package openssh-client)" >&2; exit 1; }
[ ! -e "$folder/$name" ] || { echo "key.sh: $folder/$name exists" >&2; exit 1; }

umask 077
mkdir -p "$folder"
# A NIST curve in OpenSSH's own format is what Flower reads; openssl can't write that format.
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$folder/$name"
echo "$folder/$name.pub  to be registered; $folder/$name never leaves the site"
