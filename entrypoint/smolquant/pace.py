"""How long work will still take, told from how fast it has gone so far.

Work is counted in a unit of its own and comes in parts that differ in pace: running one model is faster
than running another, and comparing what they predict is something else. A part that has begun is told by
its own pace; one that has not by what is expected of it, or else by the pace of those before it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

_TRUSTED_SHARE = 0.15
"""So much of a part has to be done for its own pace to be all that counts; what comes first is slower."""


@dataclass(frozen=True)
class Part:
    """Work that goes at one pace."""

    amount: int
    seconds: float | None = None
    """What it will probably take in all; None where it goes as the parts before it do."""


class Pace:
    """How far work is; whoever does it reports to this, from any thread."""

    def __init__(self, parts: Sequence[Part], clock: Callable[[], float]) -> None:
        """The work begins now."""
        self._parts = [part for part in parts if part.amount] or [Part(0)]
        self.total = sum(part.amount for part in parts)
        self.done = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._current = 0
        """The number of the part that is being done."""
        self._done_before = 0
        self._begun = self._last = clock()
        """When the current part began, and when it was last reported."""
        self._step = 0
        self._paces: list[float] = []
        """Seconds for a unit of each part that is done."""

    def advance(self, amount: int) -> None:
        """So much more is done."""
        now = self._clock()
        with self._lock:
            self.done += amount
            self._step, self._last = max(amount, 0), now
            while self._current < len(self._parts) - 1:
                part = self._parts[self._current]
                if self.done < self._done_before + part.amount:
                    break
                self._paces.append((now - self._begun) / max(part.amount, 1))
                self._done_before += part.amount
                self._current, self._begun = self._current + 1, now

    def left(self) -> float | None:
        """Seconds until all is done; None where nothing is known yet, or more was done than there was."""
        with self._lock:
            if not 0 <= self.done <= self.total:
                return None
            pace = self._own_pace()
            if pace is None:
                return None
            usual = fmean([*self._paces, pace])
            left = (self._done_before + self._parts[self._current].amount - self.done) * pace
            for part in self._parts[self._current + 1 :]:
                left += part.amount * usual if part.seconds is None else part.seconds
            return max(left - self._since_last_step(), 0.0)

    def _own_pace(self) -> float | None:
        """Seconds for a unit of the current part, as far as they are known."""
        part, done = self._parts[self._current], self.done - self._done_before
        expected = fmean(self._paces) if self._paces else None
        if part.seconds is not None:
            expected = part.seconds / part.amount
        if done <= 0:
            return expected
        # Since the last step, less than another such step was done.
        waited = (self._clock() - self._begun) / (done + self._step)
        own = max((self._last - self._begun) / done, waited)
        if expected is None:
            return own
        trust = min(done / (part.amount * _TRUSTED_SHARE), 1.0)
        return trust * own + (1 - trust) * expected

    def _since_last_step(self) -> float:
        """Seconds of the next step that are over; no more than the last one took."""
        done = max(self.done - self._done_before, 1)
        step = (self._last - self._begun) * self._step / done
        return min(self._clock() - self._last, step)
