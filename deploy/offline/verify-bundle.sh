#!/bin/sh
# Check an offline bundle: signature, every file, and that no file was added.
#
#   verify-bundle.sh BUNDLE KEY
#
# KEY: public key of the bundle's maker as PEM, which came another way than the bundle; compare the fingerprint that is
# printed with the one you were told. Take this script from an earlier installation, or do its first step by hand:
#   openssl pkeyutl -verify -pubin -inkey KEY -rawin -in BUNDLE/SHA256SUMS -sigfile BUNDLE/SHA256SUMS.sig
# Needs openssl 1.1.1 or later and GNU sha256sum. Exit codes: 0 sound, 1 not sound, 2 wrong usage.
set -eu

[ "$#" -eq 2 ] || { echo "usage: verify-bundle.sh BUNDLE KEY" >&2; exit 2; }
[ -f "$1/SHA256SUMS" ] && [ -f "$1/SHA256SUMS.sig" ] && [ -f "$2" ] || {
    echo "error: $1 is no bundle, or the key $2 is missing; nothing was checked." >&2
    exit 2
}
key=$(realpath "$2")
cd "$1"

refuse() {
    echo "NOT SOUND: $1. Install nothing from it; ask its maker for another copy." >&2
    exit 1
}

# (1) who signed the list
openssl pkeyutl -verify -pubin -inkey "$key" -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig >/dev/null 2>&1 ||
    refuse "SHA256SUMS was not signed with this key"
# (2) every listed file is there and unchanged
sha256sum --check --strict --quiet SHA256SUMS || refuse "a file is missing or was changed"
# (3) no other file is there
listed=$(cut -c67- SHA256SUMS | LC_ALL=C sort)
found=$(find . -mindepth 1 ! -type d | sed 's#^\./##' |
    grep -Fvx -e SHA256SUMS -e SHA256SUMS.sig -e bundle.pub.pem | LC_ALL=C sort)
[ "$listed" = "$found" ] || refuse "it holds a file that is not on the list"

echo "sound: $(printf '%s\n' "$listed" | wc -l | tr -d ' ') files"
echo "fingerprint of the key: $(openssl pkey -pubin -in "$key" -outform DER | sha256sum | cut -d' ' -f1)"
