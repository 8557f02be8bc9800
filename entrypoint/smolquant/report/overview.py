"""Size and quality of all variants beside their original, in one picture for the root of a repository.

Drawn from the records alone, so that the same variants give the same bytes, whoever publishes last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from smolquant.record import VariantRecord
from smolquant.report import svg
from smolquant.report.measures import TOP1_AGREEMENT
from smolquant.schemes import in_order
from smolquant.text import human_size, one_line, percent

FILE_NAME = "smolquant-variants.svg"
"""At the root of a repository or of a folder of variants."""
_MARK = "smolquant draws this picture"

_ROW, _TOP, _HEADERS = 34, 108, 76
_AXIS, _MARGIN, _NOTE = 18, 14, 22
"""What is below the rows: the axis of the dots, an edge, and a footnote where there is one."""
_NAMES, _BARS, _LONGEST_BAR, _LONGEST_ALONE = 24, 150, 190, 440
_DOTS, _END_OF_DOTS, _NUMBERS = 484, 668, 736
"""Where names, bars of sizes, dots of quality and its numbers stand, in pixels from the left."""
_LEAST_RANGE = 99.0
"""Percent; without it, what is next to nothing would look like much."""
_MOST_ROWS = 24
_LONGEST_NAME = 17
_ORIGINAL, _VARIANT = 6, 0
"""Series of colours."""


@dataclass(frozen=True)
class _Row:
    """The original or a variant."""

    name: str
    size_bytes: int
    size: str
    agreement: float | None
    """How often its first choice is the original's, in percent; None where that was not measured."""
    number: str
    """The same as people read it."""
    series: int


def overview(records: Mapping[str, VariantRecord], source_identity: str | None) -> str | None:
    """The picture as the text of an SVG file; None where nothing has a size.

    Args:
        records: every variant, by subfolder.
        source_identity: the identity of the main model as it is now; variants of another are marked.
    """
    names = [name for name in in_order(records) if records[name].size_bytes]
    if not names:
        return None
    older = {
        n
        for n in names
        if source_identity is not None and records[n].source.identity != source_identity
    }
    rows = [_row(records[name], is_older=name in older) for name in names[:_MOST_ROWS]]
    of_now = next((name for name in names if name not in older), names[0])
    original = records[of_now].source.size_bytes
    if original:
        rows.insert(0, _Row("original", original, human_size(original), 100.0, "100%", _ORIGINAL))
    is_measured = any(row.agreement is not None for row in rows if row.series == _VARIANT)
    title = "Size and quality beside the original" if is_measured else "Size beside the original"

    notes = ["† made from another source"] if older else []
    if len(names) > _MOST_ROWS:
        notes.append(f"and {len(names) - _MOST_ROWS} more variants")
    below = (_AXIS if is_measured else 0) + (_NOTE if notes else 0) + _MARGIN
    picture = svg.canvas(
        title, _description(rows, is_measured=is_measured), _TOP + _ROW * len(rows) + below
    )
    SubElement(picture, "metadata").text = _MARK
    _draw_sizes(picture, rows, _LONGEST_BAR if is_measured else _LONGEST_ALONE)
    if is_measured:
        _draw_quality(picture, rows)
    if notes:
        y = _TOP + _ROW * len(rows) + below - _MARGIN
        svg.write_faint(picture, "; ".join(notes), _NAMES, y)
    return svg.text_of(picture)


def is_ours(content: bytes) -> bool:
    """Whether a file of this picture's name was drawn by smolquant, and may be drawn again."""
    return _MARK.encode() in content


def _row(record: VariantRecord, *, is_older: bool) -> _Row:
    ratio = f" ({percent(record.ratio)})" if record.source.size_bytes else ""
    share = TOP1_AGREEMENT.value(record.metrics)
    return _Row(
        name=svg.clipped(one_line(record.variant), _LONGEST_NAME) + (" †" if is_older else ""),
        size_bytes=record.size_bytes,
        size=f"{human_size(record.size_bytes)}{ratio}",
        agreement=None if share is None else 100 * min(max(share, 0.0), 1.0),
        number=TOP1_AGREEMENT.variant(record.metrics) or "not measured",
        series=_VARIANT,
    )


def _description(rows: Sequence[_Row], *, is_measured: bool) -> str:
    """What the picture shows, for those who do not see it."""
    told = (
        f"{row.name}: {row.size}" + (f", same top token {row.number}" if is_measured else "")
        for row in rows
    )
    return "; ".join(told) + "."


def _draw_sizes(picture: Element, rows: Sequence[_Row], longest_bar: int) -> None:
    svg.write(picture, "Size", _BARS, _HEADERS, **{"font-weight": "600"})
    longest = max(row.size_bytes for row in rows)
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index
        svg.write(picture, row.name, _NAMES, y + 4.5)
        length = longest_bar * row.size_bytes / longest
        bar = {
            "x": str(_BARS),
            "y": str(y - 9),
            "width": f"{length:.1f}",
            "height": "18",
            "rx": "3",
        }
        SubElement(picture, "rect", bar | svg.area(row.series))
        svg.write(picture, row.size, f"{_BARS + length + 8:.1f}", y + 4.5)


def _draw_quality(picture: Element, rows: Sequence[_Row]) -> None:
    """Each variant's distance from what the original would say, as a line that ends in a dot."""
    values = [row.agreement for row in rows if row.agreement is not None]
    ticks = svg.ticks(min(*values, _LEAST_RANGE), 100, at_most=4)
    across = svg.Scale(ticks[0], 100, _DOTS, _END_OF_DOTS)
    bottom = _TOP + _ROW * (len(rows) - 1) + 17
    svg.write(picture, TOP1_AGREEMENT.title, _DOTS, _HEADERS, **{"font-weight": "600"})
    for tick in ticks:
        svg.grid_line(picture, x1=across(tick), x2=across(tick), y1=str(_TOP - 17), y2=str(bottom))
        label = svg.tick_label(tick, ticks[1] - ticks[0])
        svg.write_faint(picture, label, across(tick), bottom + 18, **svg.CENTRED)
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index
        if row.agreement is None:
            svg.write_faint(picture, row.number, _DOTS, y + 4.5)
            continue
        svg.write(picture, row.number, _NUMBERS, y + 4.5, **svg.TO_THE_LEFT)
        line = {"x1": across(row.agreement), "x2": across(100), "y1": str(y), "y2": str(y)}
        SubElement(picture, "line", line | {"stroke-width": "3"} | svg.stroke(row.series))
        dot = {"cx": across(row.agreement), "cy": str(y), "r": "6"}
        SubElement(picture, "circle", dot | svg.area(row.series))
