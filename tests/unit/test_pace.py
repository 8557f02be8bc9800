"""The time left is within thirty percent from the first third on, however the parts of the work differ."""

import pytest

from smolquant.pace import Pace, Part

TOLD_WITHIN = 0.3


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told_and_true(
    parts: list[Part], seconds: list[float], steps: int = 30
) -> list[tuple[float, float, float]]:
    """Do work whose parts take ``seconds``, and look twice a second, as the console does.

    Returns:
        The share of the time that is over, the seconds that are told to be left, and those that are.
    """
    clock = Clock()
    pace = Pace(parts, clock)
    total = sum(seconds)
    reports = []
    begin = 0.0
    for part, taken in zip(parts, seconds, strict=True):
        for step in range(1, steps + 1):
            amount = part.amount * step // steps - part.amount * (step - 1) // steps
            reports.append((begin + taken * step / steps, amount))
        begin += taken
    seen = []
    while reports:
        look = clock.now + 0.5
        while reports and reports[0][0] <= look:
            clock.now, amount = reports.pop(0)
            pace.advance(amount)
        clock.now = look
        left = pace.left()
        if left is not None and look < total:
            seen.append((look / total, left, total - look))
    return seen


@pytest.mark.parametrize(
    ("parts", "seconds"),
    [
        ([Part(1_000)], [60.0]),
        # A source and two variants, and comparing them, which was tried before: SmolLM2 in its proportions.
        ([Part(2_048)] * 3 + [Part(2_048, 12.1)], [4.4, 4.6, 4.6, 12.5]),
        # Variants that are slower and faster than their source.
        ([Part(2_048)] * 3 + [Part(2_048, 8.0)], [20.0, 27.0, 23.0, 8.0]),
        ([Part(2_048)] * 4 + [Part(2_048, 3.0)], [20.0, 16.0, 24.0, 15.0, 3.6]),
        # Comparing takes longer than all the rest, and was tried while the machine did something else.
        ([Part(2_048)] * 2 + [Part(2_048, 100.0)], [10.0, 12.0, 82.0]),
    ],
)
def test_from_the_first_third_on_the_time_left_is_true(
    parts: list[Part], seconds: list[float]
) -> None:
    seen = told_and_true(parts, seconds)
    counted = [(told, true) for share, told, true in seen if share >= 1 / 3 and true >= 2]
    assert len(counted) > 20
    assert all(abs(told - true) <= TOLD_WITHIN * true for told, true in counted), counted


def test_nothing_is_told_of_what_has_not_shown_its_pace() -> None:
    clock = Clock()
    pace = Pace([Part(100)], clock)
    clock.now = 5.0
    assert pace.left() is None
    pace.advance(50)
    assert pace.left() == pytest.approx(5.0)
    clock.now = 8.0
    assert pace.left() == pytest.approx(2.0)  # it counts down between two steps
    pace.advance(51)
    assert pace.left() is None  # there was more than was known


def test_what_stands_still_is_not_told_to_be_nearly_done() -> None:
    clock = Clock()
    pace = Pace([Part(100)], clock)
    clock.now = 10.0
    pace.advance(50)
    clock.now = 110.0
    left = pace.left()
    assert left is not None
    assert left > 10


def test_parts_that_are_empty_are_passed_over() -> None:
    clock = Clock()
    pace = Pace([Part(0), Part(10), Part(0)], clock)
    clock.now = 1.0
    pace.advance(5)
    assert pace.left() == pytest.approx(1.0)
    clock.now = 2.0
    pace.advance(5)
    assert pace.left() == pytest.approx(0.0)
