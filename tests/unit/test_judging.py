"""Which variants may go out, and what those hear who get one refused."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from smolquant import judging
from smolquant.errors import CannotMeasure, GateError, Unmeasured
from smolquant.record import Metrics, TensorRecord
from smolquant.report.console import Console
from smolquant.report.run_report import RunReport, VariantResult
from smolquant.schemes import SCHEMES, scheme_of
from smolquant.settings import Settings, make_settings
from unit.report_samples import run_result, variant_record

DOCS = Path(__file__).resolve().parents[2] / "docs"


def settings(**options: Any) -> Settings:
    limits = {"max_perplexity_increase": "int8=1,int4=12"}
    return make_settings(model_path="them/tiny", repo_name="you/tiny", **limits | options)


def made(variant: str, increase: float | None, *, up_to_date: bool = False) -> VariantResult:
    metrics = None if increase is None else Metrics(perplexity_increase_percent=increase)
    record = variant_record(variant, metrics)
    worst = TensorRecord(True, 5_000_000, 1_300_000, 64, relative_error=0.1234, kind="linear")
    tensors = {**record.tensors, "model.layers.7.mlp.down_proj.weight": worst}
    folder = None if up_to_date else Path("quantized") / variant
    record = replace(record, tensors=tensors)
    return VariantResult(record, folder, up_to_date=up_to_date)


def judged(
    asked: Settings, variants: dict[str, VariantResult], **changes: Any
) -> tuple[RunReport, GateError | None]:
    report = run_result(variants=variants, **{"changed": False} | changes)
    judging.hold_against_limits(report, asked)
    try:
        judging.require_passing(report, asked)
    except GateError as error:
        return report, error
    return report, None


def test_within_the_limits_nothing_is_refused_and_the_verdict_is_told() -> None:
    report, error = judged(settings(), {"int8": made("int8", 0.5), "int4": made("int4", 11)})
    assert (error, report.refused) == (None, {})
    assert report.verdict.startswith("int8: perplexity changed by 0.5 %")


def test_a_refusal_tells_numbers_what_is_kept_and_the_remedies_in_order() -> None:
    report, error = judged(settings(), {"int8": made("int8", 0.5), "int4": made("int4", 37.148)})
    assert error is not None
    assert error.exit_code == 6
    assert set(report.refused) == {"int4"}
    assert error.message == (
        "int4: perplexity changed by 37.148 %, above --max-perplexity-increase 12 %. "
        "This run publishes nothing. What was made stays in quantized (int8/, int4/), and another try "
        "with other limits measures nothing again."
    )
    remedies = [
        "--int4-method calibrated",
        "--group-size 32 (5 bits a weight instead of 4.25)",
        r"--skip 'layers\.7\.mlp\.down_proj' (its error is the largest, 12.3%; keeping it costs 3.70 MB)",
        "--max-perplexity-increase 37.2 % for int4 passes",
        "--allow-partial publishes int8, within the limits",
    ]
    places = [error.hint.find(remedy) for remedy in remedies]
    assert -1 not in places, error.hint
    assert places == sorted(places)
    pattern = re.search(r"--skip '(.*?)'", error.hint)
    assert pattern
    assert re.search(pattern[1], "model.layers.7.mlp.down_proj")


def test_what_was_tried_already_is_no_remedy() -> None:
    _, error = judged(
        settings(int4_method="calibrated", group_size=32), {"int4": made("int4", 37.0)}
    )
    assert error is not None
    assert "--int4-method" not in error.hint
    assert "--group-size" not in error.hint
    assert "--allow-partial" not in error.hint, "nothing else would go out"
    _, error = judged(
        settings(max_perplexity_increase="1"), {"int8_dynamic": made("int8_dynamic", 3.0)}
    )
    assert error is not None
    assert "--quant-type int8_weight_only" in error.hint


def test_what_calibrating_promises_is_what_was_measured() -> None:
    """docs/quality.md, which `make bench-quality` writes, has the numbers behind the sentence."""
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| int4 \| (?:64|128) \| (search|calibrated) \|.*\| \+(\S+) % \|", page, re.M
    )[:4]
    increase = {name: [float(value) for one, value in rows if one == name] for name, _ in rows}
    ratios = [a / b for a, b in zip(increase["calibrated"], increase["search"], strict=True)]
    assert all(0.2 < ratio < 0.3 for ratio in ratios), ratios
    (calibrated, *_) = scheme_of("int4_weight_only").gentler(128)
    assert "a quarter" in calibrated


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_every_remedy_of_a_scheme_begins_with_an_option(quant_type: str) -> None:
    assert all(one.startswith("--") for one in SCHEMES[quant_type].gentler(128))


def test_partly_means_that_the_others_go_on_while_one_may() -> None:
    asked = settings(allow_partial=True)
    both = {"int8": made("int8", 0.5), "int4": made("int4", 37.0)}
    report, error = judged(asked, both)
    assert error is None, "int8 may go out"
    report.changed = True
    told = judging.refusal(report, settings(allow_partial=True, tag="v1"))
    assert "Only int8, within the limits, was published; v1 was not tagged." in told.message
    assert "stays in quantized (int4/)" in told.message
    assert "--allow-partial" not in told.hint, "it was given"

    worse = {"int8": made("int8", 5.0), "int4": made("int4", 37.0)}
    assert judged(asked, worse)[1] is not None, "nothing may go out"
    there = {"int8": made("int8", 0.5, up_to_date=True), "int4": made("int4", 37.0)}
    assert judged(asked, there)[1] is not None, "nothing new may go out"

    report = run_result(variants={"int4": made("int4", 37.0)}, changed=False)
    judging.hold_against_limits(report, asked)
    judging.require_passing(report, asked, to_come=["int8_weight_only"])


def test_what_stands_in_its_place_already_is_told() -> None:
    published = {"int4": made("int4", 37.0, up_to_date=True)}
    _, error = judged(settings(), published)
    assert error is not None
    assert "The int4 that is published already stays as it is." in error.message
    assert "What was made" not in error.message
    saved_before = {"int4": replace(made("int4", 37.0), folder=None)}
    asked = make_settings(
        model_path="them/tiny", repo_name=None, save_only=True, max_perplexity_increase="1"
    )
    _, error = judged(asked, saved_before)
    assert error is not None
    assert "This run saves nothing." in error.message
    assert "The int4 that was saved before stays" in error.message


def test_where_limits_have_nothing_to_be_held_against_the_reason_is_told() -> None:
    reason = CannotMeasure("It has no tokenizer.", hint="Save one beside it.")
    log = StringIO()

    def measure(asked: Settings, *variants: str) -> RunReport:
        report = run_result()
        with judging.where_possible(variants, asked, Console({}, log), report):
            raise reason
        return report

    only_int8 = {"max_perplexity_increase": "int8=1"}
    with pytest.raises(Unmeasured) as refusal:
        measure(settings(**only_int8), "int8", "int4")
    assert refusal.value.message.endswith("and the variant was not measured: It has no tokenizer.")
    assert refusal.value.hint == "Save one beside it."
    with pytest.raises(Unmeasured):
        measure(settings(**only_int8, allow_partial=True), "int8")
    assert log.getvalue() == "", "one error tells it"

    asked = settings(**only_int8, allow_partial=True)
    report = measure(asked, "int8", "int4")
    assert "Not measured: int8, int4" in log.getvalue()
    report.variants = {"int8": made("int8", None), "int4": made("int4", None)}
    judging.hold_against_limits(report, asked)
    judging.require_passing(report, asked)
    assert set(report.refused) == {"int8"}
    assert "It has no tokenizer." in judging.refusal(report, asked).message
    with pytest.raises(CannotMeasure):
        measure(settings(evaluate="always"), "int8")
