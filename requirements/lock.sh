#!/usr/bin/env bash
# Writes the image's two locks, cpu.txt and cuda.txt, from pyproject.toml: every package with hashes.
#
#   requirements/lock.sh              needs uv, which .venv/bin has; downloads metadata, not wheels
#   requirements/lock.sh --upgrade    takes newer releases too, not only what pyproject.toml forces
#
# torch's builds for CPUs come from its public index, or from the one that TORCH_INDEX names. It has one for ARM
# too, whose images need its hash; the packages themselves are the same ones there. Everything else is PyPI's,
# torchao too, of which that index has builds of its own. Where no index can be reached, TORCH_WHEELS names a
# folder with the build for x86-64, and torch's hashes stay those that cpu.txt has.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0

lock() { # name, torch's exact version, pyproject.toml, further options for uv
    local name=$1 torch=$2 project=$3
    shift 3
    uv pip compile "$project" --extra action --output-file "requirements/$name.txt" \
        --constraints <(echo "torch==$torch") \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --only-binary :all: \
        --generate-hashes --no-emit-index-url --no-annotate --quiet \
        --custom-compile-command requirements/lock.sh "$@"
}

if [[ -n ${TORCH_WHEELS:-} ]]; then
    lock cpu "$TORCH+cpu" pyproject.toml --find-links "$TORCH_WHEELS" "$@"
else
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    cat pyproject.toml - >"$scratch/pyproject.toml" <<END
[tool.uv]
index = [{ name = "torch", url = "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}", explicit = true }]
sources.torch.index = "torch"
END
    # Of the same release too: what the lock has may be without the hash for ARM.
    lock cpu "$TORCH+cpu" "$scratch/pyproject.toml" --upgrade-package torch "$@"
fi
lock cuda "$TORCH" pyproject.toml "$@"
