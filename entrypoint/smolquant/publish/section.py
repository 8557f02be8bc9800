"""Our part of the root card: the variants side by side, which one to choose, and how to load each.

A pure function of the records, so that the same variants give the same bytes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from smolquant.publish.words import repo_link, sees, tokens_of
from smolquant.record import Metrics, VariantRecord
from smolquant.report import overview
from smolquant.report.exceptions import counted
from smolquant.report.measures import (
    HEADLINES,
    MEAN_KL,
    PEAK_MEMORY,
    PERPLEXITY,
    TOP1_AGREEMENT,
    Loss,
    Measure,
    any_measured,
    has_quality,
    has_speed,
    loss_numbers,
    loss_of,
    measured_as,
    speed_words,
)
from smolquant.report.snippets import cautions_of, loading, main_model_program, needs
from smolquant.report.templating import environment
from smolquant.schemes import BY_VARIANT, Scheme, in_order
from smolquant.text import Markdown, code_span, escape_markdown, human_size, listed, percent

BEGIN = "<!-- smolquant:begin -->"
END = "<!-- smolquant:end -->"


@dataclass(frozen=True)
class _Variants:
    """All variants of a repository, in the order of its tables."""

    records: Mapping[str, VariantRecord]
    location: str
    branches: Collection[str]
    """Those that have a branch of their own."""
    older: frozenset[str]
    """Those that were made from another source than the main model as it is now."""
    of_main: Sequence[str]
    """Those that were made from the main model; empty where none stands at the root."""

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Of those that were measured."""
        return {name: one.metrics for name, one in self.records.items() if one.metrics is not None}

    @property
    def known(self) -> list[tuple[Scheme, VariantRecord]]:
        """Those that this version has a scheme for."""
        return [(BY_VARIANT[name], one) for name, one in self.records.items() if name in BY_VARIANT]

    def name(self, variant: str) -> Markdown:
        """A variant's name with the link to its own card."""
        return _linked(variant, is_older=variant in self.older)


def _linked(variant: str, *, is_older: bool) -> Markdown:
    mark = " †" if is_older else ""
    return Markdown(f"[{escape_markdown(variant)}]({quote(variant)}/README.md){mark}")


def identity_told(readme: str, records: Mapping[str, VariantRecord]) -> str | None:
    """The identity of the source as it was for a card that is there, told from the card's own marks.

    Args:
        records: the variants that are left of those in the card.

    Returns:
        That of a variant without a mark, empty where each is of another source; None where there are none.
    """
    if not records:
        return None
    unmarked = (one for name, one in records.items() if _linked(name, is_older=True) not in readme)
    of_now = next(unmarked, None)
    return "" if of_now is None else of_now.source.identity


def section(
    records: Mapping[str, VariantRecord],
    *,
    location: str,
    has_main_model: bool,
    source_identity: str | None,
    has_picture: bool,
    branches: Collection[str],
) -> str:
    """Our part of the root card, between its two markers; the arguments are those of ``root_card``."""
    ordered = {name: records[name] for name in in_order(records)}
    older = frozenset(
        name
        for name, record in ordered.items()
        if source_identity is not None and record.source.identity != source_identity
    )
    of_main = [
        name
        for name, record in ordered.items()
        if has_main_model and name not in older and record.source.repo in (None, location)
    ]
    with_branch = [name for name in ordered if name in branches]
    variants = _Variants(ordered, location, with_branch, older, of_main)
    values = _to_choose_by(variants) | _to_load(variants) | _more_numbers(variants)
    return (
        environment("smolquant.publish")
        .get_template("section.md.j2")
        .render(
            begin=Markdown(BEGIN),
            end=Markdown(END),
            has_main_model=has_main_model,
            picture=Markdown(overview.FILE_NAME) if has_picture else None,
            **values,
        )
    )


def _to_choose_by(variants: _Variants) -> dict[str, Any]:
    """What the first half of the section says: how the variants compare, and what each is for."""
    records = variants.records.values()
    any_loss = any(loss_of(one.metrics) is not None for one in records)
    return {
        "sources": [repo_link(repo) for repo in _other_sources(variants)],
        "table": _main_table(variants),
        "meanings": _headlines(variants),
        "measured_on": _by_variant(_texts(variants)),
        "branches": listed([code_span(name) for name in variants.branches]),
        "are_one": len(variants.branches) == 1,
        "sees": any(map(sees, records)),
        "has_older": bool(variants.older),
        "measured_as": [
            (scheme.variant, sentence)
            for scheme, record in variants.known
            if (sentence := measured_as(scheme, record.metrics))
        ],
        "lead": _lead(variants),
        "any_loss": any_loss,
        "advice": [
            (scheme.variant, _advice(scheme, record, tells_loss=any_loss))
            for scheme, record in variants.known
        ],
    }


def _to_load(variants: _Variants) -> dict[str, Any]:
    main = variants.records[variants.of_main[0]] if variants.of_main else None
    return {
        "known": [
            (
                scheme.variant,
                cautions_of(scheme, record.tensors),
                loading(
                    scheme,
                    record,
                    variants.location,
                    has_branch=scheme.variant in variants.branches,
                ),
            )
            for scheme, record in variants.known
        ],
        "main_program": main_model_program(variants.location, main),
    }


def _more_numbers(variants: _Variants) -> dict[str, Any]:
    return {
        "tables": [table for table in (_details(variants), _memory(variants)) if table],
        "more_meanings": [
            one for one in (PERPLEXITY, MEAN_KL) if any_measured(one, variants.metrics.values())
        ],
        "speeds": [
            (name, Markdown(words))
            for name, metrics in variants.metrics.items()
            if (words := speed_words(metrics))
        ],
        "machines": _by_variant(_machines(variants)),
    }


@dataclass(frozen=True)
class _Table:
    headers: list[str]
    rules: list[str]
    rows: list[list[Markdown]]


def _table(headers: Sequence[str], rows: list[list[Markdown]], texts: Sequence[int]) -> _Table:
    """A table whose columns are numbers but for those in ``texts``."""
    rules = [":--" if index in texts else "--:" for index in range(len(headers))]
    return _Table(list(headers), rules, rows)


def _headlines(variants: _Variants) -> list[Measure]:
    return [one for one in HEADLINES if any_measured(one, variants.metrics.values())]


def _main_table(variants: _Variants) -> _Table:
    """What most readers come for, narrow enough for the Hub's page."""
    measures = _headlines(variants)
    rows = []
    if variants.of_main:
        source = variants.records[variants.of_main[0]].source
        cells = ["main model", _unbroken(human_size(source.size_bytes)), *("" for _ in measures)]
        rows.append([Markdown(cell) for cell in (*cells, "losing nothing")])
    for name, record in variants.records.items():
        numbers = (Markdown(one.variant(record.metrics)) for one in measures)
        rows.append([variants.name(name), _size(record), *numbers, _best_for(record)])
    headers = ["Variant", "Size", *(one.title for one in measures), "Best for"]
    return _table(headers, rows, texts=(0, len(headers) - 1))


def _size(record: VariantRecord) -> Markdown:
    ratio = f" ({percent(record.ratio)})" if record.source.size_bytes else ""
    return _unbroken(f"{human_size(record.size_bytes)}{ratio}")


def _best_for(record: VariantRecord) -> Markdown:
    scheme = BY_VARIANT.get(record.variant)
    if scheme is None:
        return Markdown("")
    warning = "**lost much**; " if loss_of(record.metrics) is Loss.MUCH else ""
    return Markdown(f"{warning}{escape_markdown(scheme.best_for)}")


def _details(variants: _Variants) -> _Table:
    """What was stored, and the numbers that few ask for."""
    measures = [
        one for one in (PERPLEXITY, MEAN_KL) if any_measured(one, variants.metrics.values())
    ]
    rows = [
        [
            variants.name(name),
            escape_markdown(record.quant_type),
            Markdown(counted(record.counts)),
            *(_unbroken(one.beside_source(record.metrics)) for one in measures),
        ]
        for name, record in variants.records.items()
    ]
    headers = ["Variant", "Type", "Tensors quantized / kept", *(one.title for one in measures)]
    return _table(headers, rows, texts=(0, 1))


def _memory(variants: _Variants) -> _Table | None:
    rows = [
        [variants.name(name), _unbroken(shown)]
        for name, metrics in variants.metrics.items()
        if (shown := PEAK_MEMORY.beside_source(metrics))
    ]
    return _table(["Variant", PEAK_MEMORY.title], rows, texts=(0,)) if rows else None


def _unbroken(cell: str) -> Markdown:
    return Markdown(cell.replace(" ", "\u00a0"))


def _other_sources(variants: _Variants) -> list[str]:
    repos = {record.source.repo for record in variants.records.values()}
    return sorted(repo for repo in repos if repo and repo != variants.location)


def _lead(variants: _Variants) -> Markdown:
    """Which variant is the smallest, and which the closest; empty where there are no two to compare."""
    sizes = {name: -one.size_bytes for name, one in variants.records.items() if one.size_bytes}
    smallest, closest = _first(sizes), _closest(variants)
    if not smallest:
        return Markdown("")
    if not closest:
        return Markdown(f"{_bold(smallest)} {_is(smallest)} the smallest.")
    if smallest == closest:
        return Markdown(f"{_bold(smallest)} is both the smallest and the closest to the original.")
    all_measured = _shares(variants).keys() == variants.records.keys()
    of_those = "" if all_measured else " of those that were measured"
    return Markdown(
        f"{_bold(smallest)} {_is(smallest)} the smallest, and {_bold(closest)} the closest to the "
        f"original{of_those}."
    )


def _closest(variants: _Variants) -> list[str]:
    """The variants that say most often what the original would; only what is measured alike compares."""
    shares = _shares(variants)
    alike = {_conditions(variants.metrics[name]) for name in shares}
    return _first(shares) if len(alike) == 1 else []


def _shares(variants: _Variants) -> dict[str, float]:
    values = {name: TOP1_AGREEMENT.value(one) for name, one in variants.metrics.items()}
    return {name: value for name, value in values.items() if value is not None}


def _first(values: Mapping[str, float]) -> list[str]:
    """The variants with the largest value; none where there are no two to compare, or all have it."""
    best = max(values.values(), default=0.0)
    names = [name for name, value in values.items() if value == best]
    return names if len(names) < len(values) else []


def _conditions(metrics: Metrics) -> tuple[object, ...]:
    """What must be alike for two numbers to be compared; what a text is called must not."""
    return metrics.text_sha256 or metrics.text, metrics.tokens


def _bold(names: Sequence[str]) -> Markdown:
    return listed([Markdown(f"**{escape_markdown(name)}**") for name in names])


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _advice(scheme: Scheme, record: VariantRecord, *, tells_loss: bool) -> Markdown:
    """What to expect of a variant, by what was measured, and what it is for."""
    loss, use = loss_of(record.metrics), escape_markdown(scheme.best_for)
    sentences = [f"has {escape_markdown(scheme.title)}."]
    if loss is not None:
        sentences.append(f"It {loss.words} ({loss_numbers(record.metrics)}).")
    elif tells_loss:
        sentences.append("It was not measured, so how much it lost is not known.")
    sentences.append(_USE[loss].format(use=use))
    sentences.append(f"To load it, you need {escape_markdown(needs(scheme, record.tensors))}.")
    return Markdown(" ".join(sentences))


_USE: dict[Loss | None, str] = {
    None: "It is meant for {use}.",
    Loss.NOTHING: "Choose it for {use}.",
    Loss.LITTLE: "Choose it for {use}.",
    Loss.SOME: "Choose it for {use}, and compare its answers with the original's in your own task.",
    Loss.MUCH: "It is meant for {use}; do not rely on it before you have compared its answers with the "
    "original's in your own task.",
}


def _texts(variants: _Variants) -> dict[str, Markdown]:
    """Variant -> the tokens that its quality was measured on."""
    quality = {name: one for name, one in variants.metrics.items() if has_quality(one)}
    digests = {(one.text, one.text_sha256) for one in quality.values()}
    names = {one.text for one in quality.values()}
    # Escaped, not as code: a span of code keeps what it holds, and that may be our own marker.
    return {
        name: tokens_of(one, escape_markdown, with_digest=len(digests) > len(names))
        for name, one in quality.items()
    }


def _machines(variants: _Variants) -> dict[str, Markdown]:
    """Variant -> the machine that its speed and memory were measured on."""
    return {
        name: escape_markdown(one.machine or "an unnamed machine")
        for name, one in variants.metrics.items()
        if has_speed(one)
    }


def _by_variant(values: Mapping[str, Markdown]) -> Markdown:
    """The value that all have, or ``this (int8) and that (int4)``."""
    variants: dict[Markdown, list[Markdown]] = {}
    for name, value in values.items():
        variants.setdefault(value, []).append(escape_markdown(name))
    if len(variants) <= 1:
        return next(iter(variants), Markdown(""))
    return listed([Markdown(f"{value} ({listed(names)})") for value, names in variants.items()])
