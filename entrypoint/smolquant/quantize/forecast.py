"""Roughly how long each phase of a run will take on this machine, told before it begins.

From the sizes, the number of cores, how fast this process multiplies and compares predictions just now, how
long it took to get ready, and a few constants that are on the careful side. Nothing is decided by it.
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
_MEASURING = 1.9
"""What running a layer costs, in multiplications of its weights: attention, norms, unpacking."""
_CALIBRATING = 4.0
"""What calibrating costs in runs over the same text."""
_IMPORTS = 0.8
"""What the process that measures speed takes to get ready, as a share of what this one took until now."""
_LOADING = 0.35
"""What it takes for each model that it loads to be tried, and again to be timed: likewise."""
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
    """Those of layers: the embeddings are not multiplied with."""
    vocabulary: int
    variants: int
    calibrated: int
    """How many of the variants are calibrated."""
    tokens: int
    """Tokens that quality is measured on; 0 where it is not."""


@dataclass(frozen=True)
class Machine:
    """How fast this machine is just now."""

    cores: int
    flops: float
    """Floating-point operations in a second."""
    comparing: float
    """Seconds that what two models predict of an entry of the vocabulary takes after a token, each."""
    getting_ready: float
    """Seconds of computing that this process took until now, most of them for importing libraries."""


def forecast(plans: Plans, source: Source, settings: Settings, tokens: int) -> str:
    """What will happen, and roughly how long each phase takes here; one line.

    Args:
        tokens: the number that quality is measured on; 0 where nothing is measured.
    """
    variants = plans.variants.values()
    model = plans.architecture.model
    made = sum(plan.size_bytes for plan in variants)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(end.weight): end.weight for end in ends if end is not None}
    vocabulary, width = list(tables.values())[-1].shape if tables else (0, 1)
    amounts = Amounts(
        source_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        fetched_bytes=source.to_fetch().size,
        uploaded_bytes=made if settings.publishes else 0,
        parameters=sum(
            parameter.numel() for parameter in model.parameters() if id(parameter) not in tables
        ),
        vocabulary=vocabulary,
        variants=len(plans.variants),
        calibrated=sum(plan.scheme.calibration_sha256 is not None for plan in variants),
        tokens=tokens,
    )
    machine = Machine(
        cores=len(os.sched_getaffinity(0)),
        flops=multiplied_in_a_second(),
        comparing=compared_in(width) if tokens else 0.0,
        getting_ready=time.process_time(),
    )
    told = [f"{name} {about(seconds)}" for name, seconds in phases(amounts, machine)]
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    return f"Ahead, on {cores}: {', '.join(told)}"


def phases(amounts: Amounts, machine: Machine) -> Iterator[tuple[str, float]]:
    """Each phase and its seconds, in the run's order."""
    one_token = 2 * amounts.parameters * _MEASURING / machine.flops
    if amounts.fetched_bytes:
        yield f"downloading {human_size(amounts.fetched_bytes)}", amounts.fetched_bytes / _HUB_BYTES
    if amounts.calibrated:
        yield "calibrating", amounts.calibrated * CALIBRATION_TOKENS * one_token * _CALIBRATING
    yield "quantizing", amounts.source_bytes * amounts.variants / (_QUANTIZED_BYTES * machine.cores)
    if amounts.tokens:
        models = 1 + amounts.variants
        comparing = amounts.vocabulary * machine.comparing
        yield "measuring quality", models * amounts.tokens * (one_token + comparing)
        loading = (_IMPORTS + models * _LOADING) * machine.getting_ready
        timing = models * max(SECONDS_A_MODEL, _SPEED_TOKENS * one_token)
        yield "measuring speed", loading + min(timing, LIMIT_SECONDS)
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


def compared_in(width: int) -> float:
    """Seconds that what two models predict of an entry of the vocabulary takes after a token, each.

    Args:
        width: the hidden size.
    """
    from smolquant.evaluate.measure import compared_seconds

    entries, tokens = 4_096, 512
    return compared_seconds(entries, width, tokens) / (2 * entries * tokens)
