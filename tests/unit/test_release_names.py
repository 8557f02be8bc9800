"""The organization and the version stand in pyproject.toml, and everywhere else by `make docs`."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import release_names
from release_names import Names

ROOT = release_names.ROOT
HERE = release_names.read()
OTHER = Names("some-Company.2", "12.3.40")


def test_every_file_has_the_names_of_this_version() -> None:
    paths = release_names.naming_files()
    assert {"README.md", "quantize.yml", "release.yml", "pyproject.toml", "SECURITY.md"} <= {
        path.name for path in paths
    }
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert HERE.written_into(text) == text, f"{path.relative_to(ROOT)}: run `make docs`"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that bear names, under version control."""
    for path in release_names.naming_files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    return tmp_path


def test_another_organization_and_version_reach_every_file(checkout: Path) -> None:
    page = checkout / "pyproject.toml"
    text = page.read_text().replace(
        f'organization = "{HERE.organization}"', 'organization = "acme"'
    )
    page.write_text(text.replace(f'version = "{HERE.version}"', 'version = "7.8.9"'))
    names = release_names.read(checkout)
    assert names == Names("acme", "7.8.9")

    release_names.write(names, release_names.naming_files(checkout))

    images = {*names.tags(), *names.tags("-cuda")}
    names_of_images = {image.rpartition(":")[2] for image in images}
    everything = {path: path.read_text() for path in release_names.naming_files(checkout)}
    for path, text in everything.items():
        owners = set(re.findall(r"([\w.-]+)/smolquant-action\b", text))
        assert owners <= {"acme"}, path
        assert set(re.findall(r"smolquant-action\S*@(\S+)", text)) <= {"v7", "sha256:…"}, path
        assert set(re.findall(r"smolquant-action:(\S+)", text)) <= names_of_images, path
    assert "major version (`v7`)" in everything[checkout / "SECURITY.md"]
    assert "uses: acme/smolquant-action@v7" in everything[checkout / "examples/release.yml"]
    assert "acme/smolquant-action: ref-pin" in everything[checkout / ".github/zizmor.yml"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("uses: org/smolquant-action@v0", "uses: some-Company.2/smolquant-action@v12"),
        ("org/smolquant-action/.github/workflows/quantize.yml@v0", "…/quantize.yml@v12"),
        ("ghcr.io/org/smolquant-action:0.1.0-cuda", "…:12.3.40-cuda"),
        ("ghcr.io/org/smolquant-action:v1 :1", "…:v12 :1"),
        ("ghcr.io/org/smolquant-action:1-cuda", "…:12-cuda"),
        ("ghcr.io/org/smolquant-action@sha256:12", "…@sha256:12"),
        (
            "uses: a/checkout@v4 # b/other-action@v0",
            "uses: a/checkout@v4 # b/other-action@v0",
        ),
        ("smolquant-action@v1", "smolquant-action@v12"),
    ],
)
def test_only_names_of_the_action_change(written: str, expected: str) -> None:
    assert OTHER.written_into(written).endswith(expected.removeprefix("…"))


def test_an_image_has_three_tags_and_small_letters() -> None:
    image = "ghcr.io/some-company.2/smolquant-action"
    assert OTHER.tags() == [f"{image}:12.3.40", f"{image}:12", f"{image}:v12"]
    assert OTHER.tags("-cuda") == [f"{tag}-cuda" for tag in OTHER.tags()]
    assert replace(OTHER, version="0.1.0").major == "v0"


def test_a_version_that_no_release_can_have_is_refused(checkout: Path) -> None:
    page = checkout / "pyproject.toml"
    page.write_text(page.read_text().replace(f'"{HERE.version}"', '"1.0.0rc1"'))
    with pytest.raises(ValueError, match=r"1.0.0rc1 is not X.Y.Z"):
        release_names.read(checkout)
