"""The job summary: what happened, with links, sizes, and everything needed to use or repeat it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolquant.record import Counts, Metrics, TensorRecord
from smolquant.report.chart import share_chart
from smolquant.report.embeddings import embedding_bytes
from smolquant.report.exceptions import PlanException, counted, plan_exceptions
from smolquant.report.measures import (
    HEADLINES,
    MEAN_KL,
    PEAK_MEMORY,
    PERPLEXITY,
    TOP1_AGREEMENT,
    any_measured,
    measured_as,
    speed_words,
)
from smolquant.report.remedies import workflow_change
from smolquant.report.run_report import RunReport, VariantResult
from smolquant.report.snippets import cautions, folder_location, loading_code, needs
from smolquant.report.templating import environment
from smolquant.schemes import BY_VARIANT
from smolquant.text import (
    Markdown,
    code_block,
    code_span,
    escape_markdown,
    human_duration,
    human_size,
    link,
    listed,
    percent,
)

_MAX_NAMES = 40
"""Folded names shown for one reason; models in the wild need fewer than ten."""


@dataclass(frozen=True)
class _Row:
    """A line of the table: a variant that was made, found or only planned."""

    name: Markdown
    source_bytes: int
    size_bytes: int
    tensors: Mapping[str, TensorRecord]
    seconds: float | None = None
    up_to_date: bool = False
    metrics: Metrics | None = None

    @property
    def counts(self) -> str:
        return counted(Counts.of(self.tensors))


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[_Row], str]
    numeric: bool = True


def render_summary(result: RunReport) -> str:
    """The summary as GitHub markdown. Pure; names from the model's repository are escaped.

    A failed run may hold anything from nothing at all to every variant.
    """
    rows = _rows(result)
    passed = [
        name
        for name, variant in result.variants.items()
        if not (variant.up_to_date or name in result.refused)
    ]
    made = [name for name, variant in result.variants.items() if not variant.up_to_date]
    found = [name for name, variant in result.variants.items() if variant.up_to_date]
    kept = found if made or result.changed else []  # the heading has them
    failure = result.failure
    template = environment("smolquant.report").get_template("summary.md.j2")
    return template.render(
        result=result,
        failure=failure,
        remedy=code_block(failure.code, "python") if failure and failure.code else None,
        table=_table(_columns(rows), rows),
        details=_table(_details(rows), rows),
        meanings=[
            one for one in HEADLINES if any_measured(one, (row.metrics for row in rows.values()))
        ],
        speeds=[
            (code_span(name), Markdown(words))
            for name, row in rows.items()
            if (words := speed_words(row.metrics))
        ],
        chart=_chart(rows),
        change=_change(result),
        tag=code_span(result.tag or ""),
        branches=listed([link(code_span(name), url) for name, url in result.branches.items()]),
        embeddings=_embeddings(rows),
        made=_listed_names(made),
        made_and_passed=_listed_names(passed),
        passed=len(passed),
        refused=_listed_names(list(result.refused)),
        kept=kept,
        up_to_date=_listed_names(kept),
        all_variants=_listed_names(list(rows)),
        place=link(code_span(result.repo_id or result.model), result.repo_url),
        commit=_commit(result),
        cautions=[
            (_listed_names(names), sentence)
            for names, sentence in cautions(
                (BY_VARIANT[n], row.tensors) for n, row in rows.items() if n in BY_VARIANT
            )
        ],
        measured_as=_measured_as(rows),
        loading=_loading(result),
        exceptions=_exceptions(rows),
        has_left_out=any(Counts.of(row.tensors).dropped for row in rows.values()),
        versions=Markdown(" · ".join(code_span(f"{k} {v}") for k, v in result.versions.items())),
        command=code_block(result.command, "sh") if result.command else None,
        trackio=code_block(result.trackio_command, "sh") if result.trackio_command else None,
    )


def _rows(result: RunReport) -> dict[str, _Row]:
    planned = {
        name: _Row(
            name=code_span(name),
            source_bytes=sum(tensor.source_bytes for tensor in plan.tensors.values()),
            size_bytes=plan.predicted_bytes,
            tensors=plan.tensors,
        )
        for name, plan in result.planned.items()
    }
    return planned | {
        name: _made_row(name, made, refused=name in result.refused)
        for name, made in result.variants.items()
    }


def _made_row(name: str, made: VariantResult, *, refused: bool) -> _Row:
    name_cell = link(code_span(name), made.url)
    return _Row(
        name=Markdown(f"❌ {name_cell}") if refused else name_cell,
        source_bytes=made.record.source.size_bytes,
        size_bytes=made.record.size_bytes,
        tensors=made.record.tensors,
        seconds=made.seconds,
        up_to_date=made.up_to_date,
        metrics=made.record.metrics,
    )


def _columns(rows: Mapping[str, _Row]) -> list[_Column]:
    """Of the table that all see; it fits the width of a job summary."""
    columns = [
        _Column("Variant", lambda row: row.name, numeric=False),
        _Column("Size", lambda row: f"{human_size(row.size_bytes)}{_ratio(row)}"),
        *(
            _Column(one.title, lambda row, one=one: one.variant(row.metrics))  # type: ignore[misc]
            for one in HEADLINES
            if any_measured(one, (row.metrics for row in rows.values()))
        ),
    ]
    if any(row.seconds is not None or row.up_to_date for row in rows.values()):
        columns.append(_Column("Time", _time))
    return columns


def _details(rows: Mapping[str, _Row]) -> list[_Column]:
    """Of the table below, for who wants to know more."""
    return [
        _Column("Variant", lambda row: row.name, numeric=False),
        _Column("Before", lambda row: human_size(row.source_bytes)),
        _Column("Quantized / kept", lambda row: row.counts),
        *(
            _Column(one.title, lambda row, one=one: one.beside_source(row.metrics))  # type: ignore[misc]
            for one in (PERPLEXITY, MEAN_KL, PEAK_MEMORY)
            if any_measured(one, (row.metrics for row in rows.values()))
        ),
    ]


def _ratio(row: _Row) -> str:
    return f" ({percent(row.size_bytes / row.source_bytes)})" if row.source_bytes else ""


def _time(row: _Row) -> str:
    if row.up_to_date:
        return "up to date"
    return "" if row.seconds is None else human_duration(row.seconds)


def _chart(rows: Mapping[str, _Row]) -> Markdown | None:
    """The table's two questions at a glance: how much smaller, and how often it says the same."""
    shown = {name: row for name, row in rows.items() if row.source_bytes}
    if not shown:
        return None
    shares = {name: TOP1_AGREEMENT.value(row.metrics) for name, row in shown.items()}
    known = [share for share in shares.values() if share is not None]
    is_measured = len(known) == len(shown)
    labels = [f"original, {human_size(max(row.source_bytes for row in shown.values()))}"]
    for name, row in shown.items():
        number = TOP1_AGREEMENT.variant(row.metrics)
        labels.append(", ".join(filter(None, (name, human_size(row.size_bytes), number))))
    line = ", the line how often the first choice is the same" if is_measured else ""
    return share_chart(
        f"Bars show the size{line} (in %)",
        labels,
        [100.0, *(100 * row.size_bytes / row.source_bytes for row in shown.values())],
        [100.0, *(100 * share for share in known)] if is_measured else None,
    )


def _table(columns: Sequence[_Column], rows: Mapping[str, _Row]) -> dict[str, Any]:
    return {
        "headers": [escape_markdown(column.header) for column in columns],
        "rules": ["--:" if column.numeric else ":--" for column in columns],
        "rows": [[_unbroken(column.cell(row)) for column in columns] for row in rows.values()],
    }


def _change(result: RunReport) -> Markdown:
    """What to change in the workflow file after a failure."""
    if result.failure is None:
        return Markdown("")
    measured = {name: made.record.metrics for name, made in result.variants.items()}
    return workflow_change(result.failure, measured)


def _embeddings(rows: Mapping[str, _Row]) -> Markdown:
    """Their share of each variant that has any: 34.6% of int8 and 48.9% of int4."""
    return listed(
        [
            Markdown(f"{percent(kept / row.size_bytes)} of {code_span(name)}")
            for name, row in rows.items()
            if row.size_bytes and (kept := embedding_bytes(row.tensors))
        ]
    )


def _measured_as(rows: Mapping[str, _Row]) -> list[tuple[Markdown, str]]:
    """The variants that could not be measured as they will run, each with how they were."""
    return [
        (code_span(name), sentence)
        for name, row in rows.items()
        if (sentence := measured_as(BY_VARIANT.get(name), row.metrics))
    ]


def _commit(result: RunReport) -> Markdown | None:
    if result.commit_sha is None:
        return None
    url = f"{result.repo_url}/commit/{result.commit_sha}" if result.repo_url else None
    return link(code_span(result.commit_sha[:8]), url)


def _loading(result: RunReport) -> list[tuple[Markdown, Markdown]]:
    """What each loadable variant needs, and the code that loads it."""
    if result.outcome in ("failed", "planned"):
        return []
    where = (
        folder_location(result.output_dir) if result.save_only else result.repo_id or result.model
    )
    return [
        (
            Markdown(
                f"{code_span(name)} needs {escape_markdown(needs(BY_VARIANT[name], made.record.tensors))}:"
            ),
            loading_code(BY_VARIANT[name], made.record, where),
        )
        for name, made in result.variants.items()
    ]


def _exceptions(rows: Mapping[str, _Row]) -> list[tuple[Markdown, list[list[Markdown]]]]:
    """Tables of (fate, reason, names, size), one for all variants whose exceptions are the same."""
    alike: list[tuple[list[str], list[PlanException]]] = []
    for name, row in rows.items():
        groups = plan_exceptions(row.tensors)
        for names, known in alike:
            if known == groups:
                names.append(name)
                break
        else:
            if groups:
                alike.append(([name], groups))
    return [
        (_listed_names(names), [_exception_cells(group) for group in groups])
        for names, groups in alike
    ]


def _exception_cells(group: PlanException) -> list[Markdown]:
    shown = [
        code_span(name) + (f"\u00a0×{count}" if count > 1 else "")
        for name, count in group.names[:_MAX_NAMES]
    ]
    if len(group.names) > _MAX_NAMES:
        shown.append(f"and {len(group.names) - _MAX_NAMES} more")
    return [
        escape_markdown(group.fate),
        escape_markdown(group.reason),
        Markdown("<br>".join(shown)),
        _unbroken(human_size(group.size_bytes)),
    ]


def _unbroken(cell: str) -> Markdown:
    """A cell whose numbers and units stay on one line; only a remark in brackets may wrap."""
    return Markdown(cell.replace(" ", "\u00a0").replace("\u00a0(", " ("))


def _listed_names(names: Sequence[str]) -> Markdown:
    return listed([code_span(name) for name in names])
