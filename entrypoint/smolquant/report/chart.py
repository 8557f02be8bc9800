"""A bar chart in mermaid, which GitHub draws in a job summary."""

import re
from collections.abc import Sequence

from smolquant.text import Markdown, code_block

_UNSAFE = re.compile(r"[^\w .,%()+-]|%(?=%)")
"""What could end a quoted text of mermaid's, or mean something in it; two percent signs: a comment."""
_FRAME, _BAR = 52, 38
"""Pixels of height: of title and margins, and for each bar."""


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> Markdown | None:
    """Horizontal bars from zero, each with its label; None where there is nothing to compare.

    Mermaid draws no values beside bars in the versions that are in use: put them into the labels.

    Args:
        bars: labels and values; values are finite and not negative.
    """
    longest = max((value for _, value in bars), default=0.0)
    if len(bars) < 2 or float(_number(longest)) <= 0:
        return None
    labels = ", ".join(_quoted(label) for label, _ in bars)
    lines = [
        "---",
        "config:",
        "    xyChart:",
        "        width: 720",
        f"        height: {_FRAME + _BAR * len(bars)}",
        "        titleFontSize: 15",
        "        xAxis:",
        "            showTick: false",
        "        yAxis:",
        "            showLabel: false",
        "            showTick: false",
        "            showAxisLine: false",
        "    themeVariables:",
        "        xyChart:",
        '            plotColorPalette: "#0072b2"',
        "---",
        "xychart-beta horizontal",
        f"    title {_quoted(title)}",
        f"    x-axis [{labels}]",
        f"    y-axis 0 --> {_number(longest)}",
        f"    bar [{', '.join(_number(value) for _, value in bars)}]",
    ]
    return code_block("\n".join(lines), "mermaid")


def _number(value: float) -> str:
    """Without an exponent, which mermaid cannot read."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def _quoted(text: str) -> str:
    return '"' + _UNSAFE.sub("_", text) + '"'
