#!/usr/bin/env bash
# Tags a release: a commit on top of what is checked out, in which action.yml runs a finished image, gets the
# tag vX.Y.Z, and the major version's tag vX moves there.
#   tools/tag_release.sh IMAGE@DIGEST REMOTE
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
here=tools/release_names.py
version=$(python3 $here version) major=$(python3 $here major)

if git ls-remote --exit-code --tags "$2" "refs/tags/v$version" >/dev/null; then
    echo "v$version is released already; raise the version in pyproject.toml" >&2
    exit 1
fi
tools/pin_image.sh "$1"
git commit --quiet --message "Release $version" action.yml
git tag "v$version"
git tag --force "$major"
# Both or neither; only the major version's may move.
git push --quiet --atomic "$2" "refs/tags/v$version" "+refs/tags/$major"
