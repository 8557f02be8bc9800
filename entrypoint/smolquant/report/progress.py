"""What a run is doing at this moment, as one line: waiting for something, or so much of it done.

Work is counted in its own unit. How fast it goes, and what is left, is told as far as it is known, and no
more precisely than it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from smolquant.pace import Pace, Part
from smolquant.text import about, human_duration, human_size, percent

_BAR_WIDTH = 24
_MEASURABLE = 0.05
"""Seconds. What takes less was done before, and has no speed."""


@dataclass(frozen=True)
class Unit:
    """What work is counted in."""

    amount: Callable[[int], str]
    """A number of them, as people read it."""
    share: Callable[[int, int], str]
    """So many of so many."""
    rate: Callable[[float], str]
    """So many a second; empty for less than one."""


def _bytes_a_second(rate: float) -> str:
    return f"{human_size(int(rate))}/s" if rate >= 1 else ""


def _tokens_a_second(rate: float) -> str:
    return f"{rate:,.0f} tokens/s" if rate >= 1 else ""


BYTES = Unit(
    human_size, lambda done, total: f"{human_size(done)} of {human_size(total)}", _bytes_a_second
)
TOKENS = Unit("{:,} tokens".format, "{:,} of {:,} tokens".format, _tokens_a_second)


class Activity(Protocol):
    """Something that goes on for a while."""

    def line(self) -> str:
        """How far it is, in one line."""

    @property
    def share(self) -> float | None:
        """The share of it that is done; None where that is not known."""


class Waiting:
    """Work that is not counted."""

    share = None

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self._label, self._clock = label, clock
        self._start = clock()
        self._part = ""
        self._until: float | None = None

    def tell(self, part: str, left: float | None = None) -> None:
        """Which part of it has begun, and how many seconds are left of all of it, where that is known."""
        self._part = f"{part}, "
        self._until = None if left is None else self._clock() + left

    def line(self) -> str:
        """See :meth:`Activity.line`."""
        now = self._clock()
        told = f"{self._label}: {self._part}{_whole(now - self._start)} so far"
        if self._until is None:
            return told
        return f"{told}, {about(max(self._until - now, 0.0))} left"


class Progress:
    """Work that is counted; workers report to it, from any thread."""

    def __init__(
        self, label: str, parts: Sequence[Part], unit: Unit, clock: Callable[[], float]
    ) -> None:
        """``parts``: the work, by parts that differ in pace."""
        self._label, self._unit, self._clock = label, unit, clock
        self._start = clock()
        self._pace = Pace(parts, clock)
        self.advance = self._pace.advance
        """Is called with how much more is done."""

    @property
    def done(self) -> int:
        """How much is done."""
        return self._pace.done

    @property
    def share(self) -> float | None:
        """See :attr:`Activity.share`."""
        done, total = self._pace.done, self._pace.total
        return done / total if 0 < done <= total else None

    def line(self) -> str:
        """See :meth:`Activity.line`."""
        done, seconds, share = self._pace.done, self._clock() - self._start, self.share
        left = self._pace.left()
        if share is None:
            told = [self._unit.amount(done)] if done else []
        else:
            told = [f"{self._unit.share(done, self._pace.total)} ({percent(share)})"]
            if rate := self._unit.rate(done / max(seconds, 1e-9)):
                told.append(rate)
        if share is None or left is None:
            told.insert(0, f"{_whole(seconds)} so far")
        else:
            told.append(f"{about(left)} left")
        return f"{self._label}: {', '.join(told)}"

    def totals(self) -> str:
        """What was done in all, once it is."""
        done, seconds = self._pace.done, self._clock() - self._start
        rate = self._unit.rate(done / seconds) if seconds >= _MEASURABLE else ""
        line = f"{self._label}: {self._unit.amount(done)} in {human_duration(seconds)}"
        return f"{line}, {rate}" if rate else line


def drawn(activity: Activity, width: int, encoding: str) -> str:
    """An activity in one line of a terminal of ``width`` columns, with a bar where there is room."""
    line = activity.line()
    if (share := activity.share) is not None and len(line) + _BAR_WIDTH + 2 < width:
        full, empty = _bar_characters(encoding)
        n_full = int(share * _BAR_WIDTH)
        line = f"{full * n_full}{empty * (_BAR_WIDTH - n_full)}  {line}"
    return line[: max(width - 1, 0)]  # a full line would make the terminal begin another


def _whole(seconds: float) -> str:
    """A duration that still goes on, in whole seconds."""
    return f"{seconds:.0f} s" if seconds < 59.5 else human_duration(seconds)


def _bar_characters(encoding: str) -> tuple[str, str]:
    try:
        "━╌".encode(encoding)
    except UnicodeEncodeError:
        return "#", "-"
    return "━", "╌"
