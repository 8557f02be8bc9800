"""How long measuring speed will still take, from what it has taken so far.

Each model is loaded and tried, each variant perhaps observed, and all that run are loaded again and timed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from smolquant.evaluate.rounds import LEAST_ROUNDS

_LEAST_TOKENS = 7
"""What a model does in the shortest round, in tokens one at a time: one, a prompt, a part of warming up."""


class Outlook:
    """What lies ahead of the process that measures speed."""

    def __init__(self, models: int, observed: int, seconds: float, limit: float) -> None:
        """Nothing is done yet.

        Args:
            models: the number that will be tried.
            observed: the number that will be observed.
            seconds: that suffice for timing a model.
            limit: that timing takes at most in all.
        """
        self._seconds, self._limit = seconds, limit
        self._to_try, self._to_observe, self._to_load = models, observed, models
        self._trying: list[float] = []
        self._observing: list[float] = []
        self._loading: list[float] = []
        self._tokens: list[float] = []
        """Seconds that each model takes for a token."""

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A model is tried until this is left."""
        with _timed(self._trying):
            yield
        self._to_try -= 1

    @contextmanager
    def observing(self) -> Iterator[None]:
        """A variant is observed until this is left."""
        with _timed(self._observing):
            yield
        self._to_observe -= 1

    @contextmanager
    def loading(self) -> Iterator[None]:
        """A model is loaded to be timed until this is left."""
        with _timed(self._loading):
            yield
        self._to_load -= 1

    def tried(self, loading: float, token: float) -> None:
        """What trying a model has shown: the seconds that loading it takes, and a token."""
        self._loading.append(loading)
        self._tokens.append(token)

    def planned(self, sessions: Sequence[Sequence[str]]) -> None:
        """Which models will be timed together is known now."""
        self._to_load = sum(map(len, sessions))

    @property
    def timing(self) -> float:
        """Seconds that timing takes, once all is loaded."""
        shortest = LEAST_ROUNDS * _LEAST_TOKENS * sum(self._tokens)
        return min(self._limit, max(self._seconds * self._to_time, shortest))

    def left(self) -> float | None:
        """Seconds; None before the first model was tried."""
        if not self._trying:
            return None
        one = fmean(self._trying)
        observing = fmean(self._observing) if self._observing else one
        loading = fmean(self._loading) if self._loading else one
        return (
            self._to_try * one
            + self._to_observe * observing
            + self._to_load * loading
            + self.timing
        )

    @property
    def _to_time(self) -> int:
        return self._to_try + len(self._tokens)


@contextmanager
def _timed(taken: list[float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    taken.append(time.monotonic() - started)
