"""What is measured of a variant: how it is called, how its numbers read, and what they say, everywhere."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from smolquant.record import Metrics, shows_no_difference
from smolquant.schemes import Scheme
from smolquant.text import human_size, percent, significant


def _nothing(_: Metrics) -> None:
    """The source has no number of its own where a measure compares it with the variant."""


@dataclass(frozen=True)
class Measure:
    """A quantity that is measured of a variant and, where the source has one of its own, of the source."""

    title: str
    meaning: str
    """One line that goes on after the title and a colon."""
    of_variant: Callable[[Metrics], float | None]
    show: Callable[[float], str]
    of_source: Callable[[Metrics], float | None] = _nothing
    on_machine: bool = False
    """Whether it is a matter of the machine; otherwise of the text."""
    hub: tuple[str, str] | None = None
    """Identifier and name in a card's front matter."""

    def value(self, metrics: Metrics | None) -> float | None:
        """The variant's number; None where it was not measured, or is none."""
        value = None if metrics is None else self.of_variant(metrics)
        return None if value is None or not math.isfinite(value) else value

    def variant(self, metrics: Metrics | None) -> str:
        """The variant's number as people read it; empty where it was not measured."""
        return "" if metrics is None else self._shown(self.of_variant(metrics))

    def source(self, metrics: Metrics | None) -> str:
        """The source's number as people read it; empty where it was not measured."""
        return "" if metrics is None else self._shown(self.of_source(metrics))

    def beside_source(self, metrics: Metrics | None) -> str:
        """The variant's number after the source's, ``20.0 → 40.0``, or alone where that is missing."""
        variant, source = self.variant(metrics), self.source(metrics)
        return f"{source} → {variant}" if variant and source else variant

    def _shown(self, value: float | None) -> str:
        return "" if value is None or not math.isfinite(value) else self.show(value)


PERPLEXITY = Measure(
    "Perplexity",
    "how hard the text is to predict for a model; lower is better.",
    lambda m: m.perplexity,
    "{:.3f}".format,
    of_source=lambda m: m.source_perplexity,
    hub=("perplexity", "Perplexity"),
)
PERPLEXITY_INCREASE = Measure(
    "Perplexity change",
    "how much harder the text is to predict for the variant than for the original; 0% is no loss.",
    lambda m: m.perplexity_increase_percent,
    lambda change: f"{significant(change, signed=True)}%",
)
MEAN_KL = Measure(
    "Mean KL",
    "how far the variant's predictions are from the original's, in nats; 0 is no distance.",
    lambda m: m.mean_kl,
    significant,
    hub=("kl_divergence", "Mean KL divergence from the original model, nats"),
)
TOP1_AGREEMENT = Measure(
    "Same top token",
    "how often the variant's first choice of the next token is the original's.",
    lambda m: m.top1_agreement,
    percent,
    hub=("top1_agreement", "Top-1 agreement with the original model"),
)
DECODING = Measure(
    "Tokens/s",
    "how many tokens a second are generated, one sequence at a time.",
    lambda m: m.tokens_per_second,
    "{:.1f}".format,
    of_source=lambda m: m.source_tokens_per_second,
    on_machine=True,
)
PREFILL = Measure(
    "Prompt tokens/s",
    "how many tokens a second of a prompt are read.",
    lambda m: m.prefill_tokens_per_second,
    "{:.1f}".format,
    of_source=lambda m: m.source_prefill_tokens_per_second,
    on_machine=True,
)
PEAK_MEMORY = Measure(
    "Peak memory",
    "the most that a process takes which loads the model and generates.",
    lambda m: m.peak_memory_bytes,
    lambda n_bytes: human_size(int(n_bytes)),
    of_source=lambda m: m.source_peak_memory_bytes,
    on_machine=True,
)

QUALITY = (PERPLEXITY, PERPLEXITY_INCREASE, MEAN_KL, TOP1_AGREEMENT)
"""The measures of a text, in the order in which a card shows them."""
HEADLINES = (PERPLEXITY_INCREASE, TOP1_AGREEMENT)
"""Those that compare a variant with its original, and that everybody understands."""
SPEEDS = (DECODING, PREFILL)
MEASURES = (*QUALITY, *SPEEDS, PEAK_MEMORY)


class Loss(IntEnum):
    """How much of the original's quality a variant has lost."""

    NOTHING = 0
    LITTLE = 1
    SOME = 2
    MUCH = 3

    @property
    def words(self) -> str:
        """What a variant has done, for the middle of a sentence."""
        return ("lost next to nothing", "lost little", "lost noticeably", "lost much")[self]


_LIMITS: tuple[tuple[Measure, Callable[[float], float], tuple[float, float, float]], ...] = (
    (PERPLEXITY_INCREASE, lambda change: change, (0.5, 2.0, 10.0)),
    (MEAN_KL, lambda nats: nats, (0.01, 0.03, 0.15)),
    (TOP1_AGREEMENT, lambda share: 1 - share, (0.03, 0.07, 0.20)),
)
"""Of each measure how it tells a loss, and the largest that is next to nothing, little, and noticeable.

By them 8-bit weights of most models lose next to nothing or little, and 4-bit weights of a small model,
whose perplexity rises by a third, lose much."""


def loss_of(metrics: Metrics | None) -> Loss | None:
    """How much was lost, by the measure that tells most; None where no quality was measured."""
    losses = [
        Loss(sum(as_loss(value) > limit for limit in limits))
        for measure, as_loss, limits in _LIMITS
        if (value := measure.value(metrics)) is not None
    ]
    return max(losses, default=None)


def loss_numbers(metrics: Metrics | None) -> str:
    """``perplexity +0.3%, same top token 97.1%``: what :func:`loss_of` is told by; empty for nothing."""
    shown = [
        (measure.title.removesuffix(" change"), number)
        for measure in HEADLINES
        if (number := measure.variant(metrics))
    ] or [(MEAN_KL.title, MEAN_KL.variant(metrics))]
    return ", ".join(f"{_in_a_sentence(title)} {number}" for title, number in shown if number)


def _in_a_sentence(title: str) -> str:
    return title[:1].lower() + title[1:]


def speed_words(metrics: Metrics | None) -> str:
    """What cards and summaries say of speed, for the end of a sentence; empty where nothing was measured.

    It is said here and nowhere else.
    """
    if metrics is None:
        return ""
    said = []
    for measure, verb, ratio, spread in (
        (DECODING, "generates", metrics.speed_ratio, metrics.speed_ratio_spread),
        (PREFILL, "reads a prompt at", metrics.prefill_ratio, metrics.prefill_ratio_spread),
    ):
        variant, source = measure.variant(metrics), measure.source(metrics)
        if not variant:
            continue
        beside = f" (the original: {source})" if source else ""
        said.append(f"{verb} {variant} tokens a second{beside}{_faster(ratio, spread)}")
    return " and ".join(said)


def _faster(ratio: float | None, spread: tuple[float, float] | None) -> str:
    """What may be said of a ratio of speeds, given its quartiles; nothing where it was not measured."""
    if ratio is None or spread is None:
        return ""
    if shows_no_difference(spread):
        return ", no difference measured"
    low, high = spread
    return f", {ratio:.2f} times its speed (half of the rounds: {low:.2f} to {high:.2f})"


def measured_as(scheme: Scheme | None, metrics: Metrics | None) -> str:
    """The scheme's sentence on how quality was measured, where the machine lacked its kernels; else empty.

    The record tells the GPU's compute capability, and the scheme the least one that it needs. A record
    that tells of no GPU was measured on a CPU.
    """
    if scheme is None or metrics is None or not has_quality(metrics):
        return ""
    had, needed = metrics.compute_capability, scheme.cuda_capability
    as_it_runs = had is not None and needed is not None and had >= needed[0] + needed[1] / 10
    return "" if as_it_runs else scheme.measured_as


def any_measured(measure: Measure, metrics: Iterable[Metrics | None]) -> bool:
    """Whether one of several variants has a number."""
    return any(map(measure.variant, metrics))


def has_quality(metrics: Metrics) -> bool:
    """Whether anything was measured on a text."""
    return any(one.variant(metrics) for one in QUALITY)


def has_speed(metrics: Metrics) -> bool:
    """Whether anything was measured of the machine: speed, or memory."""
    return any(one.variant(metrics) for one in MEASURES if one.on_machine)
