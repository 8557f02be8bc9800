"""What each scheme costs in quality: prints the table of docs/quality.md and writes it there.

    make bench-quality

Every linear weight is quantized by the product's own scheme, and the model then computes in float32 with
the weights that it stands for, so that the numbers are those of the weights and of nothing else
(int8_dynamic computes with torchao's tensors, as its activations are quantized too). torchao's HQQ is
there for comparison; the product does not offer it.
"""

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quality_model import held_out_windows, make_trained_model
from smollm2 import make_checkpoint
from smolquant.checkpoint.reader import Checkpoint
from smolquant.evaluate.documents import bundled_calibration_text, bundled_text
from smolquant.evaluate.text import token_windows
from smolquant.memory import keep_freed_blocks
from smolquant.model.architecture import Architecture
from smolquant.quantize.calibrate import TOKENS, CalibratedWeights, Calibration, calibrated_weights
from smolquant.quantize.plan import make_plan
from smolquant.schemes import SCHEMES, Keep, Scheme, scheme_of
from smolquant.schemes.base import QuantizedRows
from smolquant.schemes.int4_gptq import one_thread
from smolquant.schemes.int4_packing import unpack_int4
from smolquant.schemes.int4_weight_only import Int4WeightOnly, stored_rows, values_of

GROUP_SIZES = (32, 64, 128)
BLOCK_ROWS = 512
"""Rows quantized at a time, about as many as the product takes."""

INTRODUCTION = """\
# What quantization costs

Measured by `make bench-quality`, which trains the second model and rewrites this page. Lower is better in
every column.

* **bits per weight**: of the quantized weights, scales and zero points included. Where the columns of a
  weight are not a multiple of the group size, the largest smaller group that divides them is used (most
  weights of SmolLM2-135M have 576 columns: 64 instead of 128).
* **KL**: mean Kullback-Leibler divergence of the next-token distribution from the source's, in nats.
* **perplexity**: against the source's, in per cent.
* **seconds**: CPU time to find what is stored, on one core; of int4 without packing the levels and taking
  their error, which takes the same for every method (but for `calibrated`, where all is counted).

`rtn` rounds to nearest with torchao's tinygemm parameters. `search` is smolquant's default: it looks for
the grid of each group, with columns weighted by the norm in front of them. `calibrated` is
`--int4-method calibrated` on another text than the one measured on (of the second model, on other windows
of the same files), and `hqq` is torchao's, which smolquant does not offer.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    scheme: str
    group: str
    method: str
    bits: float
    kl: float
    perplexity_percent: float
    seconds: float

    def cells(self) -> str:
        return (
            f"| {self.scheme} | {self.group} | {self.method} | {self.bits:.2f} | {self.kl:.5f} "
            f"| {self.perplexity_percent:+z.2f} % | {self.seconds:.2f} |"
        )


@dataclass(frozen=True)
class Quantized:
    """A weight for float32 arithmetic, and what it takes to store it and took to find it."""

    weight: torch.Tensor
    bits: int
    seconds: float


Quantizer = Callable[[Mapping[str, torch.Tensor]], dict[str, Quantized]]
"""From the bfloat16 weights (N, K) of a model, by name."""


class Bench:
    """A model, the text it is measured on, and what it predicts before anything is quantized."""

    def __init__(self, folder: Path, windows: torch.Tensor, calibration: torch.Tensor) -> None:
        """``windows`` are measured on, those of ``calibration`` calibrated on."""
        self.folder, self.calibration = folder, calibration
        self._windows = windows
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval()
        head = model.get_output_embeddings()
        self._linears = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self._weights = {
            name: module.weight.detach().bfloat16() for name, module in self._linears.items()
        }
        self.input_mean_squares = _input_mean_squares(folder, model)
        self._source = list(self._predictions())
        self._source_loss = fmean(self._loss(p, i) for i, p in enumerate(self._source))

    @property
    def perplexity(self) -> float:
        return math.exp(self._source_loss)

    def measure(self, scheme: str, group: str, method: str, quantize: Quantizer) -> Row:
        with one_thread():
            quantized = quantize(self._weights)
        for name, module in self._linears.items():
            module.weight = nn.Parameter(quantized[name].weight, requires_grad=False)
        divergences: list[float] = []
        losses: list[float] = []
        pairs = zip(self._source, self._predictions(), strict=True)
        for window, (source, predicted) in enumerate(pairs):
            divergences.append((source.exp() * (source - predicted)).sum(-1).mean().item())
            losses.append(self._loss(predicted, window))
        return Row(
            scheme,
            group,
            method,
            bits=sum(found.bits for found in quantized.values())
            / sum(weight.numel() for weight in self._weights.values()),
            kl=fmean(divergences),
            perplexity_percent=100 * math.expm1(fmean(losses) - self._source_loss),
            seconds=sum(found.seconds for found in quantized.values()),
        )

    def _predictions(self) -> Iterator[torch.Tensor]:
        """Log probabilities, (length - 1, vocabulary) a window."""
        with torch.inference_mode():
            for window in self._windows:
                logits = self._model(window.unsqueeze(0), use_cache=False).logits[0, :-1]
                yield torch.log_softmax(logits.float(), -1)

    def _loss(self, predictions: torch.Tensor, window: int) -> float:
        """Mean negative log probability of what comes next in the text."""
        return -predictions.gather(1, self._windows[window, 1:, None]).mean().item()


def _input_mean_squares(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor | None]:
    """What the norms in front of the weights tell, as the product's plan finds it."""
    norms = Architecture(folder, trust_remote_code=False).norms_in_front
    stored = model.state_dict()
    return {
        weight: norm.input_mean_squares(
            {attribute: stored[name] for attribute, name in norm.parameters.items()},
            stored[weight].shape[1],
        )
        for weight, norm in norms.items()
    }


def each(quantize: Callable[[torch.Tensor], Quantized]) -> Quantizer:
    """One weight after another, each by itself."""
    return lambda weights: {name: quantize(weight) for name, weight in weights.items()}


def by_scheme(
    scheme: Scheme, group_size: int, mean_squares: Mapping[str, torch.Tensor | None] | None = None
) -> Quantizer:
    """The product's own arithmetic, a block of rows at a time.

    Args:
        mean_squares: weight -> its columns' mean square inputs, where they are known.
    """

    def quantize(name: str, weight: torch.Tensor) -> Quantized:
        decision = scheme.decide(weight.shape[0], weight.shape[1], group_size)
        assert not isinstance(decision, Keep), decision.reason
        known = mean_squares.get(name) if mean_squares else None
        bits, seconds, blocks = 0, 0.0, []
        for block in torch.split(weight, BLOCK_ROWS):
            began = time.process_time()
            if isinstance(scheme, Int4WeightOnly) and decision.group_size is not None:
                grid = scheme.find_grid(block, decision.group_size, known)
                seconds += time.process_time() - began
                rows = stored_rows(block, *grid)
                blocks.append(_int4_values(rows))
            else:
                rows = scheme.quantize_rows(block, None)
                seconds += time.process_time() - began
                blocks.append(_int8_values(rows))
            bits += _bits(rows)
        return Quantized(torch.cat(blocks), bits, seconds)

    return lambda weights: {name: quantize(name, weight) for name, weight in weights.items()}


def _bits(rows: QuantizedRows) -> int:
    return 8 * sum(part.numel() * part.element_size() for part in rows.parts.values())


def _int8_values(rows: QuantizedRows) -> torch.Tensor:
    """The float32 weights that rows of int8 stand for."""
    return rows.parts["qdata"].float() * rows.parts["scale"]


def _int4_values(rows: QuantizedRows) -> torch.Tensor:
    """The float32 weights that groups of int4 stand for."""
    qdata, scale, zero_point = (rows.parts[part] for part in ("qdata", "scale", "zero_point"))
    return values_of(unpack_int4(qdata), scale.t(), zero_point.t())


def with_quantized_activations(weight: torch.Tensor) -> Quantized:
    """int8_dynamic: torchao's tensor itself, which quantizes activations as it computes."""
    scheme = SCHEMES["int8_dynamic"]
    (found,) = by_scheme(scheme, 0)({"": weight}).values()
    return replace(found, weight=scheme.quantize(weight.float(), None))


def by_calibration(folder: Path, windows: torch.Tensor, group_size: int) -> Quantizer:
    """The product's own, from the files in ``folder``."""
    scheme = scheme_of("int4_weight_only", int4_method="calibrated")

    def quantize(weights: Mapping[str, torch.Tensor]) -> dict[str, Quantized]:
        began = time.process_time()
        architecture = Architecture(folder, trust_remote_code=False)
        with (
            Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint,
            tempfile.TemporaryDirectory() as spool,
        ):
            plan = make_plan(
                checkpoint.layout,
                architecture,
                [scheme],
                group_size=group_size,
                dtype="bfloat16",
                max_shard_size=10**12,
                skip=(),
            )[scheme.variant]
            calibration = Calibration(architecture, checkpoint, plan, windows)
            with calibrated_weights(calibration, Path(spool) / "found", lambda _: None) as found:
                each = (time.process_time() - began) / len(weights)
                return {name: _found(found, name, weight, each) for name, weight in weights.items()}

    return quantize


def _found(
    weights: CalibratedWeights, name: str, weight: torch.Tensor, seconds: float
) -> Quantized:
    rows = weights.quantize_rows(name, weight, 0)
    assert rows is not None, f"{name} was not calibrated"
    return Quantized(_int4_values(rows), _bits(rows), seconds)


def by_hqq(group_size: int) -> Callable[[torch.Tensor], Quantized]:
    """torchao's HQQ, as its int4 workflows call it."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    int4 = SCHEMES["int4_weight_only"]

    def quantize(weight: torch.Tensor) -> Quantized:
        decision = int4.decide(weight.shape[0], weight.shape[1], group_size)
        assert not isinstance(decision, Keep) and decision.group_size is not None
        began = time.process_time()
        levels, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
            weight, 4, decision.group_size, compute_dtype=weight.dtype, device="cpu"
        )
        seconds = time.process_time() - began
        grouped = levels.view(-1, decision.group_size).float() - 8
        found = grouped * scale.view(-1, 1).float() + zero.view(-1, 1).float()
        bits = weight.numel() * 4 + 16 * (scale.numel() + zero.numel())
        return Quantized(found.view(weight.shape), bits, seconds)

    return quantize


def rows(bench: Bench) -> Iterator[Row]:
    """Every line of one model's table, as it is measured."""
    yield bench.measure("int8", "row", "", by_scheme(SCHEMES["int8_weight_only"], 0))
    yield bench.measure("int8_dynamic", "row", "", each(with_quantized_activations))
    for group in GROUP_SIZES:
        methods = {
            "rtn": by_scheme(scheme_of("int4_weight_only", int4_method="rtn"), group),
            "search": by_scheme(
                scheme_of("int4_weight_only", int4_method="search"), group, bench.input_mean_squares
            ),
            "calibrated": by_calibration(bench.folder, bench.calibration, group),
            "hqq": each(by_hqq(group)),
        }
        for method, quantize in methods.items():
            yield bench.measure("int4", str(group), method, quantize)


def section(title: str, note: str, bench: Bench) -> str:
    """One model's heading and table; every row is printed as soon as it is known."""
    head = (
        "| scheme | group | method | bits per weight | KL | perplexity | seconds |\n"
        "|---|---|---|---|---|---|---|"
    )
    print(f"\n{title}\n{head}", flush=True)
    lines = []
    for row in rows(bench):
        print(row.cells(), flush=True)
        lines.append(row.cells())
    note = f"{note} Perplexity of the source: {bench.perplexity:.2f}."
    return "\n".join([f"## {title}", "", note, "", head, *lines, ""])


def _on_bundled_text(options: argparse.Namespace) -> str:
    smollm2 = make_checkpoint(options.models / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows = token_windows(bundled_text(), tokenizer, options.tokens)
    calibration = token_windows(bundled_calibration_text(), tokenizer, TOKENS)
    return section(
        "SmolLM2-135M-Instruct",
        f"On {windows.numel()} tokens of smolquant's evaluation text. This copy's weights lie on a\n"
        "4-bit grid with groups of 32 already, which rounding in groups of 32 can find again.",
        Bench(smollm2, windows, calibration),
    )


def _on_python(options: argparse.Namespace) -> str:
    trained = make_trained_model(options.models / "trained")
    held_out = held_out_windows(trained)
    stride = max(4, len(held_out) * held_out.shape[1] // options.tokens)
    # Calibrated on what lies between the windows that are measured on, a quarter of the way from each.
    place = torch.arange(len(held_out)) % stride
    between = held_out[(place >= stride // 4) & (place <= stride - stride // 4)]
    return section(
        "A Qwen3 of 3.9 million parameters, trained by bench/quality_model.py",
        f"On {held_out[::stride].numel()} tokens of Python that it was not trained on.",
        Bench(trained, held_out[::stride], between[: TOKENS // between.shape[1]]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4_096, help="to measure each model on")
    parser.add_argument("--models", type=Path, default=Path(".bench"), help="kept between runs")
    parser.add_argument("--output", type=Path, default=Path("docs/quality.md"))
    options = parser.parse_args()
    options.models.mkdir(exist_ok=True)
    keep_freed_blocks()  # as the product does, so that page faults are not what is timed
    sections = [_on_bundled_text(options), _on_python(options)]
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchao", "transformers")
    )
    setting = (
        f"Python {platform.python_version()}, {libraries}; CPU capability "
        f"{torch.backends.cpu.get_cpu_capability()}."
    )
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join([INTRODUCTION, setting, "", *sections]), encoding="utf-8")


if __name__ == "__main__":
    main()
