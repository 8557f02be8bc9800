"""The process that measures speed: what :func:`smolquant.evaluate.speed.measure_speeds` starts.

It imports what loading a model takes, once, and forks for everything else, before torch has started
threads. Each model is tried in a fork of its own, whose peak is that model's and nobody else's; then
those that ran are timed together in another one. Whichever takes too much time or memory takes nothing
down with it.

It reads what is asked for from stdin, and writes a line of JSON to stdout for whatever it begins and
finds out.
"""

import json
import multiprocessing
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from smolquant.evaluate.bytes_read import bytes_read
from smolquant.evaluate.outlook import Outlook
from smolquant.evaluate.rounds import PROMPTS, Clock, Runner, choose_turn, in_turns
from smolquant.memory import available_bytes, is_out_of_memory, peak_bytes
from smolquant.schemes import BY_VARIANT
from smolquant.text import error_words
from smolquant.threads import use_allowed_threads

if TYPE_CHECKING:
    from smolquant.record import Behaviour

T = TypeVar("T")

SOURCE = "source"
"""The name of the model that the others are variants of."""

_TRIED_TOKENS = 4
_MARGIN = 1.1
"""What models may take together beyond what each took alone."""


@dataclass(frozen=True)
class Entry:
    """A model to be measured."""

    name: str
    """:data:`SOURCE`, or the variant's."""
    folder: str


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how long that may take."""

    models: Sequence[Entry]
    device: str
    trust_remote_code: bool
    seconds: float
    """That suffice for timing a model."""
    limit: float
    """That timing may take in all, loading excepted."""
    timeout: float
    """That a process may take, loading included."""
    observe: bool = False
    """Whether what each variant predicts on a short text is wanted, too."""


@dataclass(frozen=True)
class Trial:
    """How a model did that was loaded as users load it, predicted and generated."""

    fault: str = ""
    """Why it does not run; empty where it does."""
    peak: int | None = None
    """Bytes that the process took at most, or of the GPU's memory; None where it has no kernels here."""
    cost: int = 0
    """Bytes of those that are the model's."""
    room: int = 0
    """Bytes that could be had before."""
    loading: float = 0.0
    """Seconds that loading it took."""
    token: float = 0.0
    """Seconds that it took for each token that it generated."""


def plan_sessions(trials: Mapping[str, Trial]) -> list[list[str]]:
    """Which models are timed together: all; or each variant with the source; or whatever fits, alone.

    Args:
        trials: of the models that can be timed, by name.
    """
    names = list(trials)

    def fit(some: Sequence[str]) -> bool:
        room = min(trials[name].room for name in some)
        return sum(trials[name].cost for name in some) * _MARGIN <= room or len(some) == 1

    if not names or fit(names):
        return [names] if names else []
    variants = [name for name in names if name != SOURCE]
    pairs = [[SOURCE, name] for name in variants if SOURCE in trials]
    sessions = [pair for pair in pairs if fit(pair)]
    alone = [name for name in names if not any(name in session for session in sessions)]
    return sessions + [[name] for name in alone]


def main() -> None:
    """Measure what stdin asks for."""
    raw = json.load(sys.stdin)
    asked = Asked(**{**raw, "models": [Entry(**entry) for entry in raw["models"]]})
    # Whatever libraries print goes nowhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        _measure(asked, _Events(pipe))


class _Events:
    """What the process that waits is told, and the forks as well."""

    def __init__(self, pipe: TextIO) -> None:
        self._pipe = pipe

    def doing(self, text: str, left: float | None = None) -> None:
        self.send({"doing": text, "left": left})

    def send(self, event: Mapping[str, Any]) -> None:
        self._pipe.write(json.dumps(event) + "\n")
        self._pipe.flush()


def _measure(asked: Asked, events: _Events) -> None:
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    # Whatever is imported here, no fork has to import.
    import smolquant.evaluate.behaviour
    import smolquant.evaluate.text
    import smolquant.model.task
    import smolquant.runtime.kernels
    import smolquant.runtime.load  # noqa: F401

    observed = [entry for entry in asked.models if asked.observe and entry.name != SOURCE]
    outlook = Outlook(len(asked.models), len(observed), asked.seconds, asked.limit)
    trials = dict(_trials(asked, observed, outlook, events))
    ready = {name: trial for name, trial in trials.items() if trial.peak is not None}
    sessions = plan_sessions(ready)
    outlook.planned(sessions)
    for names in sessions:
        some = [entry for entry in asked.models if entry.name in names]
        limit = asked.limit / len(sessions)
        session = forked(partial(_timed, some, asked, limit, outlook, events), asked.timeout)
        if session is not None:
            events.send({"session": session})
    events.send({"capability": torch.backends.cpu.get_cpu_capability()})


def _trials(
    asked: Asked, observed: Sequence[Entry], outlook: Outlook, events: _Events
) -> Iterator[tuple[str, Trial]]:
    """Try each model, and have those that run observed that shall be."""
    for number, entry in enumerate(asked.models, 1):
        events.doing(
            f"loading and trying {entry.name}, {number} of {len(asked.models)}", outlook.left()
        )
        with outlook.trying():
            trial = forked(partial(_tried, entry, asked), asked.timeout)
        if trial is None:
            continue
        yield entry.name, trial
        if trial.peak is not None:
            outlook.tried(trial.loading, trial.token)
        events.send({"trial": {"name": entry.name, "fault": trial.fault, "peak": trial.peak}})
        if entry in observed and not trial.fault:
            events.doing(f"predicting with {entry.name}", outlook.left())
            with outlook.observing():
                behaviour = forked(partial(_observed, entry, asked), asked.timeout)
            if behaviour is not None:
                events.send({"behaviour": {"name": entry.name, "is": asdict(behaviour)}})


def _load(entry: Entry, asked: Asked) -> Any:
    from transformers import AutoConfig

    from smolquant.model.task import auto_class
    from smolquant.runtime.load import load_model

    trust = asked.trust_remote_code
    if entry.name != SOURCE:
        scheme = BY_VARIANT[entry.name]
        return load_model(entry.folder, scheme, asked.device, trust_remote_code=trust)
    config = AutoConfig.from_pretrained(entry.folder, trust_remote_code=trust)
    return auto_class(config).from_pretrained(
        entry.folder, device_map=asked.device, trust_remote_code=trust
    )


def _observed(entry: Entry, asked: Asked) -> "Behaviour | None":
    """What a variant predicts on a short text, in a process whose peak nobody measures.

    Raises:
        Exception: the model does not run that way, which it need not.
    """
    from smolquant.evaluate.behaviour import observe
    from smolquant.evaluate.text import load_tokenizer
    from smolquant.runtime.load import load_model

    use_allowed_threads()
    tokenizer = load_tokenizer(Path(entry.folder), trust_remote_code=asked.trust_remote_code)
    found: list[Behaviour | None] = []
    load_model(
        entry.folder,
        BY_VARIANT[entry.name],
        asked.device,
        prepare=lambda model: found.append(observe(model, tokenizer)),
        trust_remote_code=asked.trust_remote_code,
    )
    return found[0]


def _tried(entry: Entry, asked: Asked) -> Trial:
    """How the model does.

    Raises:
        Exception: this machine lacks memory, or the model does not generate step by step.
    """
    import torch

    from smolquant.runtime.kernels import has_kernels

    use_allowed_threads()
    on_gpu = asked.device == "cuda"
    room = torch.cuda.mem_get_info()[0] if on_gpu else available_bytes()
    before = 0 if on_gpu else peak_bytes()
    try:
        started = time.monotonic()
        runner = Runner(_load(entry, asked), asked.device)
        loading = time.monotonic() - started
        logits = runner.predict(min(PROMPTS[0], runner.longest))
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        return Trial(error_words(error))
    if not bool(torch.isfinite(logits).all()):
        return Trial("what it predicts is not finite")
    if entry.name != SOURCE and not has_kernels(BY_VARIANT[entry.name], asked.device):
        return Trial()
    token = runner.decode(_TRIED_TOKENS) / _TRIED_TOKENS
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return Trial(peak=peak, cost=peak - before, room=room, loading=loading, token=token)


def _timed(
    entries: Sequence[Entry], asked: Asked, limit: float, outlook: Outlook, events: _Events
) -> dict[str, Any]:
    """Models that are loaded together, timed in turns: the length of the prompt, and of each its times."""
    from smolquant.runtime.kernels import kernels

    threads = use_allowed_threads()
    load_average = os.getloadavg()[0]
    runners = {}
    for entry in entries:
        events.doing(f"loading {entry.name} to be timed", outlook.left())
        with outlook.loading():
            runners[entry.name] = Runner(_load(entry, asked), asked.device)
    clock = Clock(asked.seconds * len(entries), limit)
    events.doing(f"{', '.join(runners)}: warming up", outlook.left())
    turn = choose_turn(list(runners.values()), clock)
    times = in_turns(runners, turn, clock, events.doing)
    return {
        "threads": threads,
        "load_average": load_average,
        "prompt": turn.prompt,
        "models": {
            name: {
                **asdict(times[name]),
                "bytes_read": bytes_read(runner.model),
                "kernels": Counter(kernels(runner.model).values()),
            }
            for name, runner in runners.items()
        },
    }


def forked(work: Callable[[], T], seconds: float) -> T | None:
    """The result of ``work``, done in a process forked for it.

    Returns:
        None where it raised an error, was killed, or took longer than ``seconds``.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def do() -> None:
        theirs.send_bytes(pickle.dumps(work()))

    child = context.Process(target=do, daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None
        result: T = pickle.loads(ours.recv_bytes())  # noqa: S301 - this program's own words
        return result
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()
        ours.close()


if __name__ == "__main__":
    main()
