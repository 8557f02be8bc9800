"""What rounding did to a variant's weights, as a picture: relative error, layer by layer, in SVG.

Drawn from the tensor records alone, so that the same variant gives the same bytes. The picture brings
its own background, for pages that are dark.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from smolquant.names import split_at_layer, without_numbers
from smolquant.record import TensorRecord
from smolquant.text import one_line

FILE_NAME = "relative_error.svg"

_WIDTH, _HEIGHT = 960, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 700, 92, 432
"""The plot area; the legend stands to its right."""
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#882255",
)  # fmt: skip
"""Okabe and Ito's, which people who do not see all colours can tell apart, less their yellow."""
_MAX_SERIES = 2 * len(_COLOURS)
_LONGEST_LABEL, _LONGEST_NAME = 16, 80
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_INK, _FAINT, _GRID, _PAPER = "#24292f", "#59636e", "#e4e8ec", "#ffffff"


@dataclass(frozen=True)
class _Error:
    """The error of one quantized tensor, in percent. ``layer`` is None outside the layers."""

    name: str
    kind: str
    layer: int | None
    percent: float


@dataclass(frozen=True)
class _Series:
    """The errors of one kind of projection: a line along the layers, level for what is in none."""

    label: str
    points: tuple[tuple[int, float], ...]
    """(layer, percent), in the layers' order."""
    colour: str
    dashes: str
    in_layers: bool

    @property
    def largest(self) -> float:
        return max(error for _, error in self.points)

    @property
    def mean(self) -> float:
        return sum(error for _, error in self.points) / len(self.points)


@dataclass(frozen=True)
class _Scale:
    """A range of values on a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.1f}"


def relative_error_plot(variant: str, tensors: Mapping[str, TensorRecord]) -> str | None:
    """The picture as the text of an SVG file; None where there are no two layers to compare.

    Args:
        variant: named in the title.
        tensors: by source name. A layer is the first number in it, the kind what comes after.
    """
    errors = [
        _Error(one_line(name), *_place(one_line(name)), 100 * error)
        for name, error in _finite_errors(tensors).items()
    ]
    layers = sorted({error.layer for error in errors if error.layer is not None})
    if len(layers) < 2:
        return None
    worst = max(errors, key=lambda error: error.percent)
    series = _series(errors, layers)
    shown = sorted(series, key=lambda one: one.largest, reverse=True)[:_MAX_SERIES]
    shown.sort(key=lambda one: one.mean, reverse=True)
    values = [error.percent for error in errors]
    ticks = _ticks(min(values), max(values), at_most=6)
    across = _Scale(layers[0], layers[-1], _LEFT + 16, _RIGHT - 16)
    up = _Scale(ticks[0], ticks[-1], _BOTTOM, _TOP)
    title = f"Relative error of {one_line(variant)}, layer by layer"
    subtitle = f"Largest: {_clipped(worst.name, _LONGEST_NAME)}, {worst.percent:.2f}%"

    svg = _canvas(title, subtitle)
    _draw_axes(svg, across, up, ticks, layers)
    for one in reversed(shown):  # the largest errors lie on top
        _draw_line(svg, one, across, up)
    _draw_ring(svg, across(layers[-1] if worst.layer is None else worst.layer), up(worst.percent))
    _draw_legend(svg, shown, len(series) - len(shown))
    indent(svg)
    return tostring(svg, encoding="unicode") + "\n"


def largest_error(tensors: Mapping[str, TensorRecord]) -> tuple[str, float] | None:
    """The source tensor that rounding changed most, and its relative error."""
    return max(_finite_errors(tensors).items(), key=itemgetter(1), default=None)


def _finite_errors(tensors: Mapping[str, TensorRecord]) -> dict[str, float]:
    return {
        name: tensor.relative_error
        for name, tensor in tensors.items()
        if tensor.relative_error is not None and math.isfinite(tensor.relative_error)
    }


def _place(name: str) -> tuple[str, int | None]:
    """A tensor's kind and layer: ``("self_attn.q_proj", 3)``, or its own name and None."""
    before, layer, after = split_at_layer(name.removesuffix(".weight"))
    return without_numbers(after) or before, layer


def _series(errors: Sequence[_Error], layers: Sequence[int]) -> list[_Series]:
    """One series for each kind; where a layer has several tensors of a kind, the worst counts."""
    worst: dict[tuple[str, bool], dict[int, float]] = {}
    for error in errors:
        points = worst.setdefault((error.kind, error.layer is not None), {})
        for layer in (layers[0], layers[-1]) if error.layer is None else (error.layer,):
            points[layer] = max(error.percent, points.get(layer, 0.0))
    tails = Counter(_tail(kind) for kind, _ in worst)
    series = []
    # Colours follow the names, so that a kind has the same one in each variant of a model.
    kinds = sorted(worst, key=lambda key: (not key[1], key[0]))
    for index, (kind, in_layers) in enumerate(kinds):
        tail = _tail(kind)
        series.append(
            _Series(
                label=tail if tails[tail] == 1 else kind,
                points=tuple(sorted(worst[kind, in_layers].items())),
                colour=_COLOURS[index % len(_COLOURS)],
                dashes="" if index % _MAX_SERIES < len(_COLOURS) else "7 4",
                in_layers=in_layers,
            )
        )
    return series


def _tail(kind: str) -> str:
    return kind.rpartition(".")[2]


def _ticks(low: float, high: float, *, at_most: int) -> list[float]:
    """Round numbers, evenly spaced, from ``low`` or less to ``high`` or more."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / at_most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= at_most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [n * step for n in range(first, last + 1)]


def _canvas(title: str, subtitle: str) -> Element:
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "width": str(_WIDTH),
            "height": str(_HEIGHT),
            "role": "img",
            "font-family": _FONT,
            "font-size": "13",
            "fill": _INK,
        },
    )
    SubElement(svg, "title").text = title
    SubElement(svg, "desc").text = subtitle
    edge = {"x": "0.5", "y": "0.5", "rx": "8", "fill": _PAPER, "stroke": _GRID}
    SubElement(svg, "rect", edge | {"width": str(_WIDTH - 1), "height": str(_HEIGHT - 1)})
    _write(svg, title, 24, 36, **{"font-size": "19", "font-weight": "600"})
    _draw_ring(svg, "30", "57")
    _write(svg, subtitle, 42, 62, fill=_FAINT)
    return svg


def _draw_axes(
    svg: Element, across: _Scale, up: _Scale, ticks: Sequence[float], layers: Sequence[int]
) -> None:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        line = {"x1": str(_LEFT), "x2": str(_RIGHT), "y1": up(tick), "y2": up(tick)}
        SubElement(svg, "line", line | {"stroke": _GRID})
        label = f"{tick:.{decimals}f}%"
        _write(svg, label, _LEFT - 10, up(tick), dy="4.5", fill=_FAINT, **{"text-anchor": "end"})
    step = max(1, round(_ticks(0, layers[-1] - layers[0], at_most=15)[1]))
    for layer in range(math.ceil(layers[0] / step) * step, layers[-1] + 1, step):
        _write(svg, str(layer), across(layer), _BOTTOM + 22, fill=_FAINT, **_CENTRED)
    middle = (_LEFT + _RIGHT) / 2
    _write(svg, "Layer", middle, _BOTTOM + 48, **_CENTRED)
    height = (_TOP + _BOTTOM) / 2
    turned = {"transform": f"rotate(-90 22 {height})"}
    _write(svg, "‖dequantized − source‖ / ‖source‖", 22, height, **_CENTRED, **turned)


_CENTRED = {"text-anchor": "middle"}


def _draw_line(svg: Element, series: _Series, across: _Scale, up: _Scale) -> None:
    places = [(across(layer), up(error)) for layer, error in series.points]
    stroke = {"fill": "none", "stroke": series.colour, "stroke-linecap": "round"}
    line = "M" + "L".join(f"{x} {y}" for x, y in places)
    look = {"stroke-width": "1.8", "stroke-linejoin": "round", **_dashes(series)}
    SubElement(svg, "path", {"d": line, **stroke, **look})
    if series.in_layers:  # a stroke of no length with round ends is a dot
        dots = "".join(f"M{x} {y}h0" for x, y in places)
        SubElement(svg, "path", {"d": dots, **stroke, "stroke-width": "5.5"})


def _dashes(series: _Series) -> dict[str, str]:
    dashes = series.dashes if series.in_layers else "1 5"
    return {"stroke-dasharray": dashes} if dashes else {}


def _draw_ring(svg: Element, x: str, y: str) -> None:
    """What marks the worst tensor, in the subtitle and on its line."""
    look = {"r": "6.5", "fill": "none", "stroke": _INK, "stroke-width": "1.6"}
    SubElement(svg, "circle", {"cx": x, "cy": y, **look})


def _draw_legend(svg: Element, series: Iterable[_Series], left_out: int) -> None:
    x, y = _RIGHT + 24, _TOP + 4
    right = {"text-anchor": "end", "fill": _FAINT}
    _write(svg, "mean", _WIDTH - 24, y, **right)
    for one in series:
        y += 21
        line = {"x1": str(x), "x2": str(x + 20), "y1": str(y - 4.5), "y2": str(y - 4.5)}
        look = {"stroke": one.colour, "stroke-width": "3", "stroke-linecap": "round"}
        SubElement(svg, "line", line | look | _dashes(one))
        _write(svg, _clipped(one.label, _LONGEST_LABEL), x + 30, y)
        _write(svg, f"{one.mean:.2f}%", _WIDTH - 24, y, **right)
    if left_out > 0:
        _write(svg, f"and {left_out} with less", x + 30, y + 21, fill=_FAINT)


def _write(svg: Element, text: str, x: float | str, y: float | str, **look: str) -> None:
    SubElement(svg, "text", {"x": str(x), "y": str(y), **look}).text = text


def _clipped(text: str, longest: int) -> str:
    """``text`` without its middle where it is too long: names differ at their ends."""
    if len(text) <= longest:
        return text
    kept = longest // 2
    return f"{text[:kept]}…{text[len(text) - longest + kept + 1 :]}"
