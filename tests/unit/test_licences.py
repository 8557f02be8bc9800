"""Whose terms come along: permissive ones, each named and with the notice that it demands."""

import re
import subprocess
import tomllib
from pathlib import Path

import make_eval_text
from smolquant.evaluate.documents import (
    BUNDLED_NAME,
    CALIBRATION_NAME,
    bundled_calibration_text,
    bundled_text,
)

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "entrypoint/smolquant/evaluate/text"
ORIGIN = (TEXTS / "ORIGIN").read_text(encoding="utf-8")
PERMISSIVE = {"Apache-2.0", "MIT", "BSD-3-Clause"}
_COPYLEFT = re.compile(r"GPL|General Public License|Copyleft|CC-BY-SA|MPL-")


def test_no_file_stands_under_a_copyleft_license() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines()]
    own = [file for file in files if file != Path(__file__).resolve() and file.is_file()]
    found = [
        str(file.relative_to(ROOT))
        for file in own
        if _COPYLEFT.search(file.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found


def test_every_text_has_a_license_and_every_license_is_the_packages() -> None:
    sections = re.split(r"\n\n", ORIGIN)
    named = {name: one for one in sections for name in re.findall(r"^[^:]*\.txt", one)}
    assert len(named) == 3
    of = {text: one for group, one in named.items() for text in group.split(", ")}
    for path in TEXTS.glob("*.txt"):
        name = "calibration-*.txt" if path.name.startswith("calibration-") else path.name
        section = of[name]
        assert "\nLicense: " in section, name
        for notice in re.findall(r"(?:LICENSE|NOTICE)\.[\w-]+", section):
            assert (TEXTS / notice).is_file(), notice
    terms = set(re.findall(r"Apache-2\.0|MIT|BSD-3-Clause", " ".join(of.values())))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["license"].split(" AND ")) == terms == PERMISSIVE
    label = re.search(r'image\.licenses="([^"]+)"', (ROOT / "Dockerfile").read_text())
    assert label is not None
    assert label[1] == project["license"]


def test_the_notices_travel_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    travelling = {path for pattern in project["license-files"] for path in ROOT.glob(pattern)}
    notices = {path for path in TEXTS.iterdir() if path.name.startswith(("LICENSE", "NOTICE"))}
    assert len(notices) == 6
    assert travelling == {ROOT / "LICENSE", *notices}
    assert "LICENSE" in re.findall(r"^COPY (.*) /src/$", (ROOT / "Dockerfile").read_text(), re.M)[0]


def test_the_texts_are_what_their_names_say() -> None:
    """Of the packages that ORIGIN records."""
    for name, digest in make_eval_text.PACKAGES.items():
        assert f"  {name}\n    sha256 {digest}\n" in ORIGIN
    assert "Apache HTTP Server 2.4.71" in BUNDLED_NAME
    assert "apache2-doc_2.4.71-" in ORIGIN
    assert "electron-i18n-" in ORIGIN
    assert "Electron" in CALIBRATION_NAME


def test_a_text_that_is_replaced_leaves_its_digest() -> None:
    """Who changes a text changes its digest here, and adds the one that stood here to those before it."""
    texts = {
        "9cfae7a8adacf1d441eb2f1d730e565c5d1896b5b1737814c92c6e8d525262e6": bundled_text(),
        "f4d35d6e1431495606c0f13133594dde0b4086994fcfb3f2c8b8cdb956a6ce22": bundled_calibration_text(),
    }
    for digest, text in texts.items():
        assert text.digest == digest
        assert digest not in text.earlier
