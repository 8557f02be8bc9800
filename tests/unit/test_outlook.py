"""While speed is measured, the time left is true from the first third on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from smolquant.evaluate.outlook import Outlook
from smolquant.evaluate.rounds import LEAST_ROUNDS, Clock


class Machine:
    """One whose clock goes on by what is done, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[tuple[float, float]] = []

    @contextmanager
    def takes(self, seconds: float) -> Iterator[None]:
        yield
        self.now += seconds

    def tell(self, left: float | None) -> None:
        if left is not None:
            self.told.append((self.now, left))


@pytest.mark.parametrize(
    ("imports", "load", "token", "observe"),
    [
        (3.0, 0.6, 0.02, 1.5),  # a small model on two cores
        (15.0, 5.0, 0.02, 10.0),  # the same on busy ones
        (3.0, 20.0, 0.4, 12.0),  # a large one
    ],
)
def test_from_the_first_third_on_the_time_left_is_true(
    monkeypatch: pytest.MonkeyPatch, imports: float, load: float, token: float, observe: float
) -> None:
    machine = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    machine.now = imports
    outlook = Outlook(3, 2, 4.0, 50.0)
    for number in range(3):
        machine.tell(outlook.left())
        with outlook.trying(), machine.takes(load + 6 * token):
            pass
        outlook.tried(load, token)
        if number:
            machine.tell(outlook.left())
            with outlook.observing(), machine.takes(observe):
                pass
    outlook.planned([["source", "int8", "int4"]])
    for _ in range(3):
        machine.tell(outlook.left())
        with outlook.loading(), machine.takes(load):
            pass
    machine.tell(outlook.left())
    clock = Clock(12.0, 50.0)
    machine.now += 3 * 5 * token  # warming up
    for number in range(LEAST_ROUNDS):
        machine.tell(clock.left_of((LEAST_ROUNDS - number) * 3 * 5 * token))
        machine.now += 3 * 5 * token
    end = machine.now + clock.left_of(0.0)
    counted = [(told, end - at) for at, told in machine.told if at >= end / 3]
    assert len(counted) > 5
    assert all(abs(told - true) <= 0.3 * true for told, true in counted if true > 2), counted


def test_what_was_never_tried_is_not_told() -> None:
    assert Outlook(3, 2, 4.0, 50.0).left() is None
