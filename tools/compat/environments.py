"""Environments of their own, in which the libraries are the oldest or the newest that are supported."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".compat"
VARIED = ("torchao", "transformers", "huggingface_hub")
"""The libraries whose oldest and newest supported versions are tried."""


class NotRun(Exception):
    """Why an environment cannot be had here, which says nothing of what is supported."""


class Failed(Exception):
    """Why an environment that should be supported cannot be installed, or comes to no result."""


@dataclass(frozen=True)
class Environment:
    """A Python with its libraries."""

    python: Path

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


def supported() -> dict[str, Requirement]:
    """What pyproject.toml requires, by distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = map(Requirement, project["dependencies"])
    return {requirement.name: requirement for requirement in requirements}


def ends_of(requirement: Requirement, available: Sequence[str]) -> tuple[str, str]:
    """The oldest and the newest of the available releases that a requirement allows.

    Raises:
        NotRun: there is none.
    """
    fitting = sorted(map(Version, requirement.specifier.filter(available)))
    if not fitting:
        raise NotRun(f"the registry has no {requirement}")
    return str(fitting[0]), str(fitting[-1])


def available(name: str) -> list[str]:
    """The releases of a distribution that the registry has for this Python.

    Raises:
        NotRun: it cannot be asked.
    """
    asked = [sys.executable, "-m", "pip", "index", "versions", name]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        label, _, versions = line.partition(":")
        if label == "Available versions":
            return [one.strip() for one in versions.split(",")]
    raise NotRun(f"the registry does not tell which versions of {name} there are")


def beside_ours(name: str, pinned: Mapping[str, str]) -> Environment:
    """An environment that has ``pinned`` before whatever this one has; torch is not installed again.

    Raises:
        Failed: pip cannot install that.
    """
    environment = _empty(name, Path(sys.executable))
    for site in (PLACE / name).glob("lib/python*/site-packages"):
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _install(environment, [f"{one}=={release}" for one, release in pinned.items()])
    return environment


def of_python(release: str, index: str | None) -> Environment:
    """An environment of another Python with the torch that this one has, and the newest of the rest.

    Args:
        release: as ``3.13``.
        index: where torch's builds for CPUs are.

    Raises:
        NotRun: there is no such Python here, or no such torch for it.
        Failed: pip cannot install the rest.
    """
    python = shutil.which(f"python{release}")
    works = python and subprocess.run([python, "-V"], capture_output=True, check=False)
    if python is None or not works or works.returncode:
        raise NotRun("there is no such Python here")
    environment = _empty(f"python{release}", Path(python))
    torch = [f"torch=={version('torch')}", *(["--extra-index-url", index] if index else [])]
    try:
        _install(environment, torch)
    except Failed as reason:
        raise NotRun(f"{torch[0]} cannot be installed for it here") from reason
    _install(environment, list(map(str, supported().values())))
    return environment


def _empty(name: str, python: Path) -> Environment:
    place = PLACE / name
    subprocess.run([python, "-m", "venv", "--clear", place], check=True)
    return Environment(place / "bin/python")


def _install(environment: Environment, what: Sequence[str]) -> None:
    done = subprocess.run(
        [environment.python, "-m", "pip", "install", "--quiet", *what],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"pip cannot install it: {_last_line(done.stderr, 'ERROR:')}")


def _last_line(text: str, label: str = "") -> str:
    lines = [line for line in text.splitlines() if line.strip() and line.startswith(label)]
    return lines[-1].removeprefix(label).strip() if lines else "it says nothing"
