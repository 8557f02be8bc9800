"""Extracts the bundled evaluation text from Debian Reference, and records where it came from.

    apt-get download debian-reference-{en,fr,de,es,it,pt}
    python tools/make_eval_text.py debian-reference-*.deb

Only whole paragraphs of prose are taken: no tables, commands, lists or headings. Each language is taken
from another part of the book, so that no passage is a translation of another.
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

_MANUAL = "usr/share/debian-reference/debian-reference.{}.txt.gz"
_CHAPTER_ONE = re.compile(r"^\w+\s1\.\s", re.MULTILINE)
_MINIMUM_WORDS = 12

_ORIGIN = """\
The texts in this folder are paragraphs of "Debian Reference" by Osamu Aoki and its translators,
extracted by tools/make_eval_text.py from these Debian packages:

{packages}

Copyright: 2007-2013 Osamu Aoki <osamu@debian.org>; the translators are named in the book.
License: GPL-2.0-or-later (https://www.gnu.org/licenses/old-licenses/gpl-2.0.txt).
Source: https://salsa.debian.org/debian/debian-reference, and the Debian source package
debian-reference of the version above.

They are data that smolquant measures models with, not part of the program, and stay under their own
licence. `--eval-text` measures on another text.
"""


def main() -> None:
    """Write one text a language and ORIGIN."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+", type=Path, help="debian-reference-*.deb")
    packages = parser.parse_args().packages
    TEXT_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        prose = {language: _prose(_manual(Path(folder), language)) for language in LANGUAGES}
    for part, language in enumerate(LANGUAGES):
        untranslated = set(prose["en"]) if language != "en" else set()
        paragraphs = [text for text in prose[language] if text not in untranslated]
        text = _excerpt(paragraphs, part / len(LANGUAGES))
        (TEXT_FOLDER / f"{language}.txt").write_text(text, encoding="utf-8")
    names = "\n".join(f"  {package.stem}" for package in sorted(packages))
    (TEXT_FOLDER / "ORIGIN").write_text(_ORIGIN.format(packages=names), encoding="utf-8")


def _manual(folder: Path, language: str) -> str:
    return gzip.decompress((folder / _MANUAL.format(language)).read_bytes()).decode()


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
        taken.append(paragraph)
        if sum(map(len, taken)) > CHARACTERS:
            break
    return "\n\n".join(taken) + "\n"


if __name__ == "__main__":
    main()
