"""Drawing in SVG for pages that are light or dark: the canvas, its colours, and what stands on it.

Colours are attributes, and a style sheet replaces them where the reader's page is dark; a viewer that
knows no style sheets shows the light picture. Each brings its own background, so it is never ink on ink.
"""

import math
from xml.etree.ElementTree import Element, SubElement, indent, tostring

WIDTH = 760
"""Pixels; what the Hub's pages show without scaling."""

FONT_SIZE = 13
SERIES = (
    ("#0072b2", "#4ba3e3"),
    ("#d55e00", "#ff8a4c"),
    ("#009e73", "#2dc79a"),
    ("#cc79a7", "#e59cc5"),
    ("#e69f00", "#f2b632"),
    ("#56b4e9", "#8fd0f5"),
    ("#444444", "#b3b9c0"),
    ("#882255", "#d9689f"),
)
"""Okabe and Ito's, which people who do not see all colours can tell apart, less their yellow; each with a
lighter one for dark pages."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_INK, _FAINT, _GRID, _PAPER = "#24292f", "#59636e", "#e4e8ec", "#ffffff"
_DARK = {
    ".ink": "fill:#e6edf3",
    ".paper": "fill:#0d1117;stroke:#30363d",
    ".faint": "fill:#9198a1",
    ".grid": "stroke:#30363d",
    ".ring": "stroke:#e6edf3",
    **{f".line{index}": f"stroke:{dark}" for index, (_, dark) in enumerate(SERIES)},
    **{f".area{index}": f"fill:{dark}" for index, (_, dark) in enumerate(SERIES)},
}
CENTRED = {"text-anchor": "middle"}
TO_THE_LEFT = {"text-anchor": "end"}


class Scale:
    """A range of values on a range of pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        """``low`` lies at pixel ``start``, ``high`` at ``end``."""
        self._low, self._start = low, start
        self._per_unit = (end - start) / (high - low)

    def __call__(self, value: float) -> str:
        """The pixel of a value, as SVG writes it."""
        return f"{self._start + (value - self._low) * self._per_unit:.1f}"


def canvas(title: str, subtitle: str, height: int) -> Element:
    """An empty picture with its title and, below, a sentence in smaller letters."""
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH),
            "height": str(height),
            "role": "img",
            "font-family": _FONT,
            "font-size": str(FONT_SIZE),
            "fill": _INK,
            "class": "ink",
        },
    )
    SubElement(svg, "title").text = title
    SubElement(svg, "desc").text = subtitle
    rules = "".join(f"{selector}{{{look}}}" for selector, look in _DARK.items())
    SubElement(svg, "style").text = f"@media (prefers-color-scheme:dark){{{rules}}}"
    edge = {"x": "0.5", "y": "0.5", "rx": "8", "fill": _PAPER, "stroke": _GRID, "class": "paper"}
    SubElement(svg, "rect", edge | {"width": str(WIDTH - 1), "height": str(height - 1)})
    write(svg, title, 24, 36, **{"font-size": "19", "font-weight": "600"})
    return svg


def text_of(svg: Element) -> str:
    """The finished picture as the text of a file."""
    indent(svg)
    return tostring(svg, encoding="unicode") + "\n"


def write(svg: Element, text: str, x: float | str, y: float | str, **look: str) -> None:
    """A line of text."""
    SubElement(svg, "text", {"x": str(x), "y": str(y), **look}).text = text


def write_faint(svg: Element, text: str, x: float | str, y: float | str, **look: str) -> None:
    """A line of text that stands back."""
    write(svg, text, x, y, **{"fill": _FAINT, "class": "faint", **look})


def grid_line(svg: Element, **ends: str) -> None:
    """A line to read values by; ``ends`` are x1, x2, y1 and y2."""
    SubElement(svg, "line", {**ends, "stroke": _GRID, "class": "grid"})


def ring(svg: Element, x: str, y: str) -> None:
    """A ring around what is pointed at."""
    look = {"r": "6.5", "fill": "none", "stroke": _INK, "stroke-width": "1.6", "class": "ring"}
    SubElement(svg, "circle", {"cx": x, "cy": y, **look})


def stroke(series: int) -> dict[str, str]:
    """The attributes of a line in a series' colour; colours repeat."""
    index = series % len(SERIES)
    return {"stroke": SERIES[index][0], "class": f"line{index}"}


def area(series: int) -> dict[str, str]:
    """The attributes of an area in a series' colour; colours repeat."""
    index = series % len(SERIES)
    return {"fill": SERIES[index][0], "class": f"area{index}"}


def ticks(low: float, high: float, *, at_most: int) -> list[float]:
    """Round numbers, evenly spaced, from ``low`` or less to ``high`` or more."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / at_most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= at_most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [n * step for n in range(first, last + 1)]


def tick_label(tick: float, step: float) -> str:
    """A tick as a percentage, with the decimals that its neighbours differ in."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:.{decimals}f}%"


def clipped(text: str, longest: int) -> str:
    """``text`` without its middle where it is too long: names differ at their ends."""
    if len(text) <= longest:
        return text
    kept = longest // 2
    return f"{text[:kept]}…{text[len(text) - longest + kept + 1 :]}"
