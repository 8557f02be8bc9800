"""The model cards: the root's, which is the owner's with our part in it, and the variants' own.

Pure functions of the records, so that the same variants give the same bytes. ``location`` is what a
reader loads from: the Hub id, or the folder that the variants were saved to.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from smolquant import plot
from smolquant.hub import valid_repo_id
from smolquant.publish.front_matter import Readme
from smolquant.record import Metrics, VariantRecord
from smolquant.report.exceptions import PlanException, plan_exceptions
from smolquant.schemes import BY_VARIANT
from smolquant.text import (
    Markdown,
    code_block,
    code_span,
    escape_markdown,
    human_size,
    link,
    one_line,
    percent,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Environment

BEGIN = "<!-- smolquant:begin -->"
END = "<!-- smolquant:end -->"

_SECTION = re.compile(f"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
_STRAY = re.compile(f"^[ \t]*(?:{BEGIN}|{END})[ \t]*(?:\r?\n|$)|{BEGIN}|{END}", re.MULTILINE)
_TAGS = ("torchao", "smolquant")


@dataclass(frozen=True)
class _Measure:
    """A measured quantity: how it reads for a variant, and for the source where that has one."""

    title: str
    of_variant: Callable[[Metrics], float | None]
    of_source: Callable[[Metrics], float | None]
    show: Callable[[float], str]
    hub: tuple[str, str] | None = None
    """Identifier and name in the front matter, of what does not depend on the machine."""


_MEASURES = (
    _Measure(
        "Perplexity",
        lambda m: m.perplexity,
        lambda m: m.source_perplexity,
        "{:.3f}".format,
        hub=("perplexity", "Perplexity"),
    ),
    _Measure(
        "Perplexity increase",
        lambda m: m.perplexity_increase_percent,
        lambda m: None,
        "{:+.2f}%".format,
    ),
    _Measure(
        "Mean KL",
        lambda m: m.mean_kl,
        lambda m: None,
        "{:.4f}".format,
        hub=("kl_divergence", "Mean KL divergence from the original model, nats"),
    ),
    _Measure(
        "Same top token",
        lambda m: m.top1_agreement,
        lambda m: None,
        percent,
        hub=("top1_agreement", "Top-1 agreement with the original model"),
    ),
    _Measure(
        "Tokens/s",
        lambda m: m.tokens_per_second,
        lambda m: m.source_tokens_per_second,
        "{:.1f}".format,
    ),
    _Measure(
        "Prompt tokens/s",
        lambda m: m.prefill_tokens_per_second,
        lambda m: m.source_prefill_tokens_per_second,
        "{:.1f}".format,
    ),
    _Measure(
        "Peak memory",
        lambda m: m.peak_memory_bytes,
        lambda m: m.source_peak_memory_bytes,
        lambda n_bytes: human_size(int(n_bytes)),
    ),
)


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
    measured = record.metrics is not None and record.metrics.perplexity is not None
    results = _eval_results(record.metrics)
    front = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, record.quant_type],
        metrics=["perplexity"] if measured else None,
        model_name=f"{name}, {record.variant}" if results else None,
        eval_results=results or None,
        **terms,  # type: ignore[arg-type]  # three keys, all of them texts
    )
    exceptions = plan_exceptions(record.tensors)
    return _render(
        "variant.md.j2",
        front=Markdown(front.to_yaml()),
        record=record,
        scheme=BY_VARIANT[record.variant],
        name=name,
        base_model=_repo_link(base_model),
        snippets=_snippets(record.variant, location),
        kept=[_exception_row(group) for group in exceptions if group.fate == "kept"],
        regrouped=[_exception_row(group) for group in exceptions if group.fate != "kept"],
        groups=_group_sizes(record),
        measures=_measure_rows(record.metrics),
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
        source_identity: of the main model as it is now; variants of another are shown as older.

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


def _place(section: str, body: str, newline: str) -> str:
    """Put our part where it was, or at the end.

    A marker without its partner is removed and nothing else: no one knows where our part ended.
    """
    before, *after = _SECTION.split(body)
    before, rest = _STRAY.sub("", before), "".join(_STRAY.sub("", part) for part in after)
    if after:
        return before + section + rest
    gap = newline * 2 if before.strip() else ""
    return f"{before.rstrip()}{gap}{section}{newline}"


def _section(
    records: Mapping[str, VariantRecord],
    location: str,
    has_main_model: bool,
    source_identity: str | None,
) -> str:
    known = [name for name in BY_VARIANT if name in records]
    ordered = known + sorted(set(records) - set(known))
    older = {
        name
        for name, record in records.items()
        if source_identity is not None and record.source.identity != source_identity
    }
    measures = [
        measure
        for measure in _MEASURES
        if any(_cell(measure, record.metrics) for record in records.values())
    ]
    rows = [_variant_row(name, records[name], measures, name in older) for name in ordered]
    of_main = [
        records[name]
        for name in ordered
        if name not in older and records[name].source.repo in (None, location)
    ]
    if has_main_model and of_main:
        rows.insert(0, _main_row(of_main, measures))
    return _render(
        "section.md.j2",
        begin=Markdown(BEGIN),
        end=Markdown(END),
        headers=[
            "Variant", "Type", "Size", "Of the original", "Tensors quantized / kept",
            *(measure.title for measure in measures),
        ],
        rows=rows,
        sources=[_repo_link(repo) for repo in _other_sources(records, location)],
        has_older=bool(older),
        schemes=[(name, BY_VARIANT[name]) for name in known],
        has_main_model=has_main_model,
        main_snippet=_stock_snippet(location, None),
        snippets={name: _snippets(name, location) for name in known},
    )  # fmt: skip


def _other_sources(records: Mapping[str, VariantRecord], location: str) -> list[str]:
    repos = {record.source.repo for record in records.values()}
    return sorted(repo for repo in repos if repo and repo != location)


def _main_row(of_main: list[VariantRecord], measures: list[_Measure]) -> list[Markdown]:
    """The main model, with the size and metrics that its variants were held against."""
    metrics = [record.metrics for record in of_main if record.metrics is not None]
    cells = (
        next((cell for one in metrics if (cell := _shown(measure, measure.of_source(one)))), "")
        for measure in measures
    )
    size = human_size(of_main[0].source.size_bytes)
    return [Markdown(cell) for cell in ("main model", "not quantized", size, "100.0%", "", *cells)]


def _variant_row(
    name: str, record: VariantRecord, measures: list[_Measure], older: bool
) -> list[Markdown]:
    return [
        Markdown(f"[{escape_markdown(name)}]({quote(name)}/README.md){' †' if older else ''}"),
        escape_markdown(record.quant_type),
        Markdown(human_size(record.size_bytes)),
        Markdown(percent(record.ratio) if math.isfinite(record.ratio) else ""),
        Markdown(f"{record.quantized_tensors} / {record.kept_tensors}"),
        *(Markdown(_cell(measure, record.metrics)) for measure in measures),
    ]


def _measure_rows(metrics: Metrics | None) -> list[tuple[str, str, str]]:
    """Of what was measured: title, variant, source."""
    if metrics is None:
        return []
    rows = (
        (measure.title, _cell(measure, metrics), _shown(measure, measure.of_source(metrics)))
        for measure in _MEASURES
    )
    return [row for row in rows if row[1]]


def _eval_results(metrics: Metrics | None) -> list["EvalResult"]:
    """What was measured, for the front matter's ``model-index``.

    Not for ``.eval_results/``, which has succeeded it: that lies at a repository's root, where it would
    speak of the main model, and takes only datasets that the Hub lists as benchmarks.
    Specification: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    from huggingface_hub import EvalResult

    if metrics is None:
        return []
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
        for measure in _MEASURES
        if measure.hub and _cell(measure, metrics)
    ]


def _cell(measure: _Measure, metrics: Metrics | None) -> str:
    return "" if metrics is None else _shown(measure, measure.of_variant(metrics))


def _shown(measure: _Measure, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else measure.show(value)


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


def _snippets(variant: str, location: str) -> list[tuple[str, Markdown]]:
    """Ways to load a variant: what each needs, and code that runs as it stands."""
    if variant != "int4":
        return [("", _stock_snippet(location, variant))]
    where = f"{_literal(location)}, variant={_literal(variant)}"
    return [
        (
            "With smolquant, which packs the weights for this machine:",
            _program(["import smolquant", "", f"model, tokenizer = smolquant.load({where})"]),
        ),
        (
            "With transformers, once smolquant has given torchao's int4 weights a CPU kernel:",
            _stock_snippet(location, variant, first=["import smolquant.torchao"], device="cpu"),
        ),
    ]


def _stock_snippet(
    location: str, subfolder: str | None, first: Iterable[str] = (), device: str = "auto"
) -> Markdown:
    where = _literal(location) + (f", subfolder={_literal(subfolder)}" if subfolder else "")
    return _program(
        [
            *first,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
            f"model = AutoModelForCausalLM.from_pretrained({where}, device_map={_literal(device)})",
        ]
    )


def _program(loading: list[str]) -> Markdown:
    asking = [
        "",
        'prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
    ]
    return code_block("\n".join(loading + asking), "python")


def _literal(text: str) -> str:
    return json.dumps(text)  # JSON's strings are Python's too


def _repo_link(repo: str | None) -> Markdown:
    if repo is None or not valid_repo_id(repo):
        return escape_markdown(repo or "")
    return link(repo, f"https://huggingface.co/{repo}")


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


def _finalize(value: Any) -> Any:
    """What a template prints is escaped, unless it is markdown already."""
    return escape_markdown(value) if type(value) is str else value


def _render(template: str, **values: object) -> str:
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("smolquant.publish"),
        autoescape=False,  # noqa: S701  # this is markdown: _finalize escapes
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    environment.filters["md"] = Markdown
    environment.filters["percent"] = percent
    environment.filters["size"] = human_size
    environment.filters["json"] = json.dumps
    return environment
