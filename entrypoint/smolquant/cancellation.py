"""What SIGINT and SIGTERM do: they raise an exception in the main thread, and the run ends in time anyway.

An exception that comes at any moment can be lost. An import turns it into another one, a destructor drops
it, and a pool waits for its threads, which wait for a server. So the first signal is remembered, whatever
becomes of the exception, and a thread ends the process where the main thread does not.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from smolquant.errors import Cancelled

SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
GRACE_SECONDS = 5.0
"""The time between a signal and the end of the process at the latest, but for telling of it."""
_AGAIN_SECONDS = 0.05

_received: Cancelled | None = None
_teller: int | None = None
"""The thread that tells how the run ended."""
_claim = threading.Lock()


def listen(tell: Callable[[Cancelled], int] | None) -> None:
    """Prepare for signals, in the main thread; whoever blocked them calls :func:`deliver` next.

    Args:
        tell: reports that the run was cancelled, and returns the exit code; called in another thread where
            the main thread has not begun to tell in time. None where another process sees to the end.
    """
    for number in SIGNALS:
        signal.signal(number, _cancel)
    sys.unraisablehook = _raise_again
    if tell is not None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Written to at the moment of a signal, even while the main thread is deep inside a library.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watch = threading.Thread(target=_end_in_time, args=(read, tell), daemon=True)
        watch.start()


def deliver() -> None:
    """Let signals come, those too that came before and were blocked.

    Raises:
        Cancelled: one did.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def received() -> Cancelled | None:
    """The cancellation by the first signal that came; None before there was one."""
    return _received


def begin_to_tell() -> None:
    """Call this before telling how the run ended: from now on no signal raises, and nobody else tells.

    Where the other thread has begun, the caller waits there for the end of the process.
    """
    if not _may_tell():
        threading.Event().wait()


def _may_tell() -> bool:
    global _teller  # noqa: PLW0603 - it is one process that ends
    with _claim:
        if _teller is None or _received is None:
            _teller = threading.get_ident()
        return _teller == threading.get_ident()


def _cancel(number: int, _frame: object) -> None:
    global _received  # noqa: PLW0603
    _received = _received or Cancelled(number)
    if _teller is None:
        raise Cancelled(number)


def _raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Have the signal come once more where its exception was dropped, as in a destructor."""
    if not isinstance(dropped.exc_value, Cancelled):
        sys.__unraisablehook__(dropped)
        return
    number, main = dropped.exc_value.exit_code - 128, threading.main_thread().ident
    again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, number))
    again.daemon = True
    again.start()


def _end_in_time(signals: int, tell: Callable[[Cancelled], int]) -> None:
    """Wait for a signal, and end the process some time after it."""
    while (number := os.read(signals, 1)[0]) not in SIGNALS:
        pass
    time.sleep(GRACE_SECONDS)
    cancelled = Cancelled(number)
    code = cancelled.exit_code
    try:
        if _may_tell():  # otherwise the main thread does, and is held up by what comes last
            code = tell(cancelled)
    finally:
        os._exit(code)
