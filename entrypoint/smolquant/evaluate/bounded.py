"""Work on a tokenizer or a chat template, which may be anybody's, with an end to its time and memory.

Either is a program: a template may loop, and what a tokenizer puts in the place of letters may be longer
each time. The tokenizers' own code cannot be stopped from within, so the work is done in a process of its
own, forked because that costs milliseconds where a new one would import everything again.
"""

import multiprocessing
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from smolquant.errors import CannotMeasure
from smolquant.text import human_size

T = TypeVar("T")

CPU_SECONDS = 30
"""The slowest tokenizers, converted from their makers' own format, take about 15 to load."""
MEMORY_BYTES = 2_000_000_000
"""Beside what this process has already; the largest vocabularies take half of it."""
_PATIENCE = 10
"""Seconds of waiting for each of computing, since a busy machine may give a process little time."""

_parent: Connection | None = None
"""The process that waits for this one's work; None in any other."""


def at(file: str) -> None:
    """Tell that the work has come to ``file``, for the message if it never leaves it."""
    if _parent is not None:
        _parent.send_bytes(pickle.dumps(("at", file)))


def bounded(
    work: Callable[[], T], *, cpu_seconds: int = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES
) -> T:
    """The result of ``work``, which is done in another process.

    Args:
        work: what it returns, or raises, has to be picklable; what it changes is lost.

    Raises:
        CannotMeasure: it took more time or memory, or died; with the file that it had come to.
        Exception: whatever ``work`` raises.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_do, args=(work, theirs, cpu_seconds, memory_bytes), daemon=True)
    child.start()
    theirs.close()
    file = "The tokenizer"
    try:
        while ours.poll(cpu_seconds * _PATIENCE):
            kind, content = pickle.loads(ours.recv_bytes())  # noqa: S301 - this program's own words
            if kind == "at":
                file = content
            elif kind == "raised":
                raise content
            else:
                result: T = content
                return result
    except EOFError:
        pass
    finally:
        child.kill()
        child.join()
        ours.close()
    raise CannotMeasure(
        f"{file} takes more than {cpu_seconds} s of computing or {human_size(memory_bytes)} of memory to "
        "be read and applied, and was stopped.",
        hint="Make sure that the file is the one that belongs to the model.",
    )


def _do(work: Callable[[], Any], parent: Connection, cpu_seconds: int, memory_bytes: int) -> None:
    """Work, and send the result; runs in the child."""
    global _parent  # noqa: PLW0603 - a process works for one parent
    _parent = parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the others did not come along
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    most = _private_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        outcome = ("done", work())
    except MemoryError:
        return
    except Exception as error:  # the parent raises it
        outcome = ("raised", error)
    parent.send_bytes(pickle.dumps(outcome))


def _private_bytes() -> int:
    """What counts against ``RLIMIT_DATA``: private memory that may be written to (proc(5), VmData)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(one for one in status.splitlines() if one.startswith("VmData:"))
    return int(line.split()[1]) * 1024
