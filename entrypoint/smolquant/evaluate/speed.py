"""Tokens per second and peak memory of a model on this machine, each in a process of its own.

Of its own, because only then is the peak that of the model, and because a model that does not fit takes
nothing down with it. Loaded as users load it: stock transformers for the source, and this machine's kernel
for a variant.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolquant.memory import available_bytes, peak_bytes
from smolquant.model.context import longest_context

PROMPT_TOKENS = 256
NEW_TOKENS = 32
REPEATS = 3
TIMEOUT_SECONDS = 600.0

_FOOTPRINT_BYTES = 900_000_000
"""Of a process with torch and transformers in it."""


@dataclass(frozen=True)
class Speed:
    """How fast a model ran, one sequence at a time."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    """On a CPU of the whole process, on CUDA of the device's memory."""


def measure_speed(
    folder: Path,
    *,
    weight_bytes: int,
    device: str = "cpu",
    trust_remote_code: bool = False,
    timeout: float = TIMEOUT_SECONDS,
) -> Speed | None:
    """Load the model in ``folder`` and let it generate.

    Args:
        weight_bytes: of its files; more than this machine has left means that it is not tried.
        timeout: seconds, loading included.

    Returns:
        None where it does not fit, takes too long, or cannot run here: speed is told where it can be
        had, and nothing hangs on it.
    """
    if device == "cpu" and weight_bytes * 1.2 + _FOOTPRINT_BYTES > available_bytes():
        return None
    command = [sys.executable, "-m", "smolquant.evaluate.speed", os.fspath(folder), device]
    if trust_remote_code:
        command.append("--trust-remote-code")
    try:
        child = subprocess.run(  # noqa: S603 - this interpreter and this module
            command, capture_output=True, check=True, timeout=timeout, env=_environment()
        )
        return Speed(**json.loads(child.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, OSError, ValueError, TypeError, IndexError):
        return None


def _environment() -> dict[str, str]:
    """This process's, without secrets, able to find this package, and kept off the network."""
    package_root = os.fspath(Path(__file__).parents[2])
    search_path = os.environ.get("PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD"))
    }
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [search_path])]),
        "HF_HUB_OFFLINE": "1",
    }


def _run(folder: Path, device: str, trust_remote_code: bool) -> Speed:
    import torch

    from smolquant.model.task import auto_class
    from smolquant.runtime.kernels import pack_model

    torch.manual_seed(0)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = (
        auto_class(config)
        .from_pretrained(folder, device_map=device, trust_remote_code=trust_remote_code)
        .eval()
    )
    pack_model(model)
    prompt_tokens = min(PROMPT_TOKENS, longest_context(model.config) - NEW_TOKENS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocabulary, (1, prompt_tokens), device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    with torch.inference_mode():
        runs = [_generate(model, prompt, synchronize) for _ in range(1 + REPEATS)]
    prefill, decode = zip(*runs[1:], strict=True)  # the first one warms up
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return Speed(
        prefill_tokens_per_second=float(f"{prompt_tokens / statistics.median(prefill):.4g}"),
        decode_tokens_per_second=float(f"{NEW_TOKENS / statistics.median(decode):.4g}"),
        peak_memory_bytes=peak,
    )


def _generate(model: Any, prompt: Any, synchronize: Callable[[], None]) -> tuple[float, float]:
    """Seconds for the prompt, and for :data:`NEW_TOKENS` tokens after it, greedily."""
    started = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    synchronize()
    prefilled = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    synchronize()
    return prefilled - started, time.perf_counter() - prefilled


def _nothing() -> None:
    """A CPU is done when a call returns."""


def main() -> None:
    """Measure one model and print a line of JSON; what :func:`measure_speed` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("device")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    speed = _run(options.folder, options.device, options.trust_remote_code)
    sys.stdout.write(json.dumps(asdict(speed)) + "\n")


if __name__ == "__main__":
    main()
