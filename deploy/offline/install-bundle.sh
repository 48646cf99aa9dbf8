#!/bin/sh
# Install a verified bundle on this machine, with no network.
#
#   install-bundle.sh BUNDLE KEY PREFIX
#
# PREFIX: folder to make, for example /opt/consilium-0.1.0; point the link /opt/consilium to it afterwards. An upgrade is
# another prefix and the link moved, a way back is the link moved back. State lies elsewhere and is not touched.
# PYTHON: the Python to install for, python3.11 when not set. Exit codes: 0 installed, 1 refused, 2 wrong usage.
set -eu

[ "$#" -eq 3 ] || { echo "usage: install-bundle.sh BUNDLE KEY PREFIX" >&2; exit 2; }
bundle=$(realpath "$1")
prefix=$3
if [ -e "$prefix" ]; then
    echo "error: $prefix exists already; nothing was installed. Choose another prefix." >&2
    exit 2
fi
sh "$(dirname "$0")/verify-bundle.sh" "$bundle" "$2"

# Half an installation would be taken for a whole one.
trap 'rm -rf "$prefix"' EXIT
"${PYTHON:-python3.11}" -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-index \
    --find-links "$bundle/wheels" --require-hashes --only-binary :all: --requirement "$bundle/requirements.txt"
"$prefix/bin/python" -m pip check
mkdir -p "$prefix/share/consilium"
cp -R "$bundle/deploy" "$bundle/docs" "$bundle/sbom.cdx.json" "$prefix/share/consilium/"
if [ -x "$prefix/bin/consilium" ]; then "$prefix/bin/consilium" --version; fi
chmod -R go-w "$prefix"
trap - EXIT
echo "installed: $prefix"
