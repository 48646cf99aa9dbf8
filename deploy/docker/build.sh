#!/bin/sh
# Build the three images from a verified offline bundle.
#
#   build.sh BUNDLE BASE [TAG]
#
# BUNDLE: folder that verify-bundle.sh accepts. BASE: Debian 12 by digest, NAME@sha256:<64 hexadecimal digits>.
# TAG: of the images, for the people who build; installations name them by the digest that is printed at the end.
# Exit codes: 0 built, 1 the base image is not given by digest or the bundle does not verify, 2 wrong usage.
set -eu

[ "$#" -ge 2 ] || { echo "usage: build.sh BUNDLE NAME@sha256:DIGEST [TAG]" >&2; exit 2; }
bundle=$1
base=$2
tag=${3:-local}

if ! printf '%s\n' "$base" | grep -Eq '^[A-Za-z0-9./:_-]+@sha256:[0-9a-f]{64}$'; then
    echo "error: the base image '$base' is not given by digest; nothing was built." >&2
    echo "A tag can be moved to other content. Give NAME@sha256:<64 hexadecimal digits> of an image you have checked." >&2
    exit 1
fi
sh "$(dirname "$0")/../offline/verify-bundle.sh" "$bundle" "${CONSILIUM_BUNDLE_KEY:?the public key of the bundle, a PEM file}"

for target in coordinator site relay; do
    docker build --pull=false --file "$bundle/deploy/docker/Dockerfile" --target "$target" \
        --build-arg "BASE=$base" --tag "consilium/$target:$tag" "$bundle"
done
for target in coordinator site relay; do
    docker image inspect --format "$target {{.Id}}" "consilium/$target:$tag"
done
