"""Progress over bytes: a bar on a terminal, and a line now and then where output is a log."""

import threading
from collections.abc import Callable
from typing import Protocol, TextIO

from smolquant.text import human_duration, human_size, percent

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a worker reports to, from any thread."""

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more are done."""


class LineProgress:
    """A plain line at most every ten seconds, and a last one with the totals."""

    def __init__(
        self, label: str, total_bytes: int, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._label = label
        self._total = total_bytes
        self._write = write
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._start = self._last_line = clock()

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more are done."""
        with self._lock:
            self._done += n_bytes
            now = self._clock()
            if now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
            self._write(self._line(now - self._start))

    def finish(self) -> None:
        """Write the last line."""
        seconds = self._clock() - self._start
        size, duration = human_size(self._done), human_duration(seconds)
        self._write(f"{self._label}: {size} in {duration}, {_speed(self._done, seconds)}")

    def _line(self, seconds: float) -> str:
        size = human_size(self._done)
        line = f"{self._label}: {size}, {_speed(self._done, seconds)}"
        if 0 < self._done <= self._total:
            left = seconds / self._done * (self._total - self._done)
            share = percent(self._done / self._total)
            line = (
                f"{self._label}: {size} of {human_size(self._total)} ({share}), "
                f"{_speed(self._done, seconds)}, {human_duration(left)} left"
            )
        return line


class BarProgress:
    """tqdm's bar with speed and remaining time."""

    def __init__(self, label: str, total_bytes: int, stream: TextIO) -> None:
        from tqdm import tqdm

        self._lock = threading.Lock()
        self._bar = tqdm(
            total=total_bytes,
            desc=label,
            file=stream,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
        )

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more are done."""
        with self._lock:
            self._bar.update(n_bytes)

    def clear(self) -> None:
        """Make room for a line of text; the bar comes back with the next :meth:`advance`."""
        self._bar.clear()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _speed(n_bytes: int, seconds: float) -> str:
    return f"{n_bytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"
