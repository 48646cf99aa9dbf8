#!/bin/sh
# Copy a site or a federation folder into one archive that fits together. What is left out, and why, and what must not
# be put back blindly: deploy/backup.md. The archive holds private keys: it is readable by you only; encrypt it.
#
#   backup.sh site SITE ARCHIVE
#   backup.sh coordinator FEDERATION ARCHIVE
#
# ARCHIVE: a .tar file to make; must not exist. The service may run. A site answers no order while it is copied: the
# one that it works on is waited for, for WAIT seconds (environment, 3600 when not set).
# Needs GNU tar and flock. Exit codes: 0 copied, 1 the folder did not come to rest, 2 wrong usage; nothing is left then.
set -eu
umask 077

usage() {
    echo "error: $1; nothing was copied." >&2
    echo "usage: backup.sh site|coordinator FOLDER ARCHIVE" >&2
    exit 2
}

[ "$#" -eq 3 ] || usage "three arguments are needed"
side=$1
folder=$2
archive=$3
rules=$(realpath "$(dirname "$0")")/$side.exclude
[ ! -e "$archive" ] || usage "$archive exists already"
case $side in
site)
    [ -f "$folder/site.yaml" ] || usage "$folder has no site.yaml"
    grep -Eq '^state: *"?state/?"? *$' "$folder/site.yaml" ||
        usage "the state folder of site.yaml lies elsewhere: copy both in one snapshot of their volumes, with the service stopped"
    mkdir -p "$folder/state"
    lock=$folder/state/lock
    ;;
coordinator)
    [ -f "$folder/federation.yaml" ] || usage "$folder has no federation.yaml"
    lock=$folder/.sites.lock
    ;;
*) usage "'$side' is neither site nor coordinator" ;;
esac

half=$archive.half
trap 'rm -f "$half"' EXIT
exec 9>>"$lock"
flock --exclusive --timeout "${WAIT:-3600}" 9 || {
    echo "error: $lock was held for ${WAIT:-3600} s; nothing was copied. Pause the site, or try again later." >&2
    exit 1
}
# A reader of the ledger that ends just now may move its write-ahead log into the file while tar is between the two.
ledger() { cat "$folder"/ledger.sqlite* 2>/dev/null | sha256sum; }
before=$(ledger)
# 1 from tar: a log grew while it was read; every other file is written whole and then renamed.
code=0
tar --create --file "$half" --anchored --exclude-from "$rules" --warning=no-file-changed --directory "$folder" . || code=$?
[ "$code" -le 1 ] || { echo "error: tar ended with $code; nothing was copied." >&2; exit 1; }
[ "$before" = "$(ledger)" ] || { echo "error: the ledger changed meanwhile; nothing was copied. Try again." >&2; exit 1; }
mv "$half" "$archive"
trap - EXIT
echo "copied: $archive, $(tar --list --file "$archive" | grep -c -v '/$') files"
