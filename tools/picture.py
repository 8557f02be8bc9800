"""`make picture`: docs/images/card.png, the card of a real run as the Hub shows it.

SmolLM2-135M-Instruct is quantized and measured on this machine, and the first part of the card that
the run wrote is rendered by Debian's chromium at the Hub's width.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from card_pages import WIDTH, write_pages
from smollm2 import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
PICTURE = ROOT / "docs" / "images" / "card.png"
EVAL_TOKENS = 512
"""Fewer than a release is measured on, so that the picture takes minutes on two cores."""

_FROM = "## Quantized variants"
_TO = "### Which one to choose"
"""What is shown of the card: the table and the picture."""

_MARGIN = 20
_SCALE = 1.5
"""Pixels of the picture for one of the page, for screens that have more."""


def main() -> None:
    """Quantize, render, and say what was made."""
    folder = _quantized(make_checkpoint(WORK / "checkpoint"))
    page = _page(folder, WORK / "picture-page")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    _screenshot(page, PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


def _quantized(checkpoint: Path) -> Path:
    """The folder of variants; an earlier picture's are taken as they are."""
    folder = WORK / "picture"
    arguments = ["quantize", str(checkpoint), "--save-only", "--quant-type", "both"]
    arguments += ["--eval-tokens", str(EVAL_TOKENS), "--output-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "smolquant", *arguments], check=True)
    return folder


def shown_part(card: str) -> str:
    """The part of a root card that the picture shows.

    Raises:
        ValueError: the card has no such part.
    """
    part = re.search(f"^{_FROM}$.*?(?=^{_TO}$)", card, re.MULTILINE | re.DOTALL)
    if part is None:
        raise ValueError(f"the card has nothing between {_FROM!r} and {_TO!r}")
    return part[0]


def _page(folder: Path, work: Path) -> Path:
    """The part of the card as a page, with the pictures that it shows."""
    files = [path for path in folder.iterdir() if path.suffix in {".md", ".svg"}]
    shutil.rmtree(work, ignore_errors=True)

    def read(name: str) -> bytes:
        content = (folder / name).read_bytes()
        return shown_part(content.decode()).encode() if name == "README.md" else content

    page = write_pages(work, {path.name: path.stat().st_size for path in files}, read, "")
    html = page.read_text(encoding="utf-8").partition("<h2>Files</h2>")[0]
    page.write_text(
        f"{html}<style>body {{ margin: {_MARGIN}px auto }} h2, h3 {{ margin-top: 0 }}</style>"
        "<script>document.title = Math.ceil(document.body.getBoundingClientRect().height)</script>",
        encoding="utf-8",
    )
    return page


def _screenshot(page: Path, picture: Path) -> None:
    """The whole page as a PNG file."""
    told = _chromium(page, "--virtual-time-budget=2000", "--dump-dom")
    height = int(re.findall(r"<title>(\d+)</title>", told)[0]) + 2 * _MARGIN
    size = f"--window-size={WIDTH + 2 * _MARGIN},{height}"
    _chromium(page, size, f"--force-device-scale-factor={_SCALE}", f"--screenshot={picture}")


def _chromium(page: Path, *options: str) -> str:
    """What chromium prints about a page."""
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("The picture is drawn by chromium: `apt-get install chromium`.")
    command = [program, "--headless", "--no-sandbox", "--hide-scrollbars", *options, page.as_uri()]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return ran.stdout


if __name__ == "__main__":
    main()
