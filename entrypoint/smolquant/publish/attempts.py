"""A commit that ended with an error: whether it may have been made, and when to look what became of it."""

import random
from enum import Enum, auto

from smolquant.errors import SmolquantError

MAX_TRIES = 12
"""Of many runs that push at the same moment one gets through, so this is how many may."""
_FIRST_PAUSE = 1.0
"""Seconds before the second try at most; it doubles with the next three."""


class Outcome(Enum):
    """What is known of a commit that ended with an error."""

    REFUSED = auto()
    """The Hub has refused it for good."""
    PASSING = auto()
    """Others have pushed, or the Hub was busy, or the answer was lost: it may be made, or made again."""
    ODD = auto()
    """The answer makes no sense: it may be made, and would not be answered better again."""

    @classmethod
    def of(cls, error: Exception) -> "Outcome":
        """The outcome of a commit that raised ``error``."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, SmolquantError):
            return cls.REFUSED
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            return cls.PASSING if status in (408, 412, 429) or status >= 500 else cls.REFUSED
        return cls.PASSING if isinstance(error, httpx2.TransportError) else cls.ODD


def pause_after(attempt: int, error: Exception) -> float:
    """Seconds before looking what became of a commit: as the Hub asks, or longer with each try.

    Args:
        attempt: the number of the try that ended with ``error``, from 1.
    """
    from huggingface_hub.errors import HfHubHTTPError

    from smolquant.wire import asked_pause

    # Not the same for all who wait, or they would meet again.
    pause = _FIRST_PAUSE * 2.0 ** min(attempt - 1, 3) * random.uniform(0.5, 1.0)  # noqa: S311
    if isinstance(error, HfHubHTTPError):
        pause = max(pause, asked_pause(error.response.headers) or 0.0)
    return pause
