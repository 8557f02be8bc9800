"""Decoding with a static cache and a compiled forward beside eager decoding, both by ``generate``."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from smolquant.evaluate.rounds import (
    SHORT_PROMPT,
    Clock,
    Ratio,
    Runner,
    Times,
    Turn,
    in_turns,
    ratio_of,
    speed_of,
)

_FIRST = 3
"""Tokens of the call that compiles: the prompt gives the first one eagerly, as ``generate`` does it."""


class _Arrivals:
    """A streamer that keeps when tokens came, the prompt's arrival being the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing to finish."""


class Generating(Runner):
    """A model that decodes by its own ``generate``: by default eagerly, with a dynamic cache."""

    def __init__(self, model: Any, **options: Any) -> None:
        """``options`` are for ``generate``."""
        super().__init__(model)
        self._prompt = self._tokens[:, :SHORT_PROMPT]
        self._options = options

    def decode(self, tokens: int) -> float:
        """Seconds for tokens one at a time, after a short prompt that does not count."""
        arrivals = _Arrivals()
        self.model.generate(
            self._prompt,
            attention_mask=self._prompt.new_ones(self._prompt.shape),
            streamer=arrivals,
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            do_sample=False,
            pad_token_id=0,
            **self._options,
        )
        return arrivals.times[-1] - arrivals.times[1]


def compiling(decoded: int) -> dict[str, Any]:
    """What ``generate`` is told for a static cache and a compiled forward, one graph for every token.

    Args:
        decoded: the most tokens that are asked for: a cache of another length would compile again.
    """
    from transformers import CompileConfig

    as_whole = CompileConfig(fullgraph=True)
    as_whole._compile_all_devices = True  # on a CPU, `generate` compiles only when it is told to
    return {
        "cache_implementation": "static",
        "max_cache_len": SHORT_PROMPT + decoded + 1,
        "compile_config": as_whole,
    }


def compare(
    models: Mapping[str, Any],
    source: str,
    decoded: int,
    enough: Callable[[], Clock],
    *,
    least: int,
) -> list[dict[str, Any]]:
    """Decoding of each model, eager and compiled, in turns; ratios to ``source``, which is one of them.

    Args:
        enough: starts the clock of the rounds, which compiling does not count for.
        least: rounds without which there is no number.

    Raises:
        Exception: of torch's, where a model is not one graph, or is compiled again while it is timed.
    """
    import torch

    options = compiling(decoded)
    eager = {name: Generating(model) for name, model in models.items()}
    compiled = {name: Generating(model, **options) for name, model in models.items()}
    seconds = {}
    for name, runner in compiled.items():
        eager[name].decode(_FIRST)  # what only the first call of all has to do
        with _nothing_known():
            started = time.monotonic()
            runner.decode(_FIRST)
            seconds[name] = time.monotonic() - started
        print(f"{name}: compiled in {seconds[name]:.1f} s", flush=True)
    runners = {**_named("eager", eager), **_named("compiled", compiled)}
    with torch.compiler.set_stance("fail_on_recompile"):
        times = in_turns(
            runners,
            Turn(decoded, 0),
            enough(),
            lambda text, _: print(text, flush=True),
            least=least,
        )
    return [_row(name, source, times, seconds[name], least) for name in models]


def _named(how: str, runners: Mapping[str, Generating]) -> dict[str, Runner]:
    return {f"{name}, {how}": runner for name, runner in runners.items()}


@contextmanager
def _nothing_known() -> Iterator[None]:
    """Compile as a machine does that has compiled nothing before."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def _row(
    name: str, source: str, times: Mapping[str, Times], seconds: float, least: int
) -> dict[str, Any]:
    def of(other: str) -> dict[str, float] | None:
        theirs, ours = times[other].decode, times[f"{name}, compiled"].decode
        ratio = ratio_of(theirs, ours, least)
        return asdict(ratio) if isinstance(ratio, Ratio) else None

    return {
        "name": name,
        "compile_seconds": seconds,
        "eager_per_second": speed_of(times[f"{name}, eager"].decode, least),
        "compiled_per_second": speed_of(times[f"{name}, compiled"].decode, least),
        "of_compiled_source": None if name == source else of(f"{source}, compiled"),
        "of_eager_source": of(f"{source}, eager"),
        "of_eager": of(f"{name}, eager"),
        "rounds": len(times[f"{name}, compiled"].decode),
    }
