"""The last lines of a run in the log: what was made, what it cost, whether it passed, and what is next."""

import shlex
from collections.abc import Iterator

from smolquant.report.measures import (
    DECODING,
    PERPLEXITY,
    PERPLEXITY_INCREASE,
    TOP1_AGREEMENT,
    has_quality,
)
from smolquant.report.run_report import RunReport, VariantResult
from smolquant.text import human_size, one_line, percent

_COLUMN_GAP = "  "


def render_closing(result: RunReport) -> str:
    """The table, the verdict, the places and the next command; empty for a run that came to no variant.

    Plain text without a newline at its end. Names from the model's repository are folded to one line.
    """
    if not result.variants:
        return ""
    notes = [(name, text) for name, text in _notes(result) if text]
    width = max(len(name) for name, _ in notes) if notes else 0
    lines = [*_table(result), "", *(f"{name:<{width}}{_COLUMN_GAP}{text}" for name, text in notes)]
    return "\n".join(lines).rstrip()


def _table(result: RunReport) -> Iterator[str]:
    """A row for the original and one for each variant; a column that nothing is known of is left out."""
    variants = result.variants
    rows = [["variant", "size", "perplexity", "same top token", "tokens/s", ""]]
    rows.append(_original(next(iter(variants.values()))))
    rows += [_row(name, one, refused=name in result.refused) for name, one in variants.items()]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        yield _COLUMN_GAP.join(cells).rstrip()


def _original(one: VariantResult) -> list[str]:
    record = one.record
    return [
        "original",
        human_size(record.source.size_bytes),
        PERPLEXITY.source(record.metrics),
        "",
        DECODING.source(record.metrics),
        "",
    ]


def _row(name: str, one: VariantResult, *, refused: bool) -> list[str]:
    record = one.record
    remark = "above its limit" if refused else "up to date" if one.up_to_date else ""
    return [
        name,
        f"{human_size(record.size_bytes)} ({percent(record.ratio)})",
        PERPLEXITY_INCREASE.variant(record.metrics),
        TOP1_AGREEMENT.variant(record.metrics),
        DECODING.variant(record.metrics),
        remark,
    ]


def _notes(result: RunReport) -> Iterator[tuple[str, str]]:
    """What stands below the table, each with its name; an empty text is left out."""
    yield "not measured", one_line(result.unmeasured)
    yield "limits", _verdict(result)
    yield result.outcome, _place(result)
    yield "commit", result.commit_sha or ""
    yield "tag", result.tag or ""
    yield "branches", ", ".join(result.branches)
    yield "trackio", result.trackio_url or result.trackio_command or ""
    yield "files", ", ".join(map(str, result.files))
    yield "next", _next_step(result)


def _verdict(result: RunReport) -> str:
    if result.refused:
        return "; ".join(f"{name} fails" for name in result.refused)
    if result.error is not None:
        return ""
    if result.verdict:
        return f"kept: {result.verdict}"
    measured = any(
        one.record.metrics and has_quality(one.record.metrics) for one in result.variants.values()
    )
    return "none were set; --max-perplexity-increase 5 would set one" if measured else ""


def _place(result: RunReport) -> str:
    """Where the variants are; empty where the run failed, whose error tells it."""
    if result.error is not None:
        return ""
    if result.save_only:
        return ", ".join(str(result.output_dir / name) for name in result.variants)
    return result.pull_request_url or result.repo_url or ""


def _next_step(result: RunReport) -> str:
    """The one command to go on with; an error has its own."""
    if result.error is not None:
        return ""
    if result.outcome == "proposed":
        return f"review and merge {result.pull_request_url}"
    place = str(result.output_dir) if result.save_only else result.repo_id or result.model
    return shlex.join(["smolquant", "chat", place, "--variant", next(iter(result.variants))])
