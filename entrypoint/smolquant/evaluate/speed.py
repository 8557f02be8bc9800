"""Tokens per second and peak memory of a model on this machine, each in a process of its own.

Of its own, because only then is the peak that of the model, and because a model that does not fit takes
nothing down with it. Loaded as users load it: stock transformers for the source, and this machine's kernel
for a variant. So it is also the proof that a variant is loaded and runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolquant.environment import child_environment
from smolquant.memory import available_bytes, is_out_of_memory, peak_bytes
from smolquant.model.context import longest_context
from smolquant.schemes import BY_VARIANT
from smolquant.text import error_words

PROMPT_TOKENS = 256
NEW_TOKENS = 32
REPEATS = 3
TIMEOUT_SECONDS = 600.0

_FOOTPRINT_BYTES = 900_000_000
"""What a process takes with torch and transformers in it."""


@dataclass(frozen=True)
class Speed:
    """The speed of a model that ran one sequence at a time."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    """On a CPU of the whole process, on CUDA of the device's memory."""


class DoesNotRun(Exception):
    """Loading a model, or predicting with it, raised an error; says which."""


def measure_speed(
    folder: Path,
    *,
    weight_bytes: int,
    variant: str | None = None,
    device: str = "cpu",
    code: Path | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Speed | None:
    """Load the model in ``folder``, let it predict, and let it generate.

    Args:
        weight_bytes: the size of its files; where this machine has less memory left, it is not tried.
        variant: what it is a variant of; None for a source.
        code: a folder with code of the model's own, which may run; None where none may.
        timeout: seconds, loading included.

    Returns:
        None where it does not fit, takes too long, has no kernels here, or does not generate step by step:
        speed is told where it can be had, and nothing hangs on it.

    Raises:
        DoesNotRun: it cannot be loaded, or not predict.
    """
    if device == "cpu" and weight_bytes * 1.2 + _FOOTPRINT_BYTES > available_bytes():
        return None
    options = ["--variant", variant] if variant else []
    options += ["--trust-remote-code"] if code else []
    with _beside_its_code(folder, code) as place:
        command = [sys.executable, "-m", "smolquant.evaluate.speed", os.fspath(place), device]
        try:
            child = subprocess.run(  # noqa: S603 - this interpreter and this module
                [*command, *options],
                capture_output=True,
                check=True,
                timeout=timeout,
                env=_environment(),
            )
            outcome = json.loads(child.stdout.splitlines()[-1])
            speed = Speed(**outcome["speed"]) if outcome["speed"] else None
        except (subprocess.SubprocessError, OSError, ValueError, TypeError, LookupError):
            return None
    if outcome["fault"]:
        raise DoesNotRun(outcome["fault"])
    return speed


@contextmanager
def _beside_its_code(folder: Path, code: Path | None) -> Iterator[Path]:
    """``folder`` in a form in which its model's own code is found, before it is published.

    A variant's config names code at the root of a repository, which need not be there yet.
    """
    config = folder / "config.json"
    own = (
        json.loads(config.read_text("utf-8")).get("auto_map") if code and config.is_file() else None
    )
    if code is None or not own or code == folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="smolquant-speed-") as name:
        place = Path(name)
        for path in [*code.glob("*.py"), *folder.iterdir()]:
            if not (place / path.name).exists():
                (place / path.name).symlink_to(path.resolve())
        for path in place.glob("*config.json"):
            entries = json.loads(path.read_text("utf-8"))
            if isinstance(entries.get("auto_map"), dict):
                entries["auto_map"] = _local(entries["auto_map"])
                path.unlink()
                path.write_text(json.dumps(entries), encoding="utf-8")
        yield place


def _local(code: Any) -> Any:
    """References to code without the repository that they name."""
    if isinstance(code, dict):
        return {auto: _local(item) for auto, item in code.items()}
    if isinstance(code, list):
        return [_local(item) for item in code]
    return code.rpartition("--")[2] if isinstance(code, str) else code


def _environment() -> dict[str, str]:
    """A child's, able to find this package, and kept off the network."""
    package_root = os.fspath(Path(__file__).parents[2])
    search_path = os.environ.get("PYTHONPATH")
    return {
        **child_environment(os.environ),
        "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [search_path])]),
        "HF_HUB_OFFLINE": "1",
    }


def _outcome(
    folder: Path, device: str, variant: str | None, trust_remote_code: bool
) -> tuple[Speed | None, str]:
    """How fast the model is, and why it does not run; the speed is None where kernels are missing.

    Raises:
        Exception: this machine lacks memory, or the model does not generate step by step.
    """
    import torch

    from smolquant.runtime.kernels import has_kernels

    torch.manual_seed(0)
    try:
        model = _load(folder, device, variant, trust_remote_code)
        prompt_tokens = min(PROMPT_TOKENS, longest_context(model.config) - NEW_TOKENS)
        rows = model.get_input_embeddings().weight.shape[0]
        prompt = torch.randint(rows, (1, prompt_tokens), device=device)
        with torch.inference_mode():
            logits = model(input_ids=prompt, use_cache=False).logits[:, -1]
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno is not None):
            raise
        return None, error_words(error)
    if not bool(torch.isfinite(logits).all()):
        return None, "what it predicts is not finite"
    if variant is not None and not has_kernels(BY_VARIANT[variant], device):
        return None, ""
    return _speed(model, prompt, device), ""


def _load(folder: Path, device: str, variant: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    from smolquant.model.task import auto_class
    from smolquant.runtime.load import load_model

    if variant is not None:
        model: Any = load_model(
            folder, BY_VARIANT[variant], device, trust_remote_code=trust_remote_code
        )
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(
            folder, device_map=device, trust_remote_code=trust_remote_code
        )
    return model.eval()


def _speed(model: Any, prompt: Any, device: str) -> Speed:
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else _nothing
    with torch.inference_mode():
        runs = [_generate(model, prompt, synchronize) for _ in range(1 + REPEATS)]
    prefill, decode = zip(*runs[1:], strict=True)  # the first one warms up
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return Speed(
        prefill_tokens_per_second=float(f"{prompt.shape[1] / statistics.median(prefill):.4g}"),
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
    parser.add_argument("--variant")
    parser.add_argument("--trust-remote-code", action="store_true")
    asked = parser.parse_args()
    speed, fault = _outcome(asked.folder, asked.device, asked.variant, asked.trust_remote_code)
    outcome = {"speed": speed and asdict(speed), "fault": fault}
    sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
