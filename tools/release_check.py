"""`make release-check`: what is still missing for a release of the version that pyproject.toml names."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from locks import read_lock, requirements, unanswered
from readme_tables import PAGES, with_blocks
from release_names import PLACEHOLDER, ROOT, Names, naming_files, read

_UNRELEASED = re.compile(r"^## \[Unreleased\]\n(.*?)(?=^## |^\[|\Z)", re.MULTILINE | re.DOTALL)

_TAG = re.compile(r"\bv(\d+)\.(\d+)\.(\d+)$", re.MULTILINE)


def _owner(root: Path, names: Names) -> Iterator[str]:
    if names.organization == PLACEHOLDER:
        yield (
            f"pyproject.toml: [tool.smolquant] still has the placeholder {PLACEHOLDER!r} in place of the "
            "organization; change it and run `make docs`"
        )


def _changelog(root: Path, names: Names) -> Iterator[str]:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(
        rf"^## \[{re.escape(names.version)}\] - \d{{4}}-\d\d-\d\d$", text, re.MULTILINE
    )
    if not dated:
        yield f"CHANGELOG.md: there is no heading `## [{names.version}] - YYYY-MM-DD`"
    unreleased = _UNRELEASED.search(text)
    if unreleased and unreleased[1].strip():
        yield f"CHANGELOG.md: changes stand under Unreleased; put them under {names.version}"


def _tags(root: Path, names: Names) -> Iterator[str]:
    found = _git(root, "tag", "--list", "v*")
    remotes = _git(root, "remote").split()
    if "origin" in remotes:
        try:
            found += _git(root, "ls-remote", "--tags", "origin", "refs/tags/v*")
        except subprocess.CalledProcessError as failed:
            yield f"origin does not say which tags it has: {failed.stderr.strip()}"
    released = {tuple(map(int, one)) for one in _TAG.findall(found)}
    version = tuple(map(int, names.version.split(".")))
    if version in released:
        yield f"v{names.version} is tagged already; raise the version in pyproject.toml"
    if released and max(released) > version:
        newest = ".".join(map(str, max(released)))
        yield (
            f"v{newest} is released already, and tags that move, such as {names.major}, would go back to "
            f"{names.version}; raise the version in pyproject.toml"
        )


def _action(root: Path, names: Names) -> Iterator[str]:
    if "\n  image: Dockerfile\n" not in (root / "action.yml").read_text(encoding="utf-8"):
        yield "action.yml: it names an image already; `image: Dockerfile` is what a release replaces"


def _locks(root: Path, names: Names) -> Iterator[str]:
    wanted = requirements(root / "pyproject.toml")
    for name in ("cpu", "cuda"):
        lock = read_lock(root / f"requirements/{name}.txt")
        for complaint in unanswered(lock, wanted):
            yield f"requirements/{name}.txt is stale: {complaint}; run requirements/lock.sh"
        if name == "cpu" and len(lock.hashes.get("torch", [])) < 2:
            yield (
                "requirements/cpu.txt: torch has one hash alone, and so no build for ARM; run "
                "`PATH=.venv/bin:$PATH requirements/lock.sh` where download.pytorch.org can be reached"
            )


def _docs(root: Path, names: Names) -> Iterator[str]:
    stale = []
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        if with_blocks(page, text) != text:
            stale.append(page)
    for path in naming_files(root):
        text = path.read_text(encoding="utf-8")
        if names.written_into(text) != text:
            stale.append(str(path.relative_to(root)))
    if stale:
        yield f"not up to date: {', '.join(dict.fromkeys(stale))}; run `make docs`"


def _commit(root: Path, names: Names) -> Iterator[str]:
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        yield f"changes are not committed: {', '.join(line[3:] for line in changed)}"


CHECKS: Sequence[Callable[[Path, Names], Iterator[str]]] = (
    _owner,
    _changelog,
    _tags,
    _action,
    _locks,
    _docs,
    _commit,
)
"""Each gives what is missing in a checkout, with what to do."""


def missing(root: Path = ROOT) -> list[str]:
    """What a release of the checkout ``root`` still lacks, with what to do; empty when it is ready."""
    try:
        names = read(root)
    except ValueError as wrong:
        return [str(wrong)]
    return [complaint for check in CHECKS for complaint in check(root, names)]


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    lacking = missing()
    print("\n".join(f"- {one}" for one in lacking) or f"{read().version} is ready for its release.")
    sys.exit(1 if lacking else 0)
