#!/usr/bin/env bash
# Builds what PyPI gets, into FOLDER:
#   tools/dists.sh source FOLDER     the sdist
#   tools/dists.sh any FOLDER        out of that, the wheel for any platform, without the C libraries
#   tools/dists.sh platform FOLDER   out of that, the wheel for this platform: manylinux, or macOS on ARM
#
# Needs pyproject.toml's group `release`; PYTHON names the Python that has it, by default python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
what=$1
# -P: pip leaves a folder `build` here, which is no package.
"$python" -P -c "import build.__main__, setuptools" 2>/dev/null || {
    echo "$python lacks what builds distributions: $python -m pip install --upgrade pip, and then" \
        "$python -m pip install --group release" >&2
    exit 1
}
mkdir -p "$2"
folder=$(cd "$2" && pwd)

MANYLINUX=manylinux_2_28 # torch's own wheels ask for as much
# The first macOS on ARM. Python's own name of the platform may tell of a newer one, or of two CPUs.
MACOS=11.0

wheel() { # out of the sdist, into a folder
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$1" \
        "$folder"/smolquant-*.tar.gz
}

case $what in
source)
    "$python" -P -m build --sdist --no-isolation --outdir "$folder" .
    ;;
any)
    SMOLQUANT_PURE=1 wheel "$folder"
    ;;
platform)
    case $(uname -s) in
    Darwin)
        export MACOSX_DEPLOYMENT_TARGET=$MACOS _PYTHON_HOST_PLATFORM=macosx-$MACOS-arm64 ARCHFLAGS="-arch arm64"
        wheel "$folder"
        ;;
    *)
        built=$(mktemp -d)
        trap 'rm -rf "$built"' EXIT
        wheel "$built"
        PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --plat "${MANYLINUX}_$(uname -m)" \
            --wheel-dir "$folder" "$built"/*.whl
        ;;
    esac
    ;;
*)
    echo "$what is neither source, any nor platform" >&2
    exit 2
    ;;
esac
