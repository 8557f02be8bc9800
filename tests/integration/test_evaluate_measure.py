"""Source and variants measured from their files, against the textbook formulas on models in memory."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torchao.quantization import Float8Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import models
from evaluate_parts import quantize_folder
from smolquant import machine
from smolquant.checkpoint.reader import Checkpoint
from smolquant.errors import CheckpointError, GateError, MachineError
from smolquant.evaluate import Measurement, measure, speed
from smolquant.evaluate import machine as machine_name
from smolquant.evaluate.documents import EvalText, bundled_text
from smolquant.evaluate.gate import Gate, check_plausible, judge, parse_limits
from smolquant.evaluate.measure import Evaluation
from smolquant.evaluate.rounds import Ratio
from smolquant.evaluate.speed import Speed, Speeds
from smolquant.evaluate.text import token_windows
from smolquant.model.architecture import Architecture
from smolquant.record import Metrics
from smolquant.runtime.kernels import use_kernels
from smolquant.schemes import BY_VARIANT

WINDOWS = torch.randint(3, 320, (4, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A small Gemma 3 and its variants; only to be read."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = models.save(folder / "source", models.FAMILIES["gemma3"]())
    return source, quantize_folder(source, folder / "out")


def evaluate(
    source: Path, variants: dict[str, Path], windows: torch.Tensor = WINDOWS
) -> dict[str, Metrics]:
    architecture = Architecture(source, trust_remote_code=False)
    with (
        Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint,
        Evaluation(architecture, checkpoint, variants, windows) as evaluation,
    ):
        return evaluation.run()


def log_probabilities(folder: Path) -> torch.Tensor:
    """(tokens, vocabulary) in float64, with the output head in float32 as the evaluation has it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if folder.name == "float8_dynamic":  # has no kernels on a CPU
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), Float8Tensor):
                module.weight = torch.nn.Parameter(module.weight.dequantize())
    use_kernels(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.float())
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    with torch.inference_mode():
        logits = torch.cat([model(window.unsqueeze(0)).logits[:, :-1] for window in WINDOWS])
    return functional.log_softmax(logits.flatten(0, 1).double(), dim=-1)


@pytest.mark.parametrize("variant", BY_VARIANT)
def test_metrics_are_those_of_the_textbook(
    made: tuple[Path, dict[str, Path]], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "VOCABULARY_BLOCK", 100)  # several blocks, the last one smaller
    monkeypatch.setattr(measure, "TOKEN_BLOCK", 50)
    source, variants = made
    metrics = evaluate(source, variants)[variant]
    exact, quantized = log_probabilities(source), log_probabilities(variants[variant])
    targets = WINDOWS[:, 1:].flatten()
    perplexity = functional.nll_loss(quantized, targets).exp().item()
    source_perplexity = functional.nll_loss(exact, targets).exp().item()
    kl = functional.kl_div(quantized, exact, log_target=True, reduction="batchmean").item()
    agreement = (exact.argmax(-1) == quantized.argmax(-1)).double().mean().item()
    assert kl > 1e-4
    assert metrics.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert metrics.source_perplexity == pytest.approx(source_perplexity, rel=1e-4)
    assert metrics.perplexity_increase_percent == pytest.approx(
        100 * (perplexity / source_perplexity - 1), abs=1e-3
    )
    assert metrics.mean_kl == pytest.approx(kl, rel=1e-3)
    assert metrics.top1_agreement == pytest.approx(agreement, abs=1e-6)


def test_the_same_inputs_give_the_same_numbers(made: tuple[Path, dict[str, Path]]) -> None:
    source, variants = made
    together = evaluate(source, variants)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)  # as a busy machine might be told to
        assert evaluate(source, variants) == together
    finally:
        torch.set_num_threads(threads)
    alone = evaluate(source, {"int4": variants["int4"]})
    assert alone["int4"] == together["int4"]


def test_progress_reaches_its_total(made: tuple[Path, dict[str, Path]]) -> None:
    source, variants = made
    told: list[int] = []
    architecture = Architecture(source, trust_remote_code=False)
    with (
        Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint,
        Evaluation(architecture, checkpoint, variants, WINDOWS) as evaluation,
    ):
        work = evaluation.work()
        evaluation.run(told.append)
        assert sum(told) == sum(part.amount for part in work)
        assert len(work) == 1 + len(variants) + 1


def spoil(folder: Path, spoiled: Path, parts: str, change: str) -> Path:
    """A copy of a variant with the parts of one kind changed in its files."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    spoiled.mkdir()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if not name.endswith(parts):
                continue
            if change == "nan":
                tensors[name] = tensor.fill_(float("nan"))
            else:  # one group's values under its neighbour's scale
                tensors[name] = tensor.roll(1, dims=0).contiguous()
        save_file(tensors, spoiled / file.name, metadata)
    return spoiled


def test_a_spoiled_variant_fails_the_gate_and_a_good_one_passes(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    source, variants = made
    spoiled = spoil(variants["int8"], tmp_path / "spoiled", "_weight_qdata", "roll")
    bad = evaluate(source, {"int8": spoiled})["int8"]
    good = evaluate(source, variants)["int8"]
    assert good.mean_kl is not None
    assert bad.mean_kl is not None
    assert bad.mean_kl > 20 * good.mean_kl
    gate = Gate(kl=parse_limits(f"int8={good.mean_kl:.12f}", "--max-kl"))
    assert judge({"int8": bad}, gate)
    assert not judge({"int8": good}, Gate(kl={"int8": good.mean_kl}))


def test_a_trained_model_on_the_bundled_text(smollm2: Path, tmp_path: Path) -> None:
    variants = quantize_folder(smollm2, tmp_path / "out", group_size=128)
    spoiled = spoil(variants["int8"], tmp_path / "spoiled", "_weight_scale", "roll")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows = token_windows(bundled_text(), tokenizer, 512)
    measured = evaluate(smollm2, variants, windows)
    spoiled_metrics = evaluate(smollm2, {"int8": spoiled}, windows)["int8"]
    assert 10 < (measured["int8"].source_perplexity or 0) < 40
    assert (measured["int8"].top1_agreement or 0) > 0.95
    kl = {variant: metrics.mean_kl or 0 for variant, metrics in measured.items()}
    assert 0 < kl["int8"] < 0.02
    assert kl["int8"] < kl["int8_dynamic"] < kl["int4"] < 0.5
    assert kl["int8"] < kl["float8"] == kl["float8_dynamic"] < kl["int4"]
    for variant in variants:
        check_plausible(variant, measured[variant])
    with pytest.raises(GateError, match="something is broken"):
        check_plausible("int8", spoiled_metrics)


@pytest.mark.fault(
    "quality",
    "A variant computes NaN",
    "Exit 6; nothing is published.",
)
def test_a_variant_that_computes_nan_is_never_published(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    source, variants = made
    spoiled = spoil(variants["int8"], tmp_path / "spoiled", "q_proj._weight_scale", "nan")
    with pytest.raises(GateError, match="int8 computes NaN or infinity"):
        evaluate(source, {"int8": spoiled})


@pytest.mark.fault(
    "model",
    "The source computes NaN or infinity on the text to measure on",
    "Exit 3.",
)
def test_a_source_that_computes_infinity_is_unusable(tmp_path: Path) -> None:
    model = models.build(models.FAMILIES["llama"]())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="The source's own predictions are not finite"):
        evaluate(tmp_path / "source", {})


@pytest.mark.fault(
    "machine",
    "Measuring takes more memory than there is",
    "It is told with both sizes.",
)
def test_too_little_memory_is_told_with_numbers(
    made: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, variants = made
    architecture = Architecture(source, trust_remote_code=False)
    with (
        Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint,
        Evaluation(architecture, checkpoint, variants, WINDOWS) as evaluation,
    ):
        evaluation.require_memory()
        monkeypatch.setattr(machine, "available_bytes", lambda: 1_000_000)
        with pytest.raises(
            MachineError, match=r"needs \d+ MB of memory, and 1\.00 MB is available"
        ):
            evaluation.require_memory()


_MEASURE_PEAK = """
import json, sys
from pathlib import Path
import torch
from smolquant.model.architecture import Architecture
from smolquant.checkpoint.reader import Checkpoint
from smolquant.evaluate.measure import Evaluation
from smolquant.memory import peak_bytes

def run(root, *names):
    source = root / "source"
    variants = {name: root / "out" / name for name in names}
    windows = torch.arange(256).reshape(4, 64)
    with (
        Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint,
        Evaluation(Architecture(source, trust_remote_code=False), checkpoint, variants, windows) as it,
    ):
        it.run()
        return max(model.largest_layer_bytes for model in it._models), it.needed_bytes

small, large = map(Path, sys.argv[1:])
run(small, "int8", "int4", "int8_dynamic", "float8", "float8_dynamic")  # libraries are loaded
base = peak_bytes()
layer, _ = run(large, "int8", "int4")
weight_only = peak_bytes() - base
peaks = []
# In the order of what they take: torchao makes float32 and int32 copies of each weight.
for name in ("int8_dynamic", "float8", "float8_dynamic"):
    _, promised = run(large, name)
    peaks.append((name, peak_bytes() - base, promised))
print(json.dumps([layer, weight_only, peaks]))
"""


def test_a_model_is_measured_in_the_memory_of_its_largest_layer(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    sizes = models.SIZES | {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 4}
    source = models.save(tmp_path / "source", LlamaConfig(**sizes))
    quantize_folder(source, tmp_path / "out")
    small = made[0].parent
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE_PEAK, small, tmp_path],
        check=True,
        capture_output=True,
    )
    layer, weight_only, peaks = json.loads(child.stdout.splitlines()[-1])
    assert layer > 40_000_000
    assert (source / "model.safetensors").stat().st_size > 4 * layer
    assert weight_only < 1.5 * layer
    for name, peak, promised in peaks:
        assert peak < promised, name


def test_each_speed_stands_under_its_name(
    made: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of source and variant, of a prompt and of what follows it."""
    source, variants = made
    of_int8 = Speed("", 4.0, 5.0, 6, Ratio(2.5, 2.4, 2.6), Ratio(4.0, 3.9, 4.1))
    found = Speeds(Speed("", 1.0, 2.0, 3), {"int8": of_int8}, threads=2, load_average=0.25)
    monkeypatch.setattr(speed, "measure_speeds", lambda *_, **__: found)
    architecture = Architecture(source, trust_remote_code=False)
    measurement = Measurement(EvalText("a text", ["words"]), 128)
    with Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint:
        (metrics,) = measurement.run(
            WINDOWS,
            architecture,
            checkpoint,
            source,
            variants={"int8": variants["int8"]},
            progress=lambda n_bytes: nullcontext(lambda n_bytes: None),
        ).values()
    assert (metrics.source_prefill_tokens_per_second, metrics.prefill_tokens_per_second) == (1, 4)
    assert (metrics.source_tokens_per_second, metrics.tokens_per_second) == (2, 5)
    assert (metrics.source_peak_memory_bytes, metrics.peak_memory_bytes) == (3, 6)
    assert (metrics.speed_ratio, metrics.speed_ratio_spread) == (2.5, (2.4, 2.6))
    assert (metrics.prefill_ratio, metrics.prefill_ratio_spread) == (4.0, (3.9, 4.1))
    assert metrics.machine and metrics.machine.endswith(", 2 threads, load average 0.2")
    assert (metrics.text, metrics.tokens, metrics.tokens_asked) == ("a text", 4 * 63, 128)
    assert measurement.is_that_of(metrics)
    assert not Measurement(EvalText("a text", ["other words"]), 128).is_that_of(metrics)
    assert not Measurement(measurement.text).is_that_of(metrics)


def test_the_machine_is_the_one_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert machine_name("cuda") == "NVIDIA H100"
    assert machine_name("cpu").endswith(" cores")
