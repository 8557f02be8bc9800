#!/usr/bin/env bash
# Have action.yml run a finished image instead of building one:
#   tools/pin_image.sh ghcr.io/org/smolquant-action@sha256:…
set -euo pipefail

action=${2:-action.yml}
grep -qx '  image: Dockerfile' "$action" || {
    echo "$action does not build its image; it is pinned already" >&2
    exit 1
}
sed -i "s|^  image: Dockerfile\$|  image: docker://$1|" "$action"
