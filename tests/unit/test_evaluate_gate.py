"""Limits are parsed strictly and judged by their numbers."""

import subprocess
import sys
from dataclasses import replace

import pytest

from smolquant.errors import GateError, InputError
from smolquant.evaluate.gate import (
    LARGEST_PLAUSIBLE_KL,
    Gate,
    check_plausible,
    judge,
    parse_limits,
    verdict,
)
from smolquant.record import Metrics
from smolquant.schemes import BY_VARIANT

GOOD = Metrics(
    perplexity=10.5,
    source_perplexity=10.0,
    perplexity_increase_percent=5.0,
    mean_kl=0.05,
    top1_agreement=0.9,
)
OPTION = "--max-perplexity-increase"


def test_one_number_holds_for_every_variant() -> None:
    assert parse_limits("5", OPTION) == dict.fromkeys(BY_VARIANT, 5.0)


def test_named_limits_hold_for_those_named() -> None:
    assert parse_limits("int8=1, int4=12.5", OPTION) == {"int8": 1.0, "int4": 12.5}


@pytest.mark.fault(
    "input",
    "A limit is no number, negative, or for an unknown variant",
    "Exit 2 with what was given.",
)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "five",
        "-1",
        "nan",
        "inf",
        "1e3",
        "5%",
        "int8=",
        "int8=x",
        "int9=1",
        "int8=1,int8=2",
        "=1",
    ],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_limits(text, OPTION)
    assert OPTION in str(refusal.value)
    assert "int8=1,int4=12" in refusal.value.hint


@pytest.mark.fault(
    "quality",
    "A variant is worse than the owner's limit",
    "Exit 6 with the numbers; nothing is published.",
)
def test_at_the_limit_passes_and_above_it_fails_with_the_numbers() -> None:
    gate = Gate(perplexity_increase={"int4": 5.0})
    assert judge({"int4": GOOD}, gate) == []
    worse = replace(GOOD, perplexity_increase_percent=5.0004)
    (breach,) = judge({"int4": worse}, gate)
    assert breach.variant == "int4"
    assert breach.text == "perplexity changed by 5.0004 %, above --max-perplexity-increase 5 %"
    assert breach.passes_from == "5.01 %"
    raised = Gate(perplexity_increase={"int4": 5.01})
    assert judge({"int4": worse}, raised) == [], "the limit that is named would do"


def test_a_better_variant_than_its_source_passes() -> None:
    better = replace(GOOD, perplexity_increase_percent=-0.3)
    assert judge({"int8": better}, Gate(perplexity_increase={"int8": 0.0})) == []


def test_every_complaint_is_told_and_variants_without_a_limit_are_not_judged() -> None:
    bad = replace(GOOD, perplexity_increase_percent=80.0, mean_kl=0.7)
    gate = Gate(perplexity_increase={"int4": 12.0}, kl={"int4": 0.5, "int8": 0.1})
    breaches = judge({"int8": GOOD, "int4": bad, "int8_dynamic": bad}, gate)
    assert [(breach.variant, breach.option) for breach in breaches] == [
        ("int4", "--max-perplexity-increase"),
        ("int4", "--max-kl"),
    ]
    assert ["80 %" in breaches[0].text, "0.7" in breaches[1].text] == [True, True]


@pytest.mark.fault(
    "quality",
    "A limit is set on what was not measured",
    "Exit 6; nothing is published.",
)
@pytest.mark.parametrize("metrics", [None, Metrics(tokens_per_second=30.0)])
def test_a_limit_on_what_was_not_measured_fails(metrics: Metrics | None) -> None:
    (breach,) = judge({"int8": metrics}, Gate(kl={"int8": 1.0}))
    assert breach.text == "--max-kl 1 was given, and the variant was not measured"
    assert breach.passes_from == "", "no limit would do"


@pytest.mark.fault(
    "quality",
    "A measured number is NaN",
    "It passes no limit.",
)
def test_not_a_number_passes_no_limit() -> None:
    (breach,) = judge({"int8": replace(GOOD, mean_kl=float("nan"))}, Gate(kl={"int8": 1.0}))
    assert (breach.variant, breach.passes_from) == ("int8", "")


def test_a_release_that_passes_says_against_what() -> None:
    gate = Gate(perplexity_increase={"int4": 12.0}, kl={"int4": 0.5, "int8": 0.00005})
    tiny = replace(GOOD, mean_kl=0.0000123456)
    assert verdict({"int4": GOOD, "int8": tiny}, gate) == (
        "int4: perplexity changed by 5 %, --max-perplexity-increase 12 %; "
        "int4: mean KL divergence is 0.05, --max-kl 0.5; "
        "int8: mean KL divergence is 0.0000123, --max-kl 0.00005"
    )
    assert verdict({"int4": GOOD}, Gate()) == ""


def test_without_limits_nothing_is_judged() -> None:
    assert judge({"int8": None, "int4": GOOD}, Gate()) == []


@pytest.mark.fault(
    "quality",
    "A variant computes garbage",
    "Exit 6 without any limit; nothing is published.",
)
def test_garbage_is_refused_without_any_limit() -> None:
    check_plausible("int4", replace(GOOD, mean_kl=LARGEST_PLAUSIBLE_KL))
    check_plausible("int4", Metrics())
    for kl in (LARGEST_PLAUSIBLE_KL * 1.01, float("nan")):
        with pytest.raises(GateError, match="int4"):
            check_plausible("int4", replace(GOOD, mean_kl=kl))


def test_the_gate_needs_no_torch() -> None:
    code = "import sys, smolquant.evaluate.gate, smolquant.evaluate.text; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
