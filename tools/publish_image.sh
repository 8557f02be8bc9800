#!/usr/bin/env bash
# Gives pushed images of one version their tags, as one image for all their platforms, and prints its name by
# digest:
#   tools/publish_image.sh VARIANT DIGEST...    VARIANT is empty, or -cuda; a digest begins with sha256:
set -euo pipefail
here=$(dirname "$0")/release_names.py
variant=$1
shift

image=$(python3 "$here" image)
tags=()
while read -r tag; do tags+=(--tag "$tag"); done < <(python3 "$here" tags "$variant")
docker buildx imagetools create "${tags[@]}" "${@/#/$image@}" >&2
digest=$(docker buildx imagetools inspect "${tags[1]}" --format '{{.Manifest.Digest}}')
[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || {
    echo "the registry names no digest of ${tags[1]}: $digest" >&2
    exit 1
}
echo "$image@$digest"
