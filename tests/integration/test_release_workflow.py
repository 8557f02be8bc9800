"""release.yml rehearsed: its own commands, as far as they go without a network, in a copy of this checkout.

A stand-in takes the place of docker alone, and git is told that GitHub is a folder.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import release_names
from release_names import ROOT, Names

NAMES = release_names.read()
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
DIGESTS = ["sha256:" + "1" * 64, "sha256:" + "2" * 64]
MERGED = "sha256:" + "3" * 64
IMAGE = f"{NAMES.image}@{MERGED}"

DOCKER = f"""#!/bin/sh
echo "$@" >>"$DOCKER_LOG"
case "$*" in *inspect*) echo {MERGED};; esac
"""


def commands(job: str) -> list[dict[str, Any]]:
    """The steps of a job that run a command, but for the one that installs what is installed here."""
    steps = JOBS[job]["steps"]
    return [step for step in steps if "run" in step and "pip install --group" not in step["run"]]


def run(step: dict[str, Any], checkout: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """What a runner does with the step; an expression in its ``env`` has to be given a value."""
    given = {name: environ.pop(name) for name in step.get("env", {})}
    python = str(Path(sys.executable).parent)
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=checkout,
        env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}", **given, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, committed."""
    folder = tmp_path_factory.mktemp("release") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "config", "user.name", "Alice")
    git(folder, "config", "user.email", "alice@example.com")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "All of it")
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, check=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def dist(checkout: Path) -> Path:
    """What PyPI would get of this platform."""
    for job in ("source", "wheels"):
        for step in commands(job):
            done = run(step, checkout)
            assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "dist"


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which ``docker`` writes down what it is asked for."""
    stand_in = tmp_path / "bin/docker"
    stand_in.parent.mkdir()
    stand_in.write_text(DOCKER)
    stand_in.chmod(0o755)
    log, output = tmp_path / "docker.log", tmp_path / "output"
    path = f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {"PATH": path, "DOCKER_LOG": str(log), "GITHUB_OUTPUT": str(output)}


def before(job: str) -> set[str]:
    """All jobs that have to succeed first."""
    needs = JOBS[job].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*map(before, direct))


def test_nothing_leaves_before_what_it_is_made_of_was_checked() -> None:
    assert before("pypi") == {"ci", "check", "source", "wheels", "try"}
    assert before("image") == before("pypi") | {"pypi", "cuda"}
    assert before("tag") == set(JOBS) - {"tag"}
    upload = JOBS["pypi"]["steps"][-1]["with"]
    assert upload["skip-existing"], "else a job that broke off could never be finished"
    rights = {job: JOBS[job]["permissions"] for job in JOBS}
    assert [job for job in rights if "id-token" in rights[job]] == ["pypi"]
    assert [job for job in rights if rights[job].get("contents") == "write"] == ["tag"]


def test_the_names_of_the_release_are_handed_on(checkout: Path, docker: dict[str, str]) -> None:
    on_main, _, step = commands("check")
    for branch, code in (("main", 0), ("scratch", 1)):
        assert run(on_main, checkout, GITHUB_REF=f"refs/heads/{branch}").returncode == code
    assert run(step, checkout, **docker).returncode == 0
    outputs = Path(docker["GITHUB_OUTPUT"]).read_text()
    assert outputs == f"version={NAMES.version}\nimage={NAMES.image}\nbase={MERGED}\n"


def test_distributions_are_named_for_every_python_and_hold_what_they_should(dist: Path) -> None:
    names = {path.name for path in dist.iterdir()}
    stem = f"smolquant-{NAMES.version}"
    pure = f"{stem}-py3-none-any.whl"
    assert names >= {f"{stem}.tar.gz", pure}
    (wheel,) = names - {f"{stem}.tar.gz", pure}
    assert wheel.startswith(f"{stem}-py3-none-manylinux")
    assert wheel.endswith(f"manylinux_2_28_{platform.machine()}.whl")

    with tarfile.open(dist / f"{stem}.tar.gz") as sdist:
        sources = {name.partition("/")[2] for name in sdist.getnames()}
    ours = git(ROOT, "ls-files", "entrypoint/smolquant").splitlines()
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", *ours} <= sources
    with zipfile.ZipFile(dist / pure) as archive:
        anywhere = set(archive.namelist())
        metadata = archive.read(f"{stem}.dist-info/METADATA").decode()
    with zipfile.ZipFile(dist / wheel) as archive:
        here = set(archive.namelist())
    libraries = {"smolquant/runtime/_cpu_linear.so", "smolquant/schemes/_int4_search.so"}
    assert {name for name in here - anywhere if not name.endswith("/")} == libraries
    assert not [name for name in here if name.endswith((".c", ".h"))]
    assert f"Source, https://github.com/{NAMES.action}\n" in metadata
    assert "Programming Language :: Python :: 3.14\n" in metadata


def test_an_image_is_made_of_the_wheel_for_its_platform(dist: Path, tmp_path: Path) -> None:
    """What the Dockerfile asks pip for, with the build argument of the release."""
    (step,) = (one for one in JOBS["image"]["steps"] if one.get("id") == "image")
    (product,) = re.findall(r"PRODUCT=(.*)", step["with"]["build-args"])
    product = product.replace("${{ needs.check.outputs.version }}", NAMES.version)
    (asked,) = re.findall(
        r"pip install (.*?) \\\n.*\n?.*\"\$PRODUCT\"", (ROOT / "Dockerfile").read_text()
    )
    options = shlex.split(asked.replace("/dist", str(dist)))
    command = [sys.executable, "-m", "pip", "install", *options, "--target", tmp_path, product]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "smolquant/schemes/_int4_search.so").is_file()


def test_the_wheel_for_any_platform_quantizes_and_loads(dist: Path, tmp_path: Path) -> None:
    """Without compiled code: the same int4 bytes as with it, which the tool has recorded."""
    (wheel,) = dist.glob("*-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/try_dist.py", "here"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "int4 and int8 were made and loaded" in done.stdout
    assert done.stderr.count("torch searches for int4 weights") == 1
    assert "run with another kernel than the best one" in done.stderr


def test_images_get_every_tag_and_are_known_by_digest(
    checkout: Path, docker: dict[str, str], tmp_path: Path
) -> None:
    cuda, cpu = commands("tags")
    digests = checkout / "digests"
    digests.mkdir()
    for digest in DIGESTS:
        (digests / digest.removeprefix("sha256:")).touch()

    for step in (cuda, cpu):
        done = (
            run(step, checkout, **docker, DIGEST=DIGESTS[0])
            if step is cuda
            else run(step, checkout, **docker)
        )
        assert done.returncode == 0, done.stderr

    asked = [line.split() for line in Path(docker["DOCKER_LOG"]).read_text().splitlines()]
    created = [line for line in asked if "create" in line]
    for line, variant, expected in zip(created, ("-cuda", ""), (DIGESTS[:1], DIGESTS), strict=True):
        tags = [tag for option, tag in pairwise(line) if option == "--tag"]
        assert tags == NAMES.tags(variant)
        assert line[-len(expected) :] == [f"{NAMES.image}@{digest}" for digest in expected]
    assert Path(docker["GITHUB_OUTPUT"]).read_text() == f"image={IMAGE}\n"
    shutil.rmtree(digests)


@pytest.fixture
def github(checkout: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A bare repository in GitHub's place, and the environment in which git takes it for GitHub."""
    bare = tmp_path / "github"
    subprocess.run(["git", "init", "--quiet", "--bare", bare], check=True)
    git(checkout, "push", "--quiet", str(bare), "main")
    address = "https://x-access-token:secret@github.com/acme/smolquant-action"
    environ = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{bare}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
        "GITHUB_REPOSITORY": "acme/smolquant-action",
        "IMAGE": IMAGE,
        "TOKEN": "secret",
    }
    return bare, environ


def release(names: Names, bare: Path, environ: dict[str, str], work: Path) -> str:
    """Check out GitHub's main, with another version where ``names`` has one, and run the last job."""
    subprocess.run(["git", "clone", "--quiet", "--branch", "main", bare, work], check=True)
    page = work / "pyproject.toml"
    page.write_text(page.read_text().replace(f'"{NAMES.version}"', f'"{names.version}"'))
    if names != NAMES:
        git(work, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qam", names.version)
    (step,) = commands("tag")
    done = run(step, work, **environ)
    assert "secret" not in done.stdout + done.stderr
    return done.stderr if done.returncode else ""


def test_a_release_pins_the_image_and_moves_the_major_tag(
    github: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    bare, environ = github
    main = git(bare, "rev-parse", "main")
    assert not release(NAMES, bare, environ, tmp_path / "first")
    first = git(bare, "rev-parse", f"v{NAMES.version}")
    assert git(bare, "rev-parse", NAMES.major) == first
    assert git(bare, "rev-parse", f"{first}^", "main").split() == [main, main]
    assert git(bare, "diff", "--name-only", main, first) == "action.yml"
    assert f"\n  image: docker://{IMAGE}\n" in git(bare, "show", f"{first}:action.yml")

    assert "released already" in release(NAMES, bare, environ, tmp_path / "again")
    assert git(bare, "rev-parse", NAMES.major) == first

    later = replace(NAMES, version=f"{NAMES.major[1:]}.99.0")
    assert not release(later, bare, environ, tmp_path / "later")
    assert git(bare, "rev-parse", NAMES.major) == git(bare, "rev-parse", f"v{later.version}")
    assert git(bare, "rev-parse", f"v{NAMES.version}") == first
