"""Does the run in a child of a container's first process, so that a process is left to report how it ended.

At a memory limit the kernel kills the process that takes most. If that were the first process, the
container would be gone, with a 137 in the log and nothing to say why. And a cancelled run may be inside a
library that waits for threads, which wait for a server; the runner does not wait that long.
"""

import os
import signal
from collections.abc import Callable

GRACE_SECONDS = 5.0
"""The time that a child may take to end after a signal. The runner kills 10 s after its first signal."""


def run_in_child(killed: Callable[[int | None], int]) -> None:
    """Fork, and return in the child alone; this process passes signals on and ends as the child does.

    Call it early: what is loaded already is loaded twice, and threads do not survive a fork.

    Args:
        killed: reports that the child was killed, and returns the exit code for that. Its argument is
            the signal after which the child did not end in time. None means that the kernel killed the
            child, since nothing else kills a child but not a container's first process.
    """
    # A signal that comes before there is a handler to pass it on waits for it.
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, from the first process
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        return
    cancelled_by = None

    def cancel(number: int, _frame: object) -> None:
        nonlocal cancelled_by
        if cancelled_by is None:
            cancelled_by = number
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        os.kill(child, number)

    signal.signal(signal.SIGINT, cancel)
    signal.signal(signal.SIGTERM, cancel)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    code = os.waitstatus_to_exitcode(_reap(child))
    signal.setitimer(signal.ITIMER_REAL, 0)
    if code == -signal.SIGKILL:
        code = killed(cancelled_by)
    os._exit(code if code >= 0 else 128 - code)  # the child has flushed what there was to write


def _reap(child: int) -> int:
    """Wait for ``child``, and for the orphans that fall to the first process; the child's status."""
    while True:
        process, status = os.wait()
        if process == child:
            return status
