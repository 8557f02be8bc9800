"""What the kernels of loaded variants are worth on this machine: whole models, single layers, the limit.

``python bench/runtime.py [STEP ...]`` (or ``make bench-runtime``) takes the steps of :data:`STEPS`, or
those that are named, and writes each one's part of docs/runtime.json; `make docs` makes docs/runtime.md
and the README's table of it. ``prepare`` makes the models and nothing else. PROMPT is the prompt's length,
SECONDS the time that either of a model's two timings may take.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolquant.evaluate import machine
from smolquant.evaluate.bytes_read import bytes_read
from smolquant.evaluate.rounds import (
    Clock,
    Ratio,
    Runner,
    Times,
    Turn,
    in_turns,
    ratio_of,
    speed_of,
)
from smolquant.schemes import BY_VARIANT
from smolquant.threads import use_allowed_threads

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".bench/runtime"
RESULTS = ROOT / "docs/runtime.json"

SMALL, LARGE = "SmolLM2-135M", "random 1 B"
LARGE_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""TinyLlama's, with one table for the embedding and the head: 1.03 B parameters."""

SOURCE = "bf16"
VARIANTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("int8", ("--quant-type", "int8_weight_only")),
    "int4": (
        "int4",
        ("--quant-type", "int4_weight_only", "--group-size", "32", "--int4-method", "rtn"),
    ),
    "int8_dynamic": ("int8_dynamic", ("--quant-type", "int8_dynamic")),
    "int8, int8 embeddings": (
        "int8",
        ("--quant-type", "int8_weight_only", "--embeddings", "int8"),
    ),
}
"""Name -> the variant that it is loaded as, and what makes it; int4 by rounding, as only speed counts."""

PROMPT = int(os.environ.get("PROMPT", "512"))
SECONDS = float(os.environ.get("SECONDS", "45"))
DECODED = 24
LEAST = 3
"""Rounds without which there is no number: a prompt of 512 tokens takes seconds on a slow machine."""
PROFILED_TOKENS = 16
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ((192, 576), (576, 1536), (1536, 576), (2048, 2048), (5632, 2048), (2048, 5632))
"""(rows, columns) of the layers of both models, the smallest ones first."""
_AMONG = 1 << 27
"""Bytes of layers that take turns, so that caches hold none of them, as in a model."""


def model_folder(name: str) -> Path:
    """A model and its variants, made once: ``source``, and a folder for each variant."""
    place = WORK / name.replace(" ", "-")
    source = place / "source"
    if name == SMALL and not source.exists():
        place.mkdir(parents=True, exist_ok=True)
        source.symlink_to(ROOT / ".demo/checkpoint", target_is_directory=True)
    elif not (source / "config.json").is_file():
        build_large(source)
    for name_of_it, (variant, options) in VARIANTS.items():
        output = place / name_of_it.replace(" ", "-")
        if not (output / variant / "quantization.json").is_file():
            print(f"{name}: quantizing to {name_of_it}", flush=True)
            command = [sys.executable, "-m", "smolquant", "quantize", str(source), "--save-only"]
            command += ["--evaluate", "never", "--output-dir", str(output), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return place


def build_large(folder: Path) -> None:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LARGE_SHAPE, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02)
    partial_folder = folder.with_name("partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.save_pretrained(partial_folder)
    partial_folder.rename(folder)


def load(place: Path, name: str) -> Any:
    """A model as users load it."""
    from transformers import AutoModelForCausalLM

    from smolquant.runtime.load import load_model

    if name == SOURCE:
        return AutoModelForCausalLM.from_pretrained(place / "source", dtype="auto")
    variant, _ = VARIANTS[name]
    return load_model(place / name.replace(" ", "-") / variant, BY_VARIANT[variant], "cpu")


def whole_models(name: str) -> dict[str, Any]:
    """Decoding and a prompt of each variant beside the source, in turns; and where decoding's time goes."""
    from smolquant.runtime.kernels import kernels

    place = model_folder(name)
    runners, seconds, used = {}, {}, {}
    for one in (SOURCE, *VARIANTS):
        started = time.monotonic()
        model = load(place, one)
        seconds[one] = time.monotonic() - started
        used[one] = sorted(set(kernels(model).values())) if one != SOURCE else []
        runners[one] = Runner(model)
        runners[one].decode(2)  # the first step has more to do than the next
    decoding = in_turns(runners, Turn(DECODED, 0), enough_time(), heard, least=LEAST)
    for runner in runners.values():
        runner.prefill(64)
    prompts = in_turns(runners, Turn(0, PROMPT), enough_time(), heard, least=LEAST)
    read = {one: bytes_read(runner.model) for one, runner in runners.items()}
    rows = [
        {
            "name": one,
            "bytes_read": read[one],
            "R": read[SOURCE] / read[one],
            "load_seconds": seconds[one],
            "kernels": used[one],
            **timed(decoding, one, "decode"),
            **timed(prompts, one, "prefill"),
        }
        for one in runners
    ]
    profiles = {one: profile(runners[one]) for one in ("int8", "int4")}
    return {**conditions(), "prompt": PROMPT, "rows": rows, "profiles": profiles}


def enough_time() -> Clock:
    """The time that a timing may take; a machine that is too slow for that gets the least rounds."""
    return Clock(SECONDS, float("inf"))


def timed(times: Mapping[str, Times], name: str, what: str) -> dict[str, Any]:
    """Tokens per second, the ratio to the source, and how many rounds they are of."""
    taken, of_source = getattr(times[name], what), getattr(times[SOURCE], what)
    ratio = ratio_of(of_source, taken, LEAST) if name != SOURCE else None
    return {
        f"{what}_per_second": speed_of(taken, LEAST),
        f"{what}_ratio": asdict(ratio) if isinstance(ratio, Ratio) else None,
        f"{what}_rounds": len(taken),
    }


def profile(runner: Runner) -> dict[str, Any]:
    """Milliseconds a token by operator, the most expensive ones first, and what is not in any."""
    import torch

    from smolquant.runtime.cpu_linear import Linears

    original = Linears.__call__

    def named(self: Linears, inputs: Any) -> Any:
        with torch.profiler.record_function("smolquant's linear layers"):
            return original(self, inputs)

    bare = runner.decode(PROFILED_TOKENS)
    Linears.__call__ = named  # type: ignore[method-assign]
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            runner.decode(PROFILED_TOKENS)
    finally:
        Linears.__call__ = original  # type: ignore[method-assign]
    averages = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    top = [
        {"operator": one.key, "ms": one.self_cpu_time_total / 1000 / PROFILED_TOKENS}
        for one in averages
    ]
    in_operators = sum(one["ms"] for one in top)
    return {
        "ms": bare * 1000 / PROFILED_TOKENS,
        "in_operators": in_operators,
        "top": top[:8],
    }


def layers() -> dict[str, Any]:
    """Each shape with few and many rows, by the way of few tokens, by that of many, and in bf16."""
    import torch

    from smolquant.runtime import cpu_linear
    from smolquant.runtime.compiled import Stored
    from smolquant.runtime.cpu_linear import Linears

    use_allowed_threads()
    rows = []
    for outputs, columns in SHAPES:
        copies = max(2, _AMONG // (outputs * columns))
        levels = [
            torch.randint(-127, 127, (outputs, columns), dtype=torch.int8)
            for _ in range(min(copies, 64))
        ]
        scale, half = torch.rand(outputs).to(torch.bfloat16), len(levels) // 2  # of another's turn
        halves = [one[:, : columns // 2].contiguous() for one in levels]
        plain = [one.to(torch.bfloat16) for one in levels[: max(2, len(levels) // 2)]]
        int4_scale = torch.rand(outputs, columns // 32).to(torch.bfloat16)
        stored = {
            "int8": [Stored(one, scale) for one in levels],
            "int8_dynamic": [
                Stored(one, scale, dynamic=True) for one in levels[half:] + levels[:half]
            ],
            "int4": [Stored(one, int4_scale, int4_scale) for one in halves],
        }
        ways: dict[str, tuple[list[Any], Callable[[Any, Any], Any]]] = {
            "bf16": (plain, torch.nn.functional.linear),
            **{
                name: ([Linears([(weight, None)]) for weight in weights], lambda x, w: w(x))
                for name, weights in stored.items()
            },
        }
        for count in ROWS:
            inputs = torch.randn(count, columns).to(torch.bfloat16)
            times = layer_times(ways, inputs)
            rows.append({"outputs": outputs, "columns": columns, "rows": count, "ms": times})
            print(f"{outputs} x {columns}, {count} rows: {times}", flush=True)
    few = {name: cpu_linear.few_tokens(weights[0].kind) for name, weights in stored.items()}
    return {**conditions(), "few_tokens": few, "rows": rows, **bandwidth()}


def layer_times(
    ways: Mapping[str, tuple[list[Any], Callable[[Any, Any], Any]]], inputs: Any
) -> dict[str, float]:
    """Milliseconds of a layer, the median of turns, by each way; of ours for few tokens and for many."""
    import statistics

    from smolquant.runtime import cpu_linear

    switch = cpu_linear.few_tokens
    cases = [(name, 0) for name in ways if name == SOURCE]
    cases += [(name, few) for name in ways if name != SOURCE for few in (1 << 30, 0)]
    times: dict[str, list[float]] = {}
    deadline = time.monotonic() + 2.5
    try:
        while time.monotonic() < deadline or len(next(iter(times.values()))) < LEAST:
            for name, few in cases:
                cpu_linear.few_tokens = partial(_same, few)
                weights, linear = ways[name]
                turn = weights[:8]  # and the next eight in the next turn
                weights[:] = weights[8:] + turn
                started = time.perf_counter()
                for weight in turn:
                    linear(inputs, weight)
                taken = (time.perf_counter() - started) / len(turn) * 1000
                way = name if name == SOURCE else f"{name}, {'few' if few else 'many'}"
                times.setdefault(way, []).append(taken)
    finally:
        cpu_linear.few_tokens = switch
    return {way: float(f"{statistics.median(taken):.4g}") for way, taken in times.items()}


def _same(few: int, _: int) -> int:
    return few


def bandwidth() -> dict[str, float]:
    """Bytes a second that this machine's memory gives to as many threads."""
    import torch

    values = torch.ones(64 << 20)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - started)
    return {"bandwidth": values.nbytes / sorted(times)[len(times) // 2]}


def conditions() -> dict[str, Any]:
    """The machine as it is, and what computes."""
    import torch

    threads = use_allowed_threads()
    return {
        "machine": machine("cpu", threads, os.getloadavg()[0]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "stack": ", ".join(f"{one} {version(one)}" for one in ("torch", "torchao", "transformers")),
    }


def heard(text: str, left: float) -> None:
    print(text, flush=True)


def beside_llama(name: str) -> dict[str, Any]:
    """Decoding beside llama.cpp, where it is installed."""
    from importlib.util import find_spec

    import llama

    if find_spec("cyllama") is None:
        print("llama.cpp is not installed: `pip install --group bench` brings it.")
        return {}
    threads = use_allowed_threads()
    rows = llama.compare(model_folder(name), threads, DECODED, SECONDS)
    stack = f"llama.cpp of cyllama {version('cyllama')}"
    return {**conditions(), "llama.cpp": stack, "rows": rows}


def beside_eager(name: str) -> dict[str, Any]:
    """Decoding compiled, with a static cache, beside eager decoding."""
    import compiled

    place = model_folder(name)
    models = {one: load(place, one) for one in (SOURCE, *VARIANTS)}
    rows = compiled.compare(models, SOURCE, DECODED, enough_time, least=LEAST)
    return {**conditions(), "rows": rows}


STEPS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "small": partial(whole_models, SMALL),
    "large": partial(whole_models, LARGE),
    "compiled_small": partial(beside_eager, SMALL),
    "compiled_large": partial(beside_eager, LARGE),
    "layers": layers,
    "llama_small": partial(beside_llama, SMALL),
    "llama_large": partial(beside_llama, LARGE),
}
"""What there is to measure, by the name under which its part stands in the results."""


def main() -> None:
    """Make the models, and take all steps or those that are named, each in a process of its own."""
    match sys.argv[1:]:
        case ["prepare"]:
            for name in (SMALL, LARGE):
                model_folder(name)
        case ["--here", step]:
            use_allowed_threads()
            found = STEPS[step]()
            results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
            if found:
                results[step] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        case steps:
            environ = {**os.environ, "PYTHONPATH": str(ROOT / "entrypoint")}
            for words in (["prepare"], *(["--here", step] for step in steps or STEPS)):
                subprocess.run([sys.executable, __file__, *words], check=True, env=environ)


if __name__ == "__main__":
    main()
