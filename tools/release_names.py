"""The names that a release goes by, from pyproject.toml: whose it is, its version, its images.

Every file that names the action or an image of it is written from here by `make docs`. The release asks for
``python3 tools/release_names.py NAME``: version, action, image, major, or tags, one a line, and with
``-cuda`` as well those of that image. It needs the standard library alone.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "org"
"""The organization until there is one."""

_ACTION = "smolquant-action"
_OWNED = re.compile(rf"(?<![\w.-])[\w.-]+/{_ACTION}\b")
_USED = re.compile(rf"({_ACTION}(?:/[\w./-]+)?@)v\d+\b")
_TAGGED = re.compile(rf"({_ACTION}:)(v?)(\d+\.\d+\.\d+|\d+)\b")
_PROSE = (
    (re.compile(r"(major version \(`)v\d+(?=`\))"), "major"),
    (re.compile(r"(the first, )\d+\.\d+\.\d+(?=, will hold)"), "version"),
)
"""What SECURITY.md and CHANGELOG.md say of it."""


@dataclass(frozen=True)
class Names:
    """What a version is called."""

    organization: str
    version: str
    """X.Y.Z."""

    @property
    def action(self) -> str:
        """As workflows name it, before the ``@``."""
        return f"{self.organization}/{_ACTION}"

    @property
    def image(self) -> str:
        """Without a tag; registries know small letters alone."""
        return f"ghcr.io/{self.action}".lower()

    @property
    def major(self) -> str:
        """The tag that moves with each release."""
        return f"v{self.version.partition('.')[0]}"

    def tags(self, variant: str = "") -> list[str]:
        """Of an image; ``variant`` is empty, or ``-cuda``."""
        return [
            f"{self.image}:{tag}{variant}" for tag in (self.version, self.major[1:], self.major)
        ]

    def written_into(self, text: str) -> str:
        """``text`` with these names in place of whichever it has."""
        text = _OWNED.sub(self.action, text)
        text = _USED.sub(rf"\g<1>{self.major}", text)
        text = _TAGGED.sub(self._tag, text)
        for pattern, name in _PROSE:
            text = pattern.sub(rf"\g<1>{getattr(self, name)}", text)
        return text

    def _tag(self, found: re.Match[str]) -> str:
        prefix, v, version = found.groups()
        return f"{prefix}{v}{self.version if '.' in version else self.major[1:]}"


def read(root: Path = ROOT) -> Names:
    """The names that ``root``'s pyproject.toml states.

    Raises:
        ValueError: the version is not three numbers, as a release's is.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"pyproject.toml: the version {version} is not X.Y.Z")
    return Names(project["tool"]["smolquant"]["organization"], version)


def naming_files(root: Path = ROOT) -> list[Path]:
    """The files under version control that name the action, or the version; code and tests are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    paths = [root / name for name in listed.split("\0") if name]
    return [path for path in paths if path.suffix not in {".py", ".txt"} and _names(path)]


def _names(path: Path) -> bool:
    content = path.read_bytes() if path.is_file() else b""
    if b"\0" in content:  # a picture, or weights
        return False
    text = content.decode()
    return bool(_OWNED.search(text)) or any(pattern.search(text) for pattern, _ in _PROSE)


def write(names: Names, paths: Iterable[Path]) -> None:
    """Put ``names`` into these files, in place."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        path.write_text(names.written_into(text), encoding="utf-8")


def main(what: str, variant: str = "") -> None:
    names = read()
    print("\n".join(names.tags(variant)) if what == "tags" else getattr(names, what))


if __name__ == "__main__":
    main(*sys.argv[1:])
