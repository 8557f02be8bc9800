"""Runs the tests or the benchmark of a GPU with a Python whose torch sees one; says so where none does.

``python tools/on_gpu.py test|bench``. Asked, in this order: GPU_PYTHON, the project's own environment, and
the machine's python3, whose torch is the machine's own.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS: Mapping[str, Sequence[str]] = {
    "test": (
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ),
    "bench": ("bench/gpu_speed.py",),
}

SEES_A_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
VERSIONS = """
import platform, sys
import torch, torchao, transformers
print(f"Python {platform.python_version()}, {sys.executable}")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, torchao {torchao.__version__}, "
      f"transformers {transformers.__version__}")
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
"""


def pythons() -> list[str]:
    """The interpreters that may see a GPU."""
    named = os.environ.get("GPU_PYTHON")
    if named:
        return [named]
    own = ROOT / ".venv/bin/python"
    machine = shutil.which("python3")
    return [str(own)] * own.exists() + ([machine] if machine else [])


def environment() -> dict[str, str]:
    """Where the package, the tests and what they share are found without being installed."""
    folders = [str(ROOT / name) for name in ("entrypoint", "tools", "tests", "bench")]
    given = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, *([given] if given else [])])}


def main(what: str) -> int:
    """Run it; 0 where it passed or no torch sees a GPU, 1 where one does and cannot be used."""
    environ = environment()
    for python in pythons():
        asked = subprocess.run(
            [python, "-c", SEES_A_GPU], env=environ, capture_output=True, check=False
        )
        if asked.returncode:
            continue
        told = subprocess.run(
            [python, "-c", VERSIONS], env=environ, capture_output=True, text=True, check=False
        )
        if told.returncode:
            print(f"{python} sees a GPU, but cannot load what runs on it:\n{told.stderr}")
            print(
                f"Install it beside its torch: {python} -m pip install torchao transformers pytest"
            )
            return 1
        print(told.stdout, flush=True)
        return subprocess.run(
            [python, *COMMANDS[what]], env=environ, cwd=ROOT, check=False
        ).returncode
    asked_of = ", ".join(pythons()) or "no Python"
    print(f"Skipped: torch sees no GPU ({asked_of} asked). GPU_PYTHON names another Python.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
