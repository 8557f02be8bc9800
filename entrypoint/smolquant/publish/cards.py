"""The model cards: the root's, which is the owner's with our part in it, and the variants' own.

Pure functions of the records, so that the same variants give the same bytes. ``location`` is what a
reader loads from: the Hub id, or the folder that the variants were saved to.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING

from smolquant.hub import valid_repo_id
from smolquant.publish.front_matter import Readme, declared_license
from smolquant.publish.section import BEGIN, END, section
from smolquant.publish.words import name_of, repo_link, sees, tokens_of
from smolquant.record import (
    IMAGE_TEXT_TO_TEXT,
    TEXT_GENERATION,
    Metrics,
    VariantRecord,
)
from smolquant.report import plot
from smolquant.report.exceptions import LEFT_OUT, PlanException, plan_exceptions
from smolquant.report.measures import (
    MEASURES,
    PEAK_MEMORY,
    QUALITY,
    has_quality,
    has_speed,
    loss_of,
    measured_as,
    speed_words,
)
from smolquant.report.snippets import cautions_of, loading, needs
from smolquant.report.templating import environment
from smolquant.schemes import BY_VARIANT
from smolquant.text import Markdown, code_span, escape_markdown, human_size, link, one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_MARKER = re.compile(f"{BEGIN}|{END}")
_STRAY = re.compile(f"^[ \t]*({BEGIN}|{END})[ \t]*(?:\r?\n|$)|({BEGIN}|{END})", re.MULTILINE)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\r\n]*)", re.MULTILINE)
"""A line that begins or ends a block of code (https://spec.commonmark.org/0.31.2/#fenced-code-blocks)."""
_RUN = re.compile(r"^- \*\*Run\*\*: It is recorded \[in Trackio\]\((\S+)\)\.$", re.MULTILINE)
"""The line of a variant's card with the page of its run."""
_TAGS = ("torchao", "smolquant")


def variant_card(
    record: VariantRecord,
    *,
    location: str,
    base_model: str | None,
    terms: Mapping[str, str],
    name: str | None = None,
    tracking_url: str | None = None,
    has_branch: bool = False,
) -> str:
    """The README of one variant's subfolder.

    Args:
        has_branch: whether the repository has a branch of its name with the variant at its root.
        name: what the model is called; None for the last part of ``location``.
        tracking_url: the page of its run in Trackio, without any write token.
        base_model: Hub id of the model that was quantized; None where it is on no Hub.
        terms: the license entries of the front matter, see :func:`declared_license`.
    """
    name = name or name_of(location)
    metrics = record.metrics or Metrics()
    exceptions = plan_exceptions(record.tensors)
    scheme = BY_VARIANT[record.variant]
    return _render(
        "variant.md.j2",
        front=Markdown(_front(record, name, base_model, terms)),
        record=record,
        scheme=scheme,
        name=name,
        base_model=repo_link(base_model),
        ways=loading(scheme, record, location, has_branch=has_branch),
        cautions=cautions_of(scheme, record.tensors),
        needs=needs(scheme, record.tensors),
        sees=sees(record),
        kept=[_exception_row(g) for g in exceptions if not g.quantized and g.fate != LEFT_OUT],
        left_out=[_exception_row(group) for group in exceptions if group.fate == LEFT_OUT],
        regrouped=[_exception_row(group) for group in exceptions if group.quantized],
        groups=_group_sizes(record),
        loss=loss_of(metrics),
        measures=_measure_rows(metrics),
        meanings=[one for one in (*QUALITY, PEAK_MEMORY) if one.variant(metrics)],
        speed=Markdown(speed_words(metrics)),
        tokens=tokens_of(metrics, code_span) if has_quality(metrics) else None,
        measured_as=measured_as(scheme, metrics),
        machine=metrics.machine if has_speed(metrics) else None,
        picture=Markdown(plot.FILE_NAME) if plot.FILE_NAME in record.files else None,
        worst=plot.largest_error(record.tensors),
        run=link("in Trackio", tracking_url) if tracking_url else None,
    )


def card_again(card: str, record: VariantRecord, *, location: str, has_branch: bool) -> str:
    """The README of a variant that is published, rendered again with what only ``card`` itself tells."""
    base_model = Readme.split(card).values().get("base_model")
    run = _RUN.search(card)
    return variant_card(
        record,
        location=location,
        base_model=base_model if isinstance(base_model, str) else None,
        terms=declared_license(card),
        tracking_url=run[1] if run else None,
        has_branch=has_branch,
    )


def _front(
    record: VariantRecord, name: str, base_model: str | None, terms: Mapping[str, str]
) -> str:
    """The front matter of a variant's card."""
    from huggingface_hub import ModelCardData

    metrics = record.metrics or Metrics()
    results = _eval_results(metrics)
    return ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag=IMAGE_TEXT_TO_TEXT if sees(record) else TEXT_GENERATION,
        tags=[*_TAGS, record.quant_type],
        metrics=["perplexity"] if metrics.perplexity is not None else None,
        model_name=f"{name}, {record.variant}" if results else None,
        eval_results=results or None,
        **{key: one_line(term) for key, term in terms.items()},  # type: ignore[arg-type]  # three keys
    ).to_yaml()


def root_card(
    existing: str | None,
    records: Mapping[str, VariantRecord],
    *,
    location: str,
    has_main_model: bool,
    source_identity: str | None,
    name: str | None = None,
    has_picture: bool = True,
    branches: Collection[str] = (),
) -> str:
    """The README at the root: ``existing`` with our part in it put up to date.

    Everything outside our two markers stays. Of the front matter only tags are added; where no main
    model stands at the root, it also names what the variants, then all there is, were made from.

    Args:
        records: every variant in the repository, by subfolder.
        source_identity: the identity of the main model as it is now; variants of another are shown as
            such.
        name: what the model is called, for a new card's title; None for the last part of ``location``.
        has_picture: whether the picture of all variants lies beside the card.
        branches: the variants that have a branch of their own.

    Raises:
        InputError: the front matter of ``existing`` cannot be read.
    """
    readme = Readme.split(
        existing or f"\n# {escape_markdown(name or name_of(location))}\n"
    ).with_tags(_TAGS)
    if not has_main_model:
        sources = {record.source.repo for record in records.values()} - {None, location}
        base_models = sorted(repo for repo in sources if repo and valid_repo_id(repo))
        if base_models:
            readme = readme.with_value("library_name", "transformers")
            readme = readme.with_value("base_model_relation", "quantized")
            only = len(base_models) == 1
            readme = readme.with_value("base_model", base_models[0] if only else base_models)
    ours = section(
        records,
        location=location,
        has_main_model=has_main_model,
        source_identity=source_identity,
        has_picture=has_picture,
        branches=branches,
    )
    body = _place(readme.newline.join(ours.splitlines()), readme.body, readme.newline)
    return Readme(readme.front, body, readme.newline).join()


def without_our_part(existing: str, *, has_main_model: bool) -> str:
    """The README at the root of a repository that has no variant any more.

    Our part and our tags go, and where no main model stands there, the entries that say what the variants
    were made from.

    Raises:
        InputError: the front matter of ``existing`` cannot be read.
    """
    readme = Readme.split(existing).without_tags(_TAGS)
    if not has_main_model and readme.values().get("base_model_relation") == "quantized":
        for key in ("library_name", "base_model_relation", "base_model"):
            readme = readme.without(key)
    first, *rest = _owners_parts(readme.body)
    after = "".join(rest)
    if rest:
        gap = readme.newline * 2 if first.strip() and after.strip() else ""
        end = after.lstrip("\r\n") if after.strip() else readme.newline
        first = f"{first.rstrip()}{gap}{end}"
    return Readme(readme.front, first, readme.newline).join()


def same_owner_text(one: str, other: str) -> bool:
    """Whether two READMEs differ at most in what is ours: the section, the tags, and white space."""
    parts = []
    for readme in map(Readme.split, (one, other)):
        front = {key: value for key, value in readme.values().items() if key != "tags"}
        parts.append((front, "".join(_owners_parts(readme.body)).split()))
    return parts[0] == parts[1]


def _place(ours: str, body: str, newline: str) -> str:
    """Put our part where it was, or at the end.

    A marker without its partner is removed and nothing else: no one knows where our part ended.
    """
    before, *after = _owners_parts(body)
    if after:
        return before + ours + "".join(after)
    gap = newline * 2 if before.strip() else ""
    return f"{before.rstrip()}{gap}{ours}{newline}"


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


def _measure_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Title, variant and source of everything that was measured."""
    return [
        (measure.title, shown, measure.source(metrics))
        for measure in (*QUALITY, PEAK_MEMORY)
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


def _render(template: str, **values: object) -> str:
    return environment("smolquant.publish").get_template(template).render(values)
