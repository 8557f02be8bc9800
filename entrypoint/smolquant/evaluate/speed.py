"""Tokens per second and peak memory of a model and its variants on this machine, beside each other.

In a process of its own, because a model that does not fit takes nothing down with it there. Loaded as
users load them: stock transformers for the source, and this machine's kernels for a variant. So it is
also the proof that a variant is loaded and runs.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smolquant.environment import child_environment
from smolquant.evaluate.own_code import beside_its_code
from smolquant.evaluate.rounds import Ratio, ratio_of, speed_of
from smolquant.evaluate.timing import SOURCE, Asked, Entry
from smolquant.memory import available_bytes
from smolquant.record import Behaviour, read_behaviour

SECONDS_A_MODEL = 4.0
"""Time that suffices for timing a small model; a large one takes what the least number of rounds takes."""
LIMIT_SECONDS = 50.0
"""Time that timing may take in all; loading comes on top of it."""
TIMEOUT_SECONDS = 600.0
"""Time that a process may take for what it does, loading included."""

_FOOTPRINT_BYTES = 900_000_000
"""What a process takes with torch and transformers in it."""


@dataclass(frozen=True)
class Speed:
    """What was found out about a model that ran one sequence at a time; None where that cannot be had."""

    fault: str = ""
    """Why it cannot be loaded, or not predict; empty where it can, and where that is not known."""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    """On a CPU of the whole process, on CUDA of the device's memory."""
    decode_ratio: Ratio | None = None
    prefill_ratio: Ratio | None = None
    """How many times as fast as the source it was, where both were timed in the same rounds."""
    bytes_read: int | None = None
    """Bytes of weights that a token makes it read."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """How many of its weights are computed with which kernel."""


@dataclass(frozen=True)
class Speeds:
    """What was found out about a source and its variants."""

    source: Speed
    variants: Mapping[str, Speed]
    prompt: int | None = None
    """Tokens of the prompt that was timed."""
    threads: int | None = None
    load_average: float | None = None
    """Of the last minute, before anything was timed."""
    capability: str | None = None
    """torch's name for what this CPU can do."""


def measure_speeds(
    source: Path | None,
    variants: Mapping[str, Path],
    *,
    device: str = "cpu",
    code: Path | None = None,
    heard: Callable[[str, float | None], None] = lambda begun, left: None,
    observed: Callable[[str, Behaviour], None] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Speeds:
    """Load models, let them predict, and time them in turns.

    What cannot be told is left out: of a model that does not fit, takes too long, has no kernels here, or
    does not generate step by step. Speed is told where it can be had, and nothing hangs on it.

    Args:
        source: its folder; None, or one without weights, where it is not to be had.
        variants: variant -> folder.
        code: a folder with code of the model's own, which may run; None where none may.
        heard: is told whatever begins, and the seconds that are left of all, or None where nobody knows.
        observed: is told what each variant predicts on a short text, where that can be computed; None where
            nobody wants to know.
        timeout: seconds that loading and timing may take each.
    """
    folders = {SOURCE: source, **variants} if source is not None else dict(variants)
    fitting = {name: folder for name, folder in folders.items() if folder and _fits(folder, device)}
    found = _Found()
    if fitting:
        with ExitStack() as places:
            entries = [
                Entry(name, os.fspath(places.enter_context(beside_its_code(folder, code))))
                for name, folder in fitting.items()
            ]
            asked = Asked(
                entries,
                device,
                code is not None,
                SECONDS_A_MODEL,
                LIMIT_SECONDS,
                timeout,
                observe=observed is not None,
            )
            events = places.enter_context(closing(_events(asked, heard)))
            for event in events:
                found.take(event)
                if observed is not None and (behaviour := event.get("behaviour")):
                    observed(behaviour["name"], read_behaviour(behaviour["is"]))
    return found.speeds(variants)


def _fits(folder: Path, device: str) -> bool:
    """Whether there are weights, and this machine has the memory for them."""
    weight_bytes = sum(
        path.stat().st_size for path in folder.iterdir() if path.suffix in {".safetensors", ".bin"}
    )
    if device == "cpu" and weight_bytes * 1.2 + _FOOTPRINT_BYTES > available_bytes():
        return False
    return weight_bytes > 0


class _Found:
    """What the process has told so far."""

    def __init__(self) -> None:
        self._speeds: dict[str, Speed] = {}
        self._about: dict[str, Any] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        """Add what an event tells."""
        if trial := event.get("trial"):
            self._speeds[trial["name"]] = Speed(trial["fault"], peak_memory_bytes=trial["peak"])
        elif session := event.get("session"):
            self._take_session(session)
        elif capability := event.get("capability"):
            self._about["capability"] = capability

    def _take_session(self, session: Mapping[str, Any]) -> None:
        for name in ("prompt", "threads", "load_average"):
            self._about.setdefault(name, session[name])
        models = session["models"]
        source = models.get(SOURCE, {"decode": [], "prefill": []})
        for name, model in models.items():
            if self._speeds[name].bytes_read is not None:
                continue  # the source, in another session already
            is_beside = name != SOURCE and SOURCE in models
            self._speeds[name] = replace(
                self._speeds[name],
                prefill_tokens_per_second=speed_of(model["prefill"]),
                decode_tokens_per_second=speed_of(model["decode"]),
                decode_ratio=ratio_of(source["decode"], model["decode"]) if is_beside else None,
                prefill_ratio=ratio_of(source["prefill"], model["prefill"]) if is_beside else None,
                bytes_read=model["bytes_read"],
                kernels=model["kernels"],
            )

    def speeds(self, variants: Mapping[str, Path]) -> Speeds:
        """All of it."""
        nothing = Speed()
        return Speeds(
            self._speeds.get(SOURCE, nothing),
            {name: self._speeds.get(name, nothing) for name in variants},
            **self._about,
        )


def _events(
    asked: Asked, heard: Callable[[str, float | None], None]
) -> Generator[Mapping[str, Any], None, None]:
    """What the measuring process tells, until it ends or says nothing for too long."""
    with _process(asked) as pipe:
        rest = b""
        while select.select([pipe], [], [], 2 * asked.timeout + 60)[0]:
            block = os.read(pipe, 1 << 16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            for event in map(json.loads, lines):
                if doing := event.get("doing"):
                    heard(doing, event["left"])
                else:
                    yield event


@contextmanager
def _process(asked: Asked) -> Iterator[int]:
    """The measuring process, ended with all that it has forked: the pipe with its lines."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "smolquant.evaluate.timing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
    except OSError:  # no memory for another process
        read, write = os.pipe()
        os.close(write)
        with os.fdopen(read) as nothing:
            yield nothing.fileno()
        return
    assert child.stdin is not None and child.stdout is not None
    with child:
        try:
            with suppress(BrokenPipeError), child.stdin as line:
                line.write(json.dumps(asdict(asked)).encode())
            yield child.stdout.fileno()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """A child's, able to find this package, and kept off the network."""
    package_root = os.fspath(Path(__file__).parents[2])
    search_path = os.environ.get("PYTHONPATH")
    return {
        **child_environment(os.environ),
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [search_path])]),
        "HF_HUB_OFFLINE": "1",
    }
