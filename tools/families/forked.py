"""Runs one function per task in forked processes, each with limits of time and memory.

The parent has imported what is slow to import; a child is a copy of it, so it starts at once, and whatever
a model's code does there, to the process or to transformers' own state, ends with it.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATIENCE = 5
"""Seconds of waiting for a second of computing, on a machine that is busy with other work."""


@dataclass(frozen=True)
class Ended:
    """How a task ended."""

    task: Any
    result: dict[str, Any] | None
    """What its function returned; None where it did not get to that."""
    failure: str
    """Why there is no result; empty where there is one."""
    seconds: float


@dataclass(frozen=True)
class _Running:
    task: Any
    path: Path
    started: float


def run_forked(
    function: Callable[[Any], dict[str, Any]],
    tasks: Iterable[Any],
    folder: Path,
    *,
    jobs: int,
    seconds: float,
    memory: int,
) -> Iterator[Ended]:
    """Run ``function`` on every task, and yield each as it ends.

    Args:
        function: what it returns has to be JSON.
        folder: an existing one for results and output, a file each.
        jobs: processes at a time.
        seconds: of computing; a process that takes longer is killed, and so is one that waits for ever.
        memory: bytes of address space that a process may take beyond the parent's.
    """
    running: dict[int, _Running] = {}
    waiting = iter(enumerate(tasks))
    gc.freeze()  # children share what is there by now, instead of copying it at their first collection
    while True:
        for number, task in waiting:
            path = folder / f"{number}.json"
            running[_start(function, task, path, memory, int(seconds))] = _Running(
                task, path, time.monotonic()
            )
            if len(running) >= jobs:
                break
        if not running:
            return
        yield _next_to_end(running, seconds)


def _start(
    function: Callable[[Any], dict[str, Any]], task: Any, path: Path, memory: int, seconds: int
) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    with path.with_suffix(".log").open("w") as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            limit = _address_space() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            path.write_text(json.dumps(function(task)))
            status = 0
        except BaseException:  # a child must never run on as a second parent
            traceback.print_exc(file=log)
        finally:
            log.flush()
            os._exit(status)


def _next_to_end(running: dict[int, _Running], seconds: float) -> Ended:
    while True:
        for child, one in list(running.items()):
            taken = time.monotonic() - one.started
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and taken > seconds * _PATIENCE:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                del running[child]
                return Ended(one.task, None, "hangs", taken)
            if ended:
                del running[child]
                code = os.waitstatus_to_exitcode(status)
                if code == 0:
                    return Ended(one.task, json.loads(one.path.read_text()), "", taken)
                return Ended(one.task, None, _why(code, one.path.with_suffix(".log")), taken)
        time.sleep(0.05)


def _why(code: int, log: Path) -> str:
    if -code == signal.SIGXCPU:
        return "takes too long"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else f"exit code {code}"


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
