"""Models timed in turns in one process, so that whatever else the machine does meets all of them alike.

A round is one turn of each model: some tokens one at a time after a short prompt, and one longer prompt.
What is told of two models is the median of the ratios within rounds, and their quartiles.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smolquant.model.context import known_tokens, longest_context

LEAST_ROUNDS = 5
MOST_ROUNDS = 9
"""Fewer than the least make no number; more than the most are not worth their time."""

SHORT_PROMPT = 8
"""Tokens that those which are decoded follow."""
MOST_DECODED = 32
PROMPTS = (32, 64, 128, 256)
"""Lengths of the longer prompt; the longest that the time allows is timed. The shortest is long enough
for the way that kernels take with many tokens."""


_CACHES = ("cache", "past_key_values")
"""What models call what they remember of the tokens so far: transformers' own from 5.24 on, and others."""


@dataclass(frozen=True)
class Turn:
    """What each model does in a round."""

    decoded: int
    """Tokens one at a time; 0 for none."""
    prompt: int
    """Tokens at once; 0 where there is no time for it."""
    seconds: float = field(default=0.0, compare=False)
    """What a round of all models will probably take; 0 where that is not known."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another a model was in the same rounds: the median, and the quartiles."""

    median: float
    low: float
    high: float


@dataclass
class Times:
    """Seconds for a token, a value for each round."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


class Runner:
    """A loaded model that runs one sequence at a time, greedily."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        import torch

        self.model = model.eval()
        self.longest = longest_context(model.config)
        self._tokens = torch.randint(
            known_tokens(model),
            (1, min(self.longest, max(*PROMPTS, 1024))),
            generator=torch.Generator().manual_seed(0),
        ).to(device)
        takes = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in takes), _CACHES[-1])
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else _nothing
        self._without_gradients: Callable[[], Any] = torch.inference_mode

    def predict(self, tokens: int) -> Any:
        """(1, vocabulary) logits of what follows a prompt, computed without a cache."""
        with self._without_gradients():
            return self.model(input_ids=self._tokens[:, :tokens], use_cache=False).logits[:, -1]

    def prefill(self, tokens: int) -> float:
        """Seconds for a prompt."""
        with self._without_gradients():
            started = time.perf_counter()
            self._first(tokens)
            self._wait()
            return time.perf_counter() - started

    def decode(self, tokens: int) -> float:
        """Seconds for tokens one at a time, after a short prompt that does not count."""
        with self._without_gradients():
            output = self._first(SHORT_PROMPT)
            self._wait()
            started = time.perf_counter()
            for _ in range(tokens):
                token = output.logits[:, -1:].argmax(dim=-1)
                past = {self._cache: getattr(output, self._cache)}
                output = self.model(input_ids=token, use_cache=True, **past)
            self._wait()
            return time.perf_counter() - started

    def _first(self, tokens: int) -> Any:
        return self.model(input_ids=self._tokens[:, :tokens], use_cache=True, logits_to_keep=1)


def _nothing() -> None:
    """A CPU is done when a call returns."""


class Clock:
    """The time that may be taken: so much if it suffices, and never more than the limit."""

    def __init__(self, seconds: float, limit: float) -> None:
        """Both count from now on."""
        self._started = time.monotonic()
        self.seconds, self.limit = min(seconds, limit), limit

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return self._started + self.limit - time.monotonic()

    def left_of(self, rounds_seconds: float) -> float:
        """Seconds until the time is enough and rounds are done that take so long, if the limit allows."""
        enough = self._started + self.seconds - time.monotonic()
        return max(min(max(enough, rounds_seconds), self.left), 0.0)

    def is_enough(self) -> bool:
        """Whether the time that should suffice is over."""
        return time.monotonic() >= self._started + self.seconds


def choose_turn(runners: Sequence[Runner], clock: Clock) -> Turn:
    """Warm up, and choose from what that takes how much a round may hold on this machine."""
    share = clock.seconds / 2 / MOST_ROUNDS  # of a round, for decoding and for the prompt each
    token = sum(runner.decode(1) for runner in runners)
    if token < share:  # the first step of all has more to do than the next
        token = sum(runner.decode(2) for runner in runners) / 2
    longest = min(runner.longest for runner in runners)
    decoded = max(1, min(int(share / token), MOST_DECODED, longest - SHORT_PROMPT))

    def leaves_time(seconds: float) -> bool:
        return LEAST_ROUNDS * (token * decoded + seconds) <= clock.left

    prompt, prompt_seconds = 0, 0.0
    expected = token * PROMPTS[0] / 8  # at once they are several times as fast
    for length in PROMPTS:
        if length > longest or not leaves_time(expected) or (prompt and expected > share):
            break
        took = sum(runner.prefill(length) for runner in runners)
        if not leaves_time(took):
            break
        prompt, prompt_seconds, expected = length, took, 2 * took
    return Turn(decoded, prompt, token * decoded + prompt_seconds)


def in_turns(
    runners: Mapping[str, Runner],
    turn: Turn,
    clock: Clock,
    told: Callable[[str, float], None] = lambda text, left: None,
    *,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> dict[str, Times]:
    """Time models that are warm, in rounds until the time is enough.

    Args:
        told: is told of each round, and of the seconds that are left.
        least: rounds that there are however long they take, up to the clock's limit.
        most: rounds after which there are no more.

    Returns:
        By the models' names. Each has as many times as there were whole rounds.
    """
    times = {name: Times() for name in runners}
    order = list(runners)
    begun, one = time.monotonic(), turn.seconds
    for number in range(most):
        if number >= least and clock.is_enough():
            break
        left = clock.left_of(max(least - number, 1) * one)
        if one:  # known from the first round on, and from its choice where that was timed
            left = min(left, (most - number) * one)
        told(f"{', '.join(runners)}: round {number + 1} of at most {most}", left)
        taken: dict[str, tuple[float | None, float | None]] = {}
        for name in order:
            if clock.left <= 0:
                return times
            runner = runners[name]
            taken[name] = (
                runner.decode(turn.decoded) / turn.decoded if turn.decoded else None,
                runner.prefill(turn.prompt) / turn.prompt if turn.prompt else None,
            )
        for name, (decode, prefill) in taken.items():
            times[name].decode.extend([] if decode is None else [decode])
            times[name].prefill.extend([] if prefill is None else [prefill])
        order.reverse()  # so that nobody always comes after the same
        one = (time.monotonic() - begun) / (number + 1)
    return times


def speed_of(times: Sequence[float], least: int = LEAST_ROUNDS) -> float | None:
    """Tokens per second, the median, to four digits; None where there were too few rounds."""
    if len(times) < least:
        return None
    return float(f"{1 / statistics.median(times):.4g}")


def ratio_of(
    source: Sequence[float], variant: Sequence[float], least: int = LEAST_ROUNDS
) -> Ratio | None:
    """How many times as fast as its source a variant was; None where there were too few rounds."""
    ratios = [one / other for one, other in zip(source, variant, strict=True)]
    if len(ratios) < least:
        return None
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(*(float(f"{value:.4g}") for value in (median, low, high)))
