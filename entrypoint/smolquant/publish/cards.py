"""The model cards: the root's, which is the owner's with our part in it, and the variants' own.

Pure functions of the records, so that the same variants give the same bytes. ``location`` is what a
reader loads from: the Hub id, or the folder that the variants were saved to.
"""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING
from urllib.parse import quote

from smolquant.hub import valid_repo_id
from smolquant.publish.front_matter import Readme
from smolquant.record import (
    IMAGE_TEXT_TO_TEXT,
    TEXT_GENERATION,
    Metrics,
    SourceRecord,
    VariantRecord,
)
from smolquant.report import plot
from smolquant.report.exceptions import LEFT_OUT, PlanException, counted, plan_exceptions
from smolquant.report.measures import MEASURES, Measure, has_quality, has_speed, measured_as
from smolquant.report.snippets import cautions, cautions_of, loading, main_model_program, needs
from smolquant.report.templating import environment
from smolquant.schemes import BY_VARIANT
from smolquant.text import (
    Markdown,
    code_span,
    escape_markdown,
    human_size,
    link,
    listed,
    one_line,
    percent,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

BEGIN = "<!-- smolquant:begin -->"
END = "<!-- smolquant:end -->"

_MARKER = re.compile(f"{BEGIN}|{END}")
_STRAY = re.compile(f"^[ \t]*({BEGIN}|{END})[ \t]*(?:\r?\n|$)|({BEGIN}|{END})", re.MULTILINE)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\r\n]*)", re.MULTILINE)
"""A line that begins or ends a block of code (https://spec.commonmark.org/0.31.2/#fenced-code-blocks)."""
_TAGS = ("torchao", "smolquant")


def variant_card(
    record: VariantRecord,
    *,
    location: str,
    base_model: str | None,
    terms: Mapping[str, str],
    tracking_url: str | None = None,
) -> str:
    """The README of one variant's subfolder.

    Args:
        tracking_url: the page of its run in Trackio, without any write token.
        base_model: Hub id of the model that was quantized; None where it is on no Hub.
        terms: the license entries of the front matter, see :func:`declared_license`.
    """
    from huggingface_hub import ModelCardData

    name = _name(location)
    metrics = record.metrics or Metrics()
    results = _eval_results(metrics)
    front = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag=IMAGE_TEXT_TO_TEXT if _sees(record) else TEXT_GENERATION,
        tags=[*_TAGS, record.quant_type],
        metrics=["perplexity"] if metrics.perplexity is not None else None,
        model_name=f"{name}, {record.variant}" if results else None,
        eval_results=results or None,
        **{key: one_line(term) for key, term in terms.items()},  # type: ignore[arg-type]  # three keys
    )
    exceptions = plan_exceptions(record.tensors)
    scheme = BY_VARIANT[record.variant]
    return _render(
        "variant.md.j2",
        front=Markdown(front.to_yaml()),
        record=record,
        scheme=scheme,
        name=name,
        base_model=_repo_link(base_model),
        loading=loading(scheme, location, record.task, record.tensors),
        cautions=cautions_of(scheme, record.tensors),
        needs=needs(scheme, record.tensors),
        sees=_sees(record),
        kept=[_exception_row(g) for g in exceptions if not g.quantized and g.fate != LEFT_OUT],
        left_out=[_exception_row(group) for group in exceptions if group.fate == LEFT_OUT],
        regrouped=[_exception_row(group) for group in exceptions if group.quantized],
        groups=_group_sizes(record),
        measures=_measure_rows(metrics),
        tokens=_tokens_of(metrics, code_span) if has_quality(metrics) else None,
        measured_as=measured_as(scheme, metrics),
        machine=metrics.machine if has_speed(metrics) else None,
        picture=Markdown(plot.FILE_NAME) if plot.FILE_NAME in record.files else None,
        worst=plot.largest_error(record.tensors),
        run=link("in Trackio", tracking_url) if tracking_url else None,
    )


def root_card(
    existing: str | None,
    records: Mapping[str, VariantRecord],
    *,
    location: str,
    has_main_model: bool,
    source_identity: str | None,
) -> str:
    """The README at the root: ``existing`` with our part in it put up to date.

    Everything outside our two markers stays. Of the front matter only tags are added; where no main
    model stands at the root, it also names what the variants, then all there is, were made from.

    Args:
        records: every variant in the repository, by subfolder.
        source_identity: the identity of the main model as it is now; variants of another are shown as
            such.

    Raises:
        InputError: the front matter of ``existing`` cannot be read.
    """
    readme = Readme.split(existing or f"\n# {escape_markdown(_name(location))}\n").with_tags(_TAGS)
    if not has_main_model:
        sources = {record.source.repo for record in records.values()} - {None, location}
        base_models = sorted(repo for repo in sources if repo and valid_repo_id(repo))
        if base_models:
            readme = readme.with_value("library_name", "transformers")
            readme = readme.with_value("base_model_relation", "quantized")
            only = len(base_models) == 1
            readme = readme.with_value("base_model", base_models[0] if only else base_models)
    section = _section(records, location, has_main_model, source_identity)
    section = readme.newline.join(section.splitlines())
    body = _place(section, readme.body, readme.newline)
    return Readme(readme.front, body, readme.newline).join()


def same_owner_text(one: str, other: str) -> bool:
    """Whether two READMEs differ at most in what is ours: the section, the tags, and white space."""
    parts = []
    for readme in map(Readme.split, (one, other)):
        front = {key: value for key, value in readme.values().items() if key != "tags"}
        parts.append((front, "".join(_owners_parts(readme.body)).split()))
    return parts[0] == parts[1]


def _place(section: str, body: str, newline: str) -> str:
    """Put our part where it was, or at the end.

    A marker without its partner is removed and nothing else: no one knows where our part ended.
    """
    before, *after = _owners_parts(body)
    if after:
        return before + section + "".join(after)
    gap = newline * 2 if before.strip() else ""
    return f"{before.rstrip()}{gap}{section}{newline}"


def _owners_parts(body: str) -> list[str]:
    """The owner's text before, between and after our parts, without markers that have no partner.

    Markers in a block of code are the owner's, who writes about them.
    """
    code = _code_blocks(body)
    # A block that its owner forgot to end reaches into our part, whose own code then ends it.
    ours = [
        (begin.start(), end.end())
        for begin, end in pairwise(_MARKER.finditer(body))
        if (begin[0], end[0]) == (BEGIN, END) and not _within(code, end.span())
    ]
    strays = [
        stray.span()
        for stray in _STRAY.finditer(body)
        if not any(_within(spans, stray.span(stray.lastindex or 0)) for spans in (code, ours))
    ]
    parts, at, part_of_us = [""], 0, set(ours)
    for start, end in sorted(ours + strays):
        parts[-1] += body[at:start]
        at = end
        if (start, end) in part_of_us:
            parts.append("")
    parts[-1] += body[at:]
    return parts


def _code_blocks(body: str) -> list[tuple[int, int]]:
    """Where fenced blocks of code begin and end; what nothing ends is not one."""
    blocks, opening = list[tuple[int, int]](), None
    for line in _FENCE.finditer(body):
        fence, rest = line[1], line[2]
        if opening is None:
            opening = None if fence[0] == "`" and "`" in rest else line
        elif fence.startswith(opening[1]) and not rest.strip():
            blocks.append((opening.start(), line.end()))
            opening = None
    return blocks


def _within(spans: Sequence[tuple[int, int]], part: tuple[int, int]) -> bool:
    """Whether one of ``spans``, which are in order and apart, holds all of ``part``."""
    index = bisect_right(spans, part[0], key=itemgetter(0)) - 1
    return index >= 0 and part[1] <= spans[index][1]


def _section(
    records: Mapping[str, VariantRecord],
    location: str,
    has_main_model: bool,
    source_identity: str | None,
) -> str:
    schemes = [scheme for name, scheme in BY_VARIANT.items() if name in records]
    ordered = [name for name in BY_VARIANT if name in records]
    ordered += sorted(records.keys() - BY_VARIANT.keys())
    older = {
        name
        for name, record in records.items()
        if source_identity is not None and record.source.identity != source_identity
    }
    of_main = [
        name
        for name in ordered
        if has_main_model and name not in older and records[name].source.repo in (None, location)
    ]
    metrics = {name: one for name in ordered if (one := records[name].metrics) is not None}
    columns = {
        measure: _main_number(measure, metrics, of_main)
        for measure in MEASURES
        if any(map(measure.variant, metrics.values()))
    }
    rows = [_variant_row(name, records[name], columns, name in older) for name in ordered]
    if of_main:
        rows.insert(0, _main_row(records[of_main[0]].source, columns.values()))
    return _render(
        "section.md.j2",
        begin=Markdown(BEGIN),
        end=Markdown(END),
        headers=[
            "Variant", "Type", "Size", "Of the original", "Tensors quantized / kept",
            *(measure.title for measure in columns),
        ],
        rows=rows,
        measured_on=_measured_on(metrics),
        has_pairs=_has_pairs(columns, metrics.values()),
        sources=[_repo_link(repo) for repo in _other_sources(records, location)],
        has_older=bool(older),
        known=[
            (scheme, loading(scheme, location, one.task, one.tensors))
            for scheme in schemes
            for one in [records[scheme.variant]]
        ],
        needs={one.variant: needs(one, records[one.variant].tensors) for one in schemes},
        sees=any(map(_sees, records.values())),
        cautions=[
            (listed([escape_markdown(name) for name in names]), sentence)
            for names, sentence in cautions((one, records[one.variant].tensors) for one in schemes)
        ],
        measured_as=[
            (scheme.variant, sentence)
            for scheme in schemes
            if (sentence := measured_as(scheme, metrics.get(scheme.variant)))
        ],
        has_main_model=has_main_model,
        main_program=main_model_program(location, _task_of_main(records, of_main)),
    )  # fmt: skip


def _has_pairs(columns: Mapping[Measure, str], metrics: Iterable[Metrics]) -> bool:
    """Whether a cell of a variant holds the source's number, too."""
    return any(
        measure.beside_source(one) != measure.variant(one)
        for one in metrics
        for measure, main in columns.items()
        if not main
    )


def _other_sources(records: Mapping[str, VariantRecord], location: str) -> list[str]:
    repos = {record.source.repo for record in records.values()}
    return sorted(repo for repo in repos if repo and repo != location)


def _main_row(source: SourceRecord, numbers: Iterable[str]) -> list[Markdown]:
    """The main model, with its numbers in the measured columns."""
    size = human_size(source.size_bytes)
    cells = ("main model", "not quantized", size, percent(1), "", *numbers)
    return [Markdown(cell) for cell in cells]


def _main_number(measure: Measure, metrics: Mapping[str, Metrics], of_main: Collection[str]) -> str:
    """What stands for the main model in the column of ``measure``.

    A number only where every variant in that column was held against it, and under like conditions:
    otherwise unlike things would stand one above the other.

    Args:
        of_main: the variants that were made from it as it is now.
    """
    column = {name: one for name, one in metrics.items() if measure.variant(one)}
    conditions = {_conditions(measure, one) for one in column.values()}
    numbers = {number for one in column.values() if (number := measure.source(one))}
    alike = len(conditions) == 1 and len(numbers) == 1 and column.keys() <= set(of_main)
    return numbers.pop() if alike else ""


def _conditions(measure: Measure, metrics: Metrics) -> tuple[object, ...]:
    """What must be alike for two numbers to be compared."""
    if measure.on_machine:
        return (metrics.machine,)
    return metrics.text, metrics.text_sha256, metrics.tokens


def _variant_row(
    name: str, record: VariantRecord, columns: Mapping[Measure, str], older: bool
) -> list[Markdown]:
    """A variant; in ``columns`` without a number of the main model's, the source's stands here too."""
    cells = (
        measure.variant(record.metrics) if main else measure.beside_source(record.metrics)
        for measure, main in columns.items()
    )
    return [
        Markdown(f"[{escape_markdown(name)}]({quote(name)}/README.md){' †' if older else ''}"),
        escape_markdown(record.quant_type),
        Markdown(human_size(record.size_bytes)),
        Markdown(percent(record.ratio) if math.isfinite(record.ratio) else ""),
        Markdown(counted(record.counts)),
        *map(Markdown, cells),
    ]


def _sees(record: VariantRecord) -> bool:
    """Whether the model answers about pictures."""
    return record.task == IMAGE_TEXT_TO_TEXT


def _task_of_main(records: Mapping[str, VariantRecord], of_main: Sequence[str]) -> str:
    """What the main model is for, which those of its variants tell that were made from it."""
    return records[of_main[0]].task if of_main else TEXT_GENERATION


def _measured_on(metrics: Mapping[str, Metrics]) -> Markdown:
    """Text and machine of the numbers in the table; where there are several, with their variants."""
    quality = {name: one for name, one in metrics.items() if has_quality(one)}
    speed = {name: one for name, one in metrics.items() if has_speed(one)}
    digests = {(one.text, one.text_sha256) for one in quality.values()}
    names = {one.text for one in quality.values()}
    # Escaped, not as code: a span of code keeps what it holds, and that may be our own marker.
    texts = {
        name: _tokens_of(one, escape_markdown, with_digest=len(digests) > len(names))
        for name, one in quality.items()
    }
    machines = {
        name: escape_markdown(one.machine or "an unnamed machine") for name, one in speed.items()
    }
    parts = (("quality on", texts), ("speed and memory on", machines))
    return Markdown("; ".join(f"{what} {_by_variant(of)}" for what, of in parts if of))


def _by_variant(values: Mapping[str, Markdown]) -> Markdown:
    """The value that all have, or ``this (int8) and that (int4)``."""
    variants: dict[Markdown, list[Markdown]] = {}
    for name, value in values.items():
        variants.setdefault(value, []).append(escape_markdown(name))
    if len(variants) == 1:
        return next(iter(variants))
    return listed([Markdown(f"{value} ({listed(names)})") for value, names in variants.items()])


def _tokens_of(
    metrics: Metrics, quoted: Callable[[str], Markdown], *, with_digest: bool = False
) -> Markdown:
    """``4,088 tokens of A Text``; its digest tells it from another text of the same name."""
    count = "" if metrics.tokens is None else f"{metrics.tokens:,} "
    name = quoted(metrics.text or "") or "a text without a name"
    digest = metrics.text_sha256 if with_digest else None
    which = f", sha256 {quoted(digest[:8])}" if digest else ""
    return Markdown(f"{count}tokens of {name}{which}")


def _measure_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Title, variant and source of everything that was measured."""
    return [
        (measure.title, shown, measure.source(metrics))
        for measure in MEASURES
        if (shown := measure.variant(metrics))
    ]


def _eval_results(metrics: Metrics) -> list["EvalResult"]:
    """What was measured, for the front matter's ``model-index``.

    Not for ``.eval_results/``, which has succeeded it: that lies at a repository's root, where it would
    speak of the main model, and takes only datasets that the Hub lists as benchmarks.
    Specification: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type="text",  # on no Hub; so `load_dataset` calls plain text files
            dataset_name=one_line(metrics.text or "") or "text",
            metric_type=measure.hub[0],
            metric_name=measure.hub[1],
            metric_value=measure.of_variant(metrics),
        )
        for measure in MEASURES
        if measure.hub and measure.variant(metrics)
    ]


def _exception_row(group: PlanException) -> list[Markdown]:
    names = (code_span(name) + (f" ×{count}" if count > 1 else "") for name, count in group.names)
    return [
        Markdown("<br>".join(names)),
        escape_markdown(group.reason),
        Markdown(human_size(group.size_bytes)),
    ]


def _group_sizes(record: VariantRecord) -> list[tuple[int, int]]:
    """Group sizes and how many tensors have each, the most used first."""
    sizes = Counter(t.group_size for t in record.tensors.values() if t.quantized and t.group_size)
    return sizes.most_common()


def _repo_link(repo: str | None) -> Markdown:
    if repo is None or not valid_repo_id(repo):
        return escape_markdown(repo or "")
    return link(repo, f"https://huggingface.co/{repo}")


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _render(template: str, **values: object) -> str:
    return environment("smolquant.publish").get_template(template).render(values)
