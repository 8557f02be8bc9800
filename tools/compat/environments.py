"""Environments of their own: a Python and a torch that are given, the other libraries oldest or newest."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locks import requirements

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".compat"

RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
"""Which of the releases that pyproject.toml allows are taken: in our terms, and in uv's."""


class NotRun(Exception):
    """Why an environment cannot be had here, which says nothing of what is supported."""


class Failed(Exception):
    """Why an environment that should be supported cannot be installed, or comes to no result."""


@dataclass(frozen=True)
class Environment:
    """A Python with a torch."""

    python: Path
    torch: str
    """Exactly, with the build: ``2.13.0+cpu``."""

    def take(self, end: str) -> None:
        """Install everything else that smolquant requires, as wheels.

        Args:
            end: a key of :data:`RESOLUTIONS`.

        Raises:
            Failed: these do not go together.
        """
        wanted = [str(one) for one in requirements(ROOT / "pyproject.toml") if one.name != "torch"]
        how = ["--upgrade", "--only-binary", ":all:", "--resolution", RESOLUTIONS[end]]
        _uv("pip", "install", "--python", str(self.python), *how, f"torch=={self.torch}", *wanted)

    def prove(self) -> Mapping[str, Any]:
        """What :mod:`compat.prove` tells there.

        Raises:
            Failed: it does not come to an end.
        """
        path = os.pathsep.join(str(ROOT / part) for part in ("entrypoint", "tools"))
        done = subprocess.run(
            [self.python, "-m", "compat.prove"],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Failed(_last_line(done.stderr))
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@contextmanager
def environment(python: str, torch: str) -> Iterator[Environment]:
    """An environment that is removed at the end, since torch's builds for GPUs take gigabytes.

    Args:
        python: as ``3.13``; uv takes one that is on this machine, or fetches it.
        torch: as ``2.13.0``; a build for CPUs where UV_FIND_LINKS names a page or a folder that has it.
            (UV_TORCH_BACKEND would take torchao from torch's index, too, and users have PyPI's.)

    Raises:
        NotRun: there is no such Python, or no such torch for it.
    """
    place = PLACE / f"{python}-{torch}"
    try:
        _uv("venv", "--clear", "--python", python, str(place))
        executable = place / "bin/python"
        _uv("pip", "install", "--python", str(executable), f"torch=={torch}")
        ask = "from importlib.metadata import version; print(version('torch'))"
        exact = subprocess.check_output([executable, "-c", ask], text=True).strip()
    except Failed as reason:
        raise NotRun(str(reason)) from reason
    try:
        yield Environment(executable, exact)
    finally:
        shutil.rmtree(place)


def _uv(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uv", "--quiet", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"uv {arguments[0]}: {' '.join(done.stderr.split())}")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it says nothing"
