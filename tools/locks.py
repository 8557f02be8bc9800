"""Reads the generated lock files in requirements/, and pyproject.toml, which they answer."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Lock:
    """A lock's packages: their versions, and the sha256 digests that are allowed."""

    versions: dict[str, str]
    hashes: dict[str, list[str]]


def read_lock(path: Path) -> Lock:
    """Read one lock file; a line that is neither package nor hash is a ValueError."""
    versions: dict[str, str] = {}
    hashes: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        if found := re.fullmatch(r"([a-z0-9.-]+)==([\w.+-]+) \\", line):
            name = found[1]
            versions[name], hashes[name] = found[2], []
        elif found := re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})( \\)?", line):
            hashes[name].append(found[1])
        else:
            raise ValueError(f"{path.name}: {line!r} is neither a package nor a hash")
    return Lock(versions, hashes)


def requirements(pyproject: Path) -> list[Requirement]:
    """What the image installs by name: smolquant[action]'s own requirements."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [
        Requirement(text)
        for text in (*project["dependencies"], *project["optional-dependencies"]["action"])
    ]


def unanswered(lock: Lock, wanted: Sequence[Requirement]) -> Iterator[str]:
    """Requirements that a lock does not keep, with what it holds instead."""
    for requirement in wanted:
        version = lock.versions.get(requirement.name.replace("_", "-"))
        if version is None or not requirement.specifier.contains(version):
            yield f"{requirement}: locked to {version or 'nothing'}"
