"""Which variants of a run may go out, and what its owner can do about those that may not.

The numbers are held against the limits in :mod:`smolquant.evaluate.gate`; here is what follows for the run.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from smolquant.errors import CannotMeasure, GateError, MachineError, Unmeasured
from smolquant.evaluate.gate import Breach, check_plausible, judge, verdict
from smolquant.record import TensorRecord, VariantRecord
from smolquant.report.console import Console
from smolquant.report.run_report import RunReport
from smolquant.settings import Settings
from smolquant.text import human_size, percent

_IN_A_LAYER = re.compile(r"(?:^|\.)([a-z_]+\.\d+\..+)\.weight$")
"""The part of a weight's name that is its module's whatever stands in front of the layers."""


@contextmanager
def where_possible(
    variants: Collection[str], settings: Settings, console: Console, report: RunReport
) -> Iterator[None]:
    """Go on without measuring ``variants`` where that cannot be done.

    Raises:
        MachineError, CannotMeasure: measuring was demanded.
        Unmeasured: there are limits, so that nothing that the run makes could go out.
    """
    try:
        yield
    except (MachineError, CannotMeasure) as reason:
        if settings.evaluate == "always":
            raise
        names = ", ".join(variants)
        report.unmeasured = f"{names}. {reason}"
        breaches = judge(dict.fromkeys(variants), settings.gate)
        some_may_pass = len(_by_variant(breaches)) < len(variants)
        if breaches and not (settings.allow_partial and some_may_pass):
            complaints = "; ".join(_by_variant(breaches).values())
            raise Unmeasured(
                f"This run {_does(settings)} nothing. {complaints}: {reason.message}",
                hint=reason.hint,
            ) from reason
        console.notice(f"Not measured: {names}", str(reason))


def hold_against_limits(report: RunReport, settings: Settings) -> None:
    """Note which of the variants known so far are refused, and what the others were held against.

    Raises:
        GateError: the numbers of one are worse than any rounding explains.
    """
    measured = {variant: one.record.metrics for variant, one in report.variants.items()}
    for variant, one in report.variants.items():
        if one.record.metrics is not None and not one.up_to_date:
            check_plausible(variant, one.record.metrics)
    report.refused = _by_variant(judge(measured, settings.gate))
    passing = {name: one for name, one in measured.items() if name not in report.refused}
    report.verdict = verdict(passing, settings.gate)


def require_passing(
    report: RunReport, settings: Settings, *, to_come: Collection[str] = ()
) -> None:
    """End the run where a variant is refused, and the others may not go out without it or are none.

    Args:
        to_come: what is still to be made.

    Raises:
        GateError: see :func:`refusal`.
    """
    if report.refused and not (settings.allow_partial and (to_come or _passing(report))):
        raise refusal(report, settings)


def refusal(report: RunReport, settings: Settings) -> GateError:
    """The error that ends a run with refused variants: the numbers, what went out, and what may help."""
    sentences = [f"{'; '.join(report.refused.values())}."]
    if any(report.variants[variant].record.metrics is None for variant in report.refused):
        sentences += [f"Not measured: {report.unmeasured}"] if report.unmeasured else []
    if report.changed:
        out = " and ".join(_passing(report))
        tag = f"; {settings.tag} was not tagged" if settings.tag else ""
        done = "saved" if settings.save_only else "published"
        sentences.append(f"Only {out}, within the limits, was {done}{tag}.")
    else:
        sentences.append(f"This run {_does(settings)} nothing.")
    return GateError(
        " ".join([*sentences, *_kept(report, settings)]), hint=_remedies(report, settings)
    )


def _passing(report: RunReport) -> list[str]:
    """The variants that would be new in the target, and may go there."""
    return [
        variant
        for variant, one in report.variants.items()
        if variant not in report.refused and not one.up_to_date
    ]


def _by_variant(breaches: Sequence[Breach]) -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    for breach in breaches:
        texts.setdefault(breach.variant, []).append(breach.text)
    return {variant: f"{variant}: {', and '.join(all_)}" for variant, all_ in texts.items()}


def _does(settings: Settings) -> str:
    return "saves" if settings.save_only else "publishes"


def _kept(report: RunReport, settings: Settings) -> Iterator[str]:
    """What becomes of the variants that do not go out, in sentences."""
    refused = {variant: report.variants[variant] for variant in report.refused}
    stay = refused if report.changed else report.variants
    if made := [f"{variant}/" for variant in stay if report.variants[variant].folder]:
        yield (
            f"What was made stays in {settings.output_dir} ({', '.join(made)}), and another try with "
            "other limits measures nothing again."
        )
    there = [variant for variant, one in refused.items() if one.up_to_date]
    if there:
        how = "saved" if settings.save_only else "published"
        yield f"The {' and '.join(there)} that is {how} already stays as it is."
    if lost := [variant for variant, one in refused.items() if not (one.folder or one.up_to_date)]:
        yield f"The {' and '.join(lost)} that was saved before stays, in place of what was made now."


def _remedies(report: RunReport, settings: Settings) -> str:
    """What may help, the most promising first, with the numbers that are known."""
    sentences = []
    for variant in report.refused:
        record = report.variants[variant].record
        scheme = settings.scheme(record.quant_type)
        ways = [*scheme.gentler(settings.group_size), *_keeping_the_worst(record)]
        if record.metrics is not None and ways:
            sentences.append(f"For {variant}, in order of promise: {', '.join(ways)}.")
    measured = {variant: report.variants[variant].record.metrics for variant in report.refused}
    passes = [
        f"{breach.option} {breach.passes_from} for {breach.variant}"
        for breach in judge(measured, settings.gate)
        if breach.passes_from
    ]
    if passes:
        sentences.append(f"If the loss is acceptable, raise the limit: {', '.join(passes)} passes.")
    if (passing := _passing(report)) and not settings.allow_partial:
        does = _does(settings)
        sentences.append(f"--allow-partial {does} {' and '.join(passing)}, within the limits.")
    return " ".join(sentences)


def _keeping_the_worst(record: VariantRecord) -> Iterator[str]:
    """The option that keeps the weight with the largest error in the source precision."""
    candidates: list[tuple[float, str, TensorRecord]] = [
        (tensor.relative_error, found[1], tensor)
        for name, tensor in record.tensors.items()
        if tensor.relative_error and tensor.experts is None and (found := _IN_A_LAYER.search(name))
    ]
    if not candidates:
        return
    error, module, tensor = max(candidates, key=lambda candidate: candidate[0])
    cost = human_size(tensor.source_bytes - tensor.size_bytes)
    yield (
        f"--skip {shlex.quote(re.escape(module))} (its error is the largest, {percent(error)}; keeping it "
        f"costs {cost})"
    )
