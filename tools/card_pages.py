"""Cards as pages of HTML to look at, at the width that the Hub gives them, with the files beside them."""

import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt

WIDTH = 760
"""Pixels that the Hub gives a card."""

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_PICTURES = {".svg", ".png"}

_PAGE = """<!doctype html>
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ max-width: {width}px; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ border: 1px solid #8888; padding: .3em .7em }}
code {{ font-size: .9em }}
pre {{ overflow-x: auto; padding: 1em; background: #8882 }}
img {{ max-width: 100% }}
</style>
{body}
"""


def write_pages(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], bytes], hub: str
) -> Path:
    """Write a page for each card, and the pictures that they show.

    Args:
        sizes: path in the repository -> bytes.
        read: gives the content of a file.
        hub: the address below which the repository's files are.

    Returns:
        The page of the card at the root.
    """
    for path in sizes:
        place = folder / path
        if PurePosixPath(path).name == "README.md":
            place.parent.mkdir(parents=True, exist_ok=True)
            card = read(path).decode()
            files = _files(sizes, hub) if place.parent == folder else ""
            place.with_name("index.html").write_text(_page(path, card, files), encoding="utf-8")
        elif place.suffix in _PICTURES:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(read(path))
    return folder / "index.html"


def _page(path: str, card: str, files: str) -> str:
    """A card without its front matter; links to a folder lead to that folder's page."""
    renderer = MarkdownIt("gfm-like", {"linkify": False})
    body = renderer.render(_FRONT_MATTER.sub("", card))
    body = re.sub(r'href="(?:\./)?([\w.-]+)/?"', _to_page, body)
    return _PAGE.format(title=escape(path), width=WIDTH, body=body + files)


def _to_page(link: re.Match[str]) -> str:
    return link[0] if "." in link[1] else f'href="{link[1]}/index.html"'


def _files(sizes: Mapping[str, int], hub: str) -> str:
    rows = "".join(
        f'<tr><td><a href="{escape(hub)}/resolve/main/{escape(path)}">{escape(path)}</a></td>'
        f'<td align="right">{size:,}</td></tr>'
        for path, size in sorted(sizes.items())
    )
    return f"<h2>Files</h2><table><tr><th>file</th><th>bytes</th></tr>{rows}</table>"
