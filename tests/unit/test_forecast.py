"""How long a run will take is told by its amounts, and as roughly as it is known."""

from dataclasses import replace

import pytest

from smolquant.quantize.forecast import (
    Amounts,
    Machine,
    compared_in,
    multiplied_in_a_second,
    phases,
)
from smolquant.text import about

SMALL = Amounts(
    source_bytes=270_000_000,
    fetched_bytes=0,
    uploaded_bytes=0,
    parameters=106_000_000,
    vocabulary=49_152,
    variants=2,
    calibrated=0,
    tokens=0,
)


TWO_CORES = Machine(cores=2, flops=3.6e11, comparing=2e-8, getting_ready=5.0)


def test_only_what_will_be_done_is_told() -> None:
    assert [name for name, _ in phases(SMALL, TWO_CORES)] == ["quantizing"]
    everything = replace(
        SMALL, fetched_bytes=270_000_000, uploaded_bytes=300_000_000, calibrated=1, tokens=4_096
    )
    assert [name for name, _ in phases(everything, TWO_CORES)] == [
        "downloading 270 MB",
        "calibrating",
        "quantizing",
        "measuring quality",
        "measuring speed",
        "uploading 300 MB",
    ]


def test_more_work_takes_longer_and_a_faster_machine_shortens_it() -> None:
    measured = replace(SMALL, tokens=1_000)
    once = dict(phases(measured, TWO_CORES))
    cores = dict(phases(measured, replace(TWO_CORES, cores=4)))
    assert cores["quantizing"] == once["quantizing"] / 2
    twice = dict(phases(replace(measured, tokens=2_000), TWO_CORES))
    assert twice["measuring quality"] == pytest.approx(2 * once["measuring quality"])
    fast = dict(phases(measured, replace(TWO_CORES, flops=7.2e11, comparing=1e-8)))
    assert fast["measuring quality"] == pytest.approx(once["measuring quality"] / 2)
    hasty = dict(phases(measured, replace(TWO_CORES, getting_ready=1.0)))
    assert hasty["measuring speed"] < once["measuring speed"]


def test_the_output_head_of_a_small_model_is_half_of_the_work() -> None:
    measured = replace(SMALL, tokens=2_048)
    whole = dict(phases(measured, TWO_CORES))["measuring quality"]
    layers = dict(phases(replace(measured, vocabulary=0), TWO_CORES))["measuring quality"]
    assert layers / whole == pytest.approx(0.53, abs=0.05)


def test_this_machine_multiplies_and_compares() -> None:
    assert multiplied_in_a_second() > 1e7
    assert 1e-11 < compared_in(64) < 1e-5


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, "a few seconds"),
        (7.4, "a few seconds"),
        (8.0, "about 10 s"),
        (57.4, "about 55 s"),
        (58.0, "about 1 min"),
        (100.0, "about 1 min 30 s"),
        (284.0, "about 4 min 30 s"),
        (290.0, "about 5 min"),
        (3_500.0, "about 58 min"),
        (3_590.0, "about 1 h"),
        (8_000.0, "about 2 h 10 min"),
    ],
)
def test_an_estimate_is_no_more_precise_than_it_is(seconds: float, told: str) -> None:
    assert about(seconds) == told
    for value in range(8, 20_000, 7):
        words = about(value).removeprefix("about ").split()
        units = {"s": 1, "min": 60, "h": 3600}
        shown = sum(int(n) * units[unit] for n, unit in zip(words[::2], words[1::2], strict=True))
        assert abs(shown - value) <= 0.25 * value
