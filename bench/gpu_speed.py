"""What each variant is worth on a GPU: decoding and a prompt, beside bf16 of the same model.

``make bench-gpu``, or ``python bench/gpu_speed.py``, makes a random model of about a billion parameters
and its variants, loads all of them at once and lets them take turns, so that what else the machine does
meets all; medians are printed. SIZE picks another of perf.py's shapes, DEVICE another device, SECONDS the
time after which no further round begins.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import perf
from smolquant.evaluate.rounds import (
    LEAST_ROUNDS,
    Clock,
    Runner,
    Times,
    Turn,
    in_turns,
    ratio_of,
    speed_of,
)
from smolquant.runtime.kernels import has_kernels, kernels
from smolquant.runtime.load import load_model
from smolquant.schemes import BY_VARIANT, SCHEMES

PROMPT_TOKENS = 512
NEW_TOKENS = 64
ROUNDS = 7
SOURCE = "bf16"


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


def table(runners: Mapping[str, Runner], times: Mapping[str, Times]) -> str:
    """Markdown: tokens per second of each model, beside the source's, and its kernels."""
    rows = ["| | decode | to bf16 | prefill | to bf16 | kernels |", "|---|--:|--:|--:|--:|---|"]
    for name, taken in times.items():
        cells = [name]
        for what in ("decode", "prefill"):
            seconds, of_source = getattr(taken, what), getattr(times[SOURCE], what)
            speed, ratio = speed_of(seconds, least=1), ratio_of(of_source, seconds, LEAST_ROUNDS)
            cells.append(f"{speed:,.1f} tok/s" if speed else "")
            cells.append(
                f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
            )
        used = sorted(set(kernels(runners[name].model).values())) if name != SOURCE else []
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
    runners = {
        name: Runner(model, device) for name, model in load_all(source, work, device).items()
    }
    prompt_tokens, new_tokens = sizes
    for runner in runners.values():  # warm up
        runner.prefill(prompt_tokens)
        runner.decode(new_tokens)
    clock = Clock(seconds, float("inf"))
    turn = Turn(new_tokens, prompt_tokens)
    times = in_turns(runners, turn, clock, partial(print, flush=True), most=ROUNDS)
    rounds = len(times[SOURCE].decode)
    heading = (
        f"{conditions(device)}. One sequence: {new_tokens} tokens after a short prompt, and a prompt of "
        f"{prompt_tokens}; eager, dynamic cache; medians of {rounds} rounds in turns."
    )
    return f"{heading}\n\n{table(runners, times)}"


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
