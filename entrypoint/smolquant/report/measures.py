"""What is measured of a variant: how it is called and how its numbers read, on cards and in summaries."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from smolquant.record import Metrics
from smolquant.schemes import Scheme
from smolquant.text import human_size, percent, significant


def _nothing(_: Metrics) -> None:
    """The source has no number of its own where a measure compares it with the variant."""


@dataclass(frozen=True)
class Measure:
    """A quantity that is measured of a variant and, where the source has one of its own, of the source."""

    title: str
    of_variant: Callable[[Metrics], float | None]
    show: Callable[[float], str]
    of_source: Callable[[Metrics], float | None] = _nothing
    on_machine: bool = False
    """Whether it is a matter of the machine; otherwise of the text."""
    hub: tuple[str, str] | None = None
    """Identifier and name in a card's front matter."""

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
    lambda m: m.perplexity,
    "{:.3f}".format,
    of_source=lambda m: m.source_perplexity,
    hub=("perplexity", "Perplexity"),
)
PERPLEXITY_INCREASE = Measure(
    "Perplexity increase",
    lambda m: m.perplexity_increase_percent,
    lambda change: f"{significant(change, signed=True)}%",
)
MEAN_KL = Measure(
    "Mean KL",
    lambda m: m.mean_kl,
    significant,
    hub=("kl_divergence", "Mean KL divergence from the original model, nats"),
)
TOP1_AGREEMENT = Measure(
    "Same top token",
    lambda m: m.top1_agreement,
    percent,
    hub=("top1_agreement", "Top-1 agreement with the original model"),
)
DECODING = Measure(
    "Tokens/s",
    lambda m: m.tokens_per_second,
    "{:.1f}".format,
    of_source=lambda m: m.source_tokens_per_second,
    on_machine=True,
)
PREFILL = Measure(
    "Prompt tokens/s",
    lambda m: m.prefill_tokens_per_second,
    "{:.1f}".format,
    of_source=lambda m: m.source_prefill_tokens_per_second,
    on_machine=True,
)
PEAK_MEMORY = Measure(
    "Peak memory",
    lambda m: m.peak_memory_bytes,
    lambda n_bytes: human_size(int(n_bytes)),
    of_source=lambda m: m.source_peak_memory_bytes,
    on_machine=True,
)

MEASURES = (
    PERPLEXITY,
    PERPLEXITY_INCREASE,
    MEAN_KL,
    TOP1_AGREEMENT,
    DECODING,
    PREFILL,
    PEAK_MEMORY,
)
"""All measures, in the order in which a card shows them."""


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


def has_quality(metrics: Metrics) -> bool:
    """Whether anything was measured on a text."""
    return any(one.variant(metrics) for one in MEASURES if not one.on_machine)


def has_speed(metrics: Metrics) -> bool:
    """Whether anything was measured of the machine: speed, or memory."""
    return any(one.variant(metrics) for one in MEASURES if one.on_machine)
