"""Extracts the bundled texts from two of Debian's manuals, and records where they came from.

    apt-get download debian-reference-{en,fr,de,es,it,pt} installation-guide-amd64
    python tools/make_eval_text.py *.deb

Models are measured on Debian Reference and calibrated on the Installation Guide: what a variant was made
with is never what it is judged by. Only whole paragraphs of prose are taken: no tables, commands, lists or
headings. Each language is taken from another part of the book, so that no passage is a translation of
another.
"""

import argparse
import gzip
import re
import subprocess
import tempfile
from pathlib import Path

TEXT_FOLDER = Path(__file__).parents[1] / "entrypoint/smolquant/evaluate/text"
LANGUAGES = ("en", "fr", "de", "es", "it", "pt")
CHARACTERS = 24_000
"""A language: 5,000 to 10,000 tokens, by how well a tokenizer knows it."""

_BOOKS = {
    "": "usr/share/debian-reference/debian-reference.{0}.txt.gz",
    "calibration-": "usr/share/doc/installation-guide-amd64/{0}/install.{0}.txt.gz",
}
"""Prefix of the text files -> the manual in its package, by language."""
_CHAPTER_ONE = re.compile(r"^\w+\s1\.\s", re.MULTILINE)
_MINIMUM_WORDS = 12
_PACKAGE_SERVER = re.compile(r"\b(deb|ftp|http)\.[\w.]*debian\.org")
"""Paragraphs that name one are left out: this repository names no package servers."""

_ORIGIN = """\
The texts in this folder are paragraphs of two manuals, extracted by tools/make_eval_text.py from these
Debian packages:

{packages}

en.txt, fr.txt, de.txt, es.txt, it.txt, pt.txt: "Debian Reference" by Osamu Aoki and its translators.
Copyright: 2007-2013 Osamu Aoki <osamu@debian.org>; the translators are named in the book.
License: GPL-2.0-or-later (https://www.gnu.org/licenses/old-licenses/gpl-2.0.txt).
Source: https://salsa.debian.org/debian/debian-reference, and the Debian source package
debian-reference of the version above.

calibration-*.txt: "Debian GNU/Linux Installation Guide" by the Debian Installer team.
Copyright: 1996 Bruce Perens; 1996, 1997 Sven Rudolph; 1998 Igor Grobman, James Treacy; 1998-2002 Adam
Di Carlo; 2003 Chris Tillman; 2004-2023 the Debian Installer team and other contributors.
License: GPL-2.0-only (the same address).
Source: https://salsa.debian.org/installer-team/installation-guide, and the Debian source package
installation-guide of the version above.

They are data that smolquant measures and calibrates models with, not part of the program, and stay under
their own licences. `--eval-text` measures and `--calibration-text` calibrates on another text.
"""


def main() -> None:
    """Write two texts a language and ORIGIN."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+", type=Path, help="of both manuals")
    packages = parser.parse_args().packages
    TEXT_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for prefix, manual in _BOOKS.items():
            _write_texts(Path(folder), prefix, manual)
    names = "\n".join(f"  {package.stem}" for package in sorted(packages))
    (TEXT_FOLDER / "ORIGIN").write_text(_ORIGIN.format(packages=names), encoding="utf-8")


def _write_texts(folder: Path, prefix: str, manual: str) -> None:
    """One text a language, of a book that lies in ``folder``."""
    prose = {}
    for language in LANGUAGES:
        compressed = (folder / manual.format(language)).read_bytes()
        prose[language] = _prose(gzip.decompress(compressed).decode())
    for part, language in enumerate(LANGUAGES):
        untranslated = set(prose["en"]) if language != "en" else set()
        paragraphs = [text for text in prose[language] if text not in untranslated]
        text = _excerpt(paragraphs, part / len(LANGUAGES))
        (TEXT_FOLDER / f"{prefix}{language}.txt").write_text(text, encoding="utf-8")


def _prose(manual: str) -> list[str]:
    """The body's paragraphs of prose, each once and on one line."""
    *_, body = _CHAPTER_ONE.split(manual)  # the first match stands in the table of contents
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    paragraphs = (re.sub(r"\s+([,.;:)])", r"\1", block) for block in blocks)
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return (
        len(paragraph.split()) >= _MINIMUM_WORDS
        and paragraph[0].isupper()
        and paragraph.endswith(".")
        and letters > 0.88 * len(paragraph)
    )


def _excerpt(paragraphs: list[str], begin: float) -> str:
    """Whole paragraphs from the fraction ``begin`` of the book on."""
    taken: list[str] = []
    for paragraph in paragraphs[int(begin * len(paragraphs)) :]:
        if _PACKAGE_SERVER.search(paragraph):
            continue
        taken.append(paragraph)
        if sum(map(len, taken)) > CHARACTERS:
            break
    return "\n\n".join(taken) + "\n"


if __name__ == "__main__":
    main()
