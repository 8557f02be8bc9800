"""A chart in mermaid, which GitHub draws in a job summary, where no picture can be."""

import re
from collections.abc import Sequence

from smolquant.text import Markdown, code_block

_UNSAFE = re.compile(r"[^\w .,%()+-]|%(?=%)")
"""What could end a quoted text of mermaid's, or mean something in it; two percent signs: a comment."""
_WIDTH, _FRAME, _BAR = 720, 90, 36
"""Pixels: the width, which a job summary is a little more than, and the height of title and axis and of
each bar."""


def share_chart(
    title: str, labels: Sequence[str], bars: Sequence[float], line: Sequence[float] | None = None
) -> Markdown | None:
    """Shares of an original in percent: a bar for each label, and others as a line across the bars.

    Mermaid has no legend, and draws no values beside bars in the versions that are in use: put what tells
    them apart into the title, and the numbers into the labels.

    Args:
        labels: at least two, or there is nothing to compare.
        bars: finite, and not negative.
        line: as ``bars``; None where one is missing.

    Returns:
        None where there is nothing to compare.
    """
    if len(labels) < 2 or float(_number(max(bars))) <= 0:
        return None
    top = max(100.0, *bars, *(line or ()))
    lines = [
        "---",
        "config:",
        "    xyChart:",
        f"        width: {_WIDTH}",
        f"        height: {_FRAME + _BAR * len(labels)}",
        "        titleFontSize: 15",
        "        xAxis:",
        "            showTick: false",
        "    themeVariables:",
        "        xyChart:",
        '            plotColorPalette: "#0072b2, #d55e00"',
        "---",
        "xychart-beta horizontal",
        f"    title {_quoted(title)}",
        f"    x-axis [{', '.join(map(_quoted, labels))}]",
        f"    y-axis 0 --> {_number(top)}",
        f"    bar [{', '.join(map(_number, bars))}]",
        *([f"    line [{', '.join(map(_number, line))}]"] if line else []),
    ]
    return code_block("\n".join(lines), "mermaid")


def _number(value: float) -> str:
    """Without an exponent, which mermaid cannot read."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _quoted(text: str) -> str:
    return '"' + _UNSAFE.sub("_", text) + '"'
