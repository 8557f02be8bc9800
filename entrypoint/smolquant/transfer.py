"""How many bytes of files have gone to the Hub, or come from it, whichever way its client moves them.

What goes over HTTP passes through :mod:`smolquant.wire`. A download tells of itself in progress bars of a
class that its caller may choose. Only Xet's uploads are told to a class of the client library's own.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

Advance = Callable[[int], None]
"""Is told of each number of bytes that have moved; of a negative one where they have to move once more."""


class Meter:
    """Tells of bytes that move to whoever asks for it."""

    def __init__(self) -> None:
        self._told: list[Advance] = []

    def move(self, n_bytes: int) -> None:
        """So many bytes have moved."""
        for advance in list(self._told):
            advance(n_bytes)

    @contextmanager
    def telling(self, advance: Advance) -> Iterator[None]:
        """Have ``advance`` told until this is left, from any thread."""
        self._told.append(advance)
        try:
            yield
        finally:
            self._told.remove(advance)


def bars(advance: Advance) -> type:
    """A class of progress bars, for a download, that draw nothing and tell of bytes.

    The client has a bar for what arrives and one for what is written; the one that is further counts.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    lock, furthest = threading.Lock(), 0

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._counts_bytes = options.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            with lock:
                self.n += n or 0
                more = int(self.n) - furthest if self._counts_bytes else 0
                furthest += max(more, 0)
            if more > 0:
                advance(more)

    return Bar


@contextmanager
def following_xet(advance: Advance) -> Iterator[None]:
    """Have ``advance`` told of what Xet sends until this is left; nobody where the client has changed.

    A byte counts when it is stored: sent, or found to be there already.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        disable_progress_bars,
        enable_progress_bars,
    )

    try:
        from huggingface_hub.utils import _xet_progress_reporting as theirs

        reporter = theirs.XetUploadProgressReporter
    except (ImportError, AttributeError):
        reporter = None
    has_xet = find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET
    # Without Xet, the client would draw bars; and what the environment says it will not be talked out of.
    if reporter is None or not has_xet or constants.HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return

    class Reporter:
        """What Xet tells instead of the client's bars."""

        def __init__(self) -> None:
            self._stored = 0

        def update_progress(self, all_files: Any, each_file: object = None) -> None:
            stored = int(all_files.total_bytes_completed)
            self._stored, more = stored, stored - self._stored
            advance(more)

        def close(self) -> None:
            """Nothing was drawn."""

    theirs.XetUploadProgressReporter = Reporter  # type: ignore[misc,assignment]
    enable_progress_bars()  # or nobody is told
    try:
        yield
    finally:
        disable_progress_bars()
        theirs.XetUploadProgressReporter = reporter  # type: ignore[misc]
