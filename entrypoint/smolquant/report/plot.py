"""What rounding did to a variant's weights, as a picture: relative error, layer by layer, in SVG.

Drawn from the tensor records alone, so that the same variant gives the same bytes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from xml.etree.ElementTree import Element, SubElement

from smolquant.names import split_at_layer, without_numbers
from smolquant.record import TensorRecord
from smolquant.report import svg
from smolquant.text import one_line

FILE_NAME = "relative_error.svg"

_HEIGHT = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 540, 92, 372
"""The plot area; the legend stands to its right."""
_MAX_SERIES = 2 * len(svg.SERIES)
_LEGEND_LINE = 19
_LONGEST_LABEL, _LONGEST_NAME = 14, 80


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
    number: int
    """What its colour follows."""
    in_layers: bool

    @property
    def largest(self) -> float:
        return max(error for _, error in self.points)

    @property
    def mean(self) -> float:
        return sum(error for _, error in self.points) / len(self.points)


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
    ticks = svg.ticks(min(values), max(values), at_most=6)
    across = svg.Scale(layers[0], layers[-1], _LEFT + 16, _RIGHT - 16)
    up = svg.Scale(ticks[0], ticks[-1], _BOTTOM, _TOP)
    title = f"Relative error of {one_line(variant)}, layer by layer"
    subtitle = f"Largest: {svg.clipped(worst.name, _LONGEST_NAME)}, {worst.percent:.2f}%"

    picture = svg.canvas(title, subtitle, _HEIGHT)
    svg.ring(picture, "30", "57")
    svg.write_faint(picture, subtitle, 42, 62)
    _draw_axes(picture, across, up, ticks, layers)
    for one in reversed(shown):  # the largest errors lie on top
        _draw_line(picture, one, across, up)
    at = layers[-1] if worst.layer is None else worst.layer
    svg.ring(picture, across(at), up(worst.percent))
    _draw_legend(picture, shown, len(series) - len(shown))
    return svg.text_of(picture)


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
                number=index,
                in_layers=in_layers,
            )
        )
    return series


def _tail(kind: str) -> str:
    return kind.rpartition(".")[2]


def _draw_axes(
    picture: Element,
    across: svg.Scale,
    up: svg.Scale,
    ticks: Sequence[float],
    layers: Sequence[int],
) -> None:
    for tick in ticks:
        svg.grid_line(picture, x1=str(_LEFT), x2=str(_RIGHT), y1=up(tick), y2=up(tick))
        label = svg.tick_label(tick, ticks[1] - ticks[0])
        svg.write_faint(picture, label, _LEFT - 10, up(tick), dy="4.5", **svg.TO_THE_LEFT)
    step = max(1, round(svg.ticks(0, layers[-1] - layers[0], at_most=12)[1]))
    for layer in range(math.ceil(layers[0] / step) * step, layers[-1] + 1, step):
        svg.write_faint(picture, str(layer), across(layer), _BOTTOM + 22, **svg.CENTRED)
    middle = (_LEFT + _RIGHT) / 2
    svg.write(picture, "Layer", middle, _BOTTOM + 48, **svg.CENTRED)
    height = (_TOP + _BOTTOM) / 2
    turned = {"transform": f"rotate(-90 22 {height})"}
    svg.write(picture, "‖dequantized − source‖ / ‖source‖", 22, height, **svg.CENTRED, **turned)


def _draw_line(picture: Element, series: _Series, across: svg.Scale, up: svg.Scale) -> None:
    places = [(across(layer), up(error)) for layer, error in series.points]
    look = {"fill": "none", **svg.stroke(series.number), "stroke-linecap": "round"}
    line = "M" + "L".join(f"{x} {y}" for x, y in places)
    thin = {"stroke-width": "1.8", "stroke-linejoin": "round", **_dashes(series)}
    SubElement(picture, "path", {"d": line, **look, **thin})
    if series.in_layers:  # a stroke of no length with round ends is a dot
        dots = "".join(f"M{x} {y}h0" for x, y in places)
        SubElement(picture, "path", {"d": dots, **look, "stroke-width": "5.5"})


def _dashes(series: _Series) -> dict[str, str]:
    if not series.in_layers:
        return {"stroke-dasharray": "1 5"}
    repeats_colours = series.number % _MAX_SERIES >= len(svg.SERIES)
    return {"stroke-dasharray": "7 4"} if repeats_colours else {}


def _draw_legend(picture: Element, series: Iterable[_Series], left_out: int) -> None:
    x, y, right = _RIGHT + 20, _TOP + 4, svg.WIDTH - 24
    svg.write_faint(picture, "mean", right, y, **svg.TO_THE_LEFT)
    for one in series:
        y += _LEGEND_LINE
        line = {"x1": str(x), "x2": str(x + 20), "y1": str(y - 4.5), "y2": str(y - 4.5)}
        look = {**svg.stroke(one.number), "stroke-width": "3", "stroke-linecap": "round"}
        SubElement(picture, "line", line | look | _dashes(one))
        svg.write(picture, svg.clipped(one.label, _LONGEST_LABEL), x + 28, y)
        svg.write_faint(picture, f"{one.mean:.2f}%", right, y, **svg.TO_THE_LEFT)
    if left_out > 0:
        svg.write_faint(picture, f"and {left_out} with less", x + 28, y + _LEGEND_LINE)
