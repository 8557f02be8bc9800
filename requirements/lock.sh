#!/usr/bin/env bash
# Writes the image's two locks, cpu.txt and cuda.txt, from pyproject.toml: every package with hashes.
#
#   requirements/lock.sh              needs uv (pip install uv); downloads metadata, not wheels
#   requirements/lock.sh --upgrade    takes newer releases too, not only what pyproject.toml forces
#
# torch's CPU wheel comes from its public index, or from the folder that TORCH_WHEELS names. The index has it for
# ARM too, whose images need its hash; the packages themselves are the same ones there.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0

lock() { # name, torch's exact version, further options for uv
    local name=$1 torch=$2
    shift 2
    uv pip compile pyproject.toml --extra action --output-file "requirements/$name.txt" \
        --constraints <(echo "torch==$torch") \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --only-binary :all: \
        --generate-hashes --no-emit-index-url --no-annotate --quiet \
        --custom-compile-command requirements/lock.sh "$@"
}

if [[ -n ${TORCH_WHEELS:-} ]]; then
    cpu=(--find-links "$TORCH_WHEELS")
else
    cpu=(--torch-backend cpu)
fi
lock cpu "$TORCH+cpu" "${cpu[@]}" "$@"
lock cuda "$TORCH" "$@"
