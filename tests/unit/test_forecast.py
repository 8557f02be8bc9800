"""How long a run will take is told by its amounts, and as roughly as it is known."""

from dataclasses import replace

import pytest

from smolquant.quantize.forecast import Amounts, multiplied_in_a_second, phases
from smolquant.text import about

SMALL = Amounts(
    source_bytes=270_000_000,
    fetched_bytes=0,
    uploaded_bytes=0,
    parameters=135_000_000,
    variants=2,
    calibrated=0,
    tokens=0,
)


def test_only_what_will_be_done_is_told() -> None:
    assert [name for name, _ in phases(SMALL, cores=2, flops=1e10)] == ["quantizing"]
    everything = replace(
        SMALL, fetched_bytes=270_000_000, uploaded_bytes=300_000_000, calibrated=1, tokens=4_096
    )
    assert [name for name, _ in phases(everything, cores=2, flops=1e10)] == [
        "downloading 270 MB",
        "calibrating",
        "quantizing",
        "measuring quality",
        "measuring speed",
        "uploading 300 MB",
    ]


def test_more_work_takes_longer_and_more_cores_shorten_it() -> None:
    measured = replace(SMALL, tokens=1_000)
    once = dict(phases(measured, cores=2, flops=1e10))
    assert dict(phases(measured, cores=4, flops=1e10))["quantizing"] == once["quantizing"] / 2
    twice = dict(phases(replace(measured, tokens=2_000), cores=2, flops=1e10))
    assert twice["measuring quality"] == pytest.approx(2 * once["measuring quality"])
    fast = dict(phases(measured, cores=2, flops=2e10))
    assert fast["measuring quality"] == pytest.approx(once["measuring quality"] / 2)


def test_this_machine_multiplies() -> None:
    assert multiplied_in_a_second() > 1e7


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
