"""What each variant is worth on a GPU: decoding and a prompt, beside bf16 of the same model.

``make bench-gpu``, or ``python bench/gpu_speed.py``, makes a random model of about a billion parameters
and its variants, loads all of them at once and lets them take turns, so that what else the machine does
meets all; medians are printed. SIZE picks another of perf.py's shapes, DEVICE another device, SECONDS the
time after which no further round begins.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import perf
from smolquant.runtime.kernels import has_kernels, kernels
from smolquant.runtime.load import load_model
from smolquant.schemes import BY_VARIANT, SCHEMES

PROMPT_TOKENS = 512
NEW_TOKENS = 64
ROUNDS = 7
SOURCE = "bf16"


@dataclass
class Times:
    """Seconds of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def quantize(source: Path, output: Path, device: str) -> None:
    """Every type in one run; int4 by rounding, since only speed counts."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "smolquant", "quantize", str(source), "--save-only"]
    command += ["--evaluate", "never", "--device", device, "--quant-type", ",".join(SCHEMES)]
    command += ["--int4-method", "rtn", "--output-dir", str(output)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The variants could not be made:\n{done.stdout}{done.stderr}")


def load_all(source: Path, output: Path, device: str) -> dict[str, Any]:
    """The source, and each variant that has kernels on ``device``."""
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {
        SOURCE: AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map=device)
    }
    for variant, scheme in BY_VARIANT.items():
        if has_kernels(scheme, device):
            models[variant] = load_model(output / variant, scheme, device)
        else:
            print(f"{variant}: {device} has no kernels for it", flush=True)
    return models


def take_turns(
    models: Mapping[str, Any], seconds: float, prompt_tokens: int, new_tokens: int
) -> dict[str, Times]:
    """The times of each model, of up to :data:`ROUNDS` rounds after one that warms up."""
    end = time.monotonic() + seconds
    times = {name: Times() for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            prefill, decode = generate(model, prompt_tokens, new_tokens)
            if number:
                times[name].prefill.append(prefill)
                times[name].decode.append(decode)
        print(f"round {number} of {ROUNDS}", flush=True)
        if number and time.monotonic() > end:
            break
    return times


@torch.inference_mode()
def generate(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for a prompt, and for the tokens after it, greedily."""
    device: torch.device = model.device
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), device=device)
    with warnings.catch_warnings():  # transformers is renaming past_key_values
        warnings.simplefilter("ignore", FutureWarning)
        return _timed(model, prompt, new_tokens, wait)


def _timed(
    model: Any, prompt: torch.Tensor, new_tokens: int, wait: Callable[[], None]
) -> tuple[float, float]:
    wait()
    started = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    wait()
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    wait()
    return prefilled - started, time.perf_counter() - prefilled


def _nothing() -> None:
    """A CPU is done when a call returns."""


def table(
    models: Mapping[str, Any], times: Mapping[str, Times], prompt_tokens: int, new_tokens: int
) -> str:
    """Markdown: tokens per second of each model, beside the source's, and its kernels."""
    rows = ["| | decode | to bf16 | prefill | to bf16 | kernels |", "|---|--:|--:|--:|--:|---|"]
    base = times[SOURCE]
    for name, taken in times.items():
        cells = [name]
        for seconds, of_source, tokens in (
            (taken.decode, base.decode, new_tokens),
            (taken.prefill, base.prefill, prompt_tokens),
        ):
            ratios = [one / other for one, other in zip(of_source, seconds, strict=True)]
            cells.append(f"{tokens / statistics.median(seconds):,.1f} tok/s")
            cells.append(f"{statistics.median(ratios):.2f} x")
        used = sorted(set(kernels(models[name]).values())) if name != SOURCE else []
        rows.append(f"| {' | '.join([*cells, '; '.join(used)])} |")
    return "\n".join(rows)


def conditions(device: str) -> str:
    """The machine, and the versions of what computes."""
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao", "transformers"))
    if device != "cuda":
        return f"{device}; {stack}"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, capability {major}.{minor}; {stack}"


def measure(
    source: Path,
    work: Path,
    device: str,
    seconds: float,
    sizes: Sequence[int] = (PROMPT_TOKENS, NEW_TOKENS),
) -> str:
    """Make the variants of ``source`` in ``work``, and measure them: the report, in Markdown."""
    quantize(source, work, device)
    models = load_all(source, work, device)
    times = take_turns(models, seconds, *sizes)
    rounds = len(times[SOURCE].decode)
    prompt_tokens, new_tokens = sizes
    heading = (
        f"{conditions(device)}. One sequence, a prompt of {prompt_tokens} tokens and {new_tokens} new "
        f"ones, eager, dynamic cache; medians of {rounds} rounds in turns."
    )
    return f"{heading}\n\n{table(models, times, *sizes)}"


def main() -> None:
    """Print the report, or why there is none."""
    device = os.environ.get("DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        print("Skipped: torch sees no GPU.")
        return
    perf.WORK.mkdir(exist_ok=True)
    source = perf.build(os.environ.get("SIZE", "1"))
    print(measure(source, perf.WORK / "gpu", device, float(os.environ.get("SECONDS", "120"))))


if __name__ == "__main__":
    main()
