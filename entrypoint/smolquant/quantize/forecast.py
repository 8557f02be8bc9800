"""Roughly how long each phase of a run will take on this machine, told before it begins.

From the sizes, the number of cores, how fast this process multiplies just now, and a few constants that are
on the careful side. Nothing is decided by it.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from smolquant.checkpoint.source import Source
from smolquant.evaluate.speed import LIMIT_SECONDS, SECONDS_A_MODEL
from smolquant.quantize.calibrate import TOKENS as CALIBRATION_TOKENS
from smolquant.quantize.planning import Plans
from smolquant.runtime.many_tokens import matmul_dtype
from smolquant.settings import Settings
from smolquant.text import about, human_size

_QUANTIZED_BYTES = 100_000_000
"""Bytes of the source that a core quantizes in a second, for each variant; docs/performance.md has more."""
_HUB_BYTES = 20_000_000
"""Bytes a second to or from the Hub."""
_MEASURING = 1.6
"""What running a layer costs, beside multiplying its weights: attention, norms, unpacking."""
_CALIBRATING = 4.0
"""What calibrating costs in runs over the same text."""
_LOADING_SECONDS = 8.0
"""A small model that is loaded to be tried, and again to be timed, while speed is measured."""
_SPEED_TOKENS = 1_200
"""Tokens that a model then works through: prompts, and generated ones that cost more."""
_PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Amounts:
    """What a run has to do."""

    source_bytes: int
    fetched_bytes: int
    uploaded_bytes: int
    parameters: int
    variants: int
    calibrated: int
    """How many of the variants are calibrated."""
    tokens: int
    """Tokens that quality is measured on; 0 where it is not."""


def forecast(plans: Plans, source: Source, settings: Settings, tokens: int) -> str:
    """What will happen, and roughly how long each phase takes here; one line.

    Args:
        tokens: the number that quality is measured on; 0 where nothing is measured.
    """
    variants = plans.variants.values()
    model = plans.architecture.model
    made = sum(plan.size_bytes for plan in variants)
    amounts = Amounts(
        source_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        fetched_bytes=source.to_fetch().size,
        uploaded_bytes=made if settings.publishes else 0,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        variants=len(plans.variants),
        calibrated=sum(plan.scheme.calibration_sha256 is not None for plan in variants),
        tokens=tokens,
    )
    cores = len(os.sched_getaffinity(0))
    told = [
        f"{name} {about(seconds)}"
        for name, seconds in phases(amounts, cores, multiplied_in_a_second())
    ]
    machine = f"{cores} core{'s' if cores > 1 else ''}"
    return f"Ahead, on {machine}: {', '.join(told)}"


def phases(amounts: Amounts, cores: int, flops: float) -> Iterator[tuple[str, float]]:
    """Each phase and its seconds, in the run's order.

    Args:
        flops: floating-point operations that this machine does in a second.
    """
    one_token = 2 * amounts.parameters * _MEASURING / flops
    if amounts.fetched_bytes:
        yield f"downloading {human_size(amounts.fetched_bytes)}", amounts.fetched_bytes / _HUB_BYTES
    if amounts.calibrated:
        yield "calibrating", amounts.calibrated * CALIBRATION_TOKENS * one_token * _CALIBRATING
    yield "quantizing", amounts.source_bytes * amounts.variants / (_QUANTIZED_BYTES * cores)
    if amounts.tokens:
        models = 1 + amounts.variants
        yield "measuring quality", models * amounts.tokens * one_token
        timing = models * max(SECONDS_A_MODEL, _SPEED_TOKENS * one_token)
        yield "measuring speed", models * _LOADING_SECONDS + min(timing, LIMIT_SECONDS)
    if amounts.uploaded_bytes:
        yield f"uploading {human_size(amounts.uploaded_bytes)}", amounts.uploaded_bytes / _HUB_BYTES


def multiplied_in_a_second() -> float:
    """Floating-point operations in a second, measured on a weight and activations of usual sizes, in the
    dtype that this CPU multiplies bfloat16 weights in."""
    dtype = matmul_dtype(torch.bfloat16)
    weight = torch.ones(1024, 1024, dtype=dtype)
    inputs = torch.ones(256, 1024, dtype=dtype)
    torch.nn.functional.linear(inputs, weight)  # the first one prepares
    rounds, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < _PROBE_SECONDS:
        torch.nn.functional.linear(inputs, weight)
        rounds += 1
    return 2 * weight.numel() * len(inputs) * rounds / seconds
