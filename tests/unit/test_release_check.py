"""`make release-check`, in copies of this checkout: what each of them lacks for a release, or nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import release_names
from release_check import missing
from release_names import ROOT, Names

HERE = release_names.read()
VERSION = HERE.version
READY = Names("acme", VERSION)
PAGES = ("README.md", "action.yml", "docs", "requirements", "tools", "CHANGELOG.md")


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Alice", "-c", "user.email=alice@example.com")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the check reads, with everything that a release needs, committed, and an origin."""
    folder = tmp_path / "checkout"
    named = [str(path.relative_to(ROOT)) for path in release_names.naming_files()]
    for name in (*PAGES, "tests", *named):
        target = folder / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / ".gitignore", folder)
    page = folder / "pyproject.toml"
    page.write_text(page.read_text().replace(f'"{HERE.organization}"', f'"{READY.organization}"'))
    _, _, rest = (folder / "CHANGELOG.md").read_text().partition("### Added")
    heading = f"## [Unreleased]\n\n## [{VERSION}] - 2026-01-02\n\n### Added"
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}{rest}")
    lock = folder / "requirements/cpu.txt"
    if lock.read_text().partition("\ntorch==")[2].partition("\ntorchao==")[0].count("--hash") < 2:
        edit(lock, "\ntorchao==", f" \\\n    --hash=sha256:{'0' * 64}\ntorchao==")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all")
    release_names.write(READY, release_names.naming_files(folder))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Ready")
    git(folder, "init", "--quiet", "--bare", str(tmp_path / "origin"))
    git(folder, "remote", "add", "origin", str(tmp_path / "origin"))
    return folder


def check(checkout: Path) -> subprocess.CompletedProcess[str]:
    """The command, which checks the checkout that it lies in."""
    return subprocess.run(
        [sys.executable, "-B", "-m", "release_check"],
        env={**os.environ, "PYTHONPATH": str(checkout / "tools")},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkout_that_lacks_nothing_is_ready(checkout: Path) -> None:
    done = check(checkout)
    assert (done.returncode, done.stdout) == (0, f"{VERSION} is ready for its release.\n"), (
        done.stderr
    )


def test_all_that_is_missing_is_listed_at_once(checkout: Path) -> None:
    edit(checkout / "pyproject.toml", 'organization = "acme"', 'organization = "org"')
    edit(checkout / "pyproject.toml", '"torchao>=', '"torchao>=99,>=')
    edit(checkout / "CHANGELOG.md", f"## [{VERSION}] - 2026-01-02\n", "")
    edit(checkout / "README.md", "| option | input |", "| option | entry |")
    edit(checkout / "action.yml", "image: Dockerfile", "image: docker://somewhere")
    lock = checkout / "requirements/cpu.txt"
    one_hash = re.sub(r"(\ntorch==.*\n.*?) \\\n(?:    --hash.*\n)+", r"\1\n", lock.read_text())
    lock.write_text(one_hash)
    git(checkout, "tag", f"v{VERSION}")

    done = check(checkout)

    assert done.returncode == 1
    for told in (
        "still has the placeholder 'org'",
        f"no heading `## [{VERSION}] - YYYY-MM-DD`",
        "changes stand under Unreleased",
        f"v{VERSION} is tagged already",
        "action.yml: it names an image already",
        "requirements/cpu.txt is stale: torchao",
        "requirements/cuda.txt is stale: torchao",
        "requirements/cpu.txt: torch has one hash alone",
        "not up to date: README.md, ",
        "changes are not committed: ",
    ):
        assert done.stdout.count(told) == 1, done.stdout
    assert done.stdout.count("\n- ") == 9, done.stdout


def test_a_tag_that_only_the_origin_has_is_found(checkout: Path) -> None:
    git(checkout, "tag", f"v{VERSION}")
    git(checkout, "push", "--quiet", "origin", f"v{VERSION}")
    git(checkout, "tag", "--delete", f"v{VERSION}")
    assert missing(checkout) == [
        f"v{VERSION} is tagged already; raise the version in pyproject.toml"
    ]
    git(checkout, "tag", "v99.1.2")
    git(checkout, "push", "--quiet", "origin", "v99.1.2")
    git(checkout, "tag", "--delete", "v99.1.2")
    (_, newer) = missing(checkout)
    assert newer.startswith("v99.1.2 is released already")
    git(checkout, "remote", "set-url", "origin", str(checkout / "nowhere"))
    (told,) = missing(checkout)
    assert told.startswith("origin does not say which tags it has")


def test_no_release_has_a_version_of_another_form(checkout: Path) -> None:
    edit(checkout / "pyproject.toml", f'version = "{VERSION}"', 'version = "2.0.0rc1"')
    assert missing(checkout) == ["pyproject.toml: the version 2.0.0rc1 is not X.Y.Z"]
