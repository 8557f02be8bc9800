"""What is measured is also loaded as users load it, in a process of its own, and refused if that fails."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import RwkvConfig

import models
from evaluate_parts import quantize_folder
from smolquant import evaluate
from smolquant.checkpoint.reader import Checkpoint
from smolquant.errors import CannotMeasure, GateError
from smolquant.evaluate import Measurement
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.speed import DoesNotRun, measure_speed
from smolquant.model.architecture import Architecture
from smolquant.record import Metrics

WINDOWS = torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A small Llama and its variants; only to be read."""
    folder = tmp_path_factory.mktemp("loaded")
    source = models.save(folder / "source", models.FAMILIES["llama"]())
    return source, quantize_folder(source, folder / "out")


def measured(source: Path, variants: dict[str, Path], *, device: str = "cpu") -> dict[str, Metrics]:
    with Checkpoint(sorted(source.glob("*.safetensors"))) as checkpoint:
        return Measurement(EvalText("a text", ["words"]), 64).run(
            WINDOWS,
            Architecture(source, trust_remote_code=False),
            checkpoint,
            source,
            variants=variants,
            progress=lambda n_bytes: nullcontext(lambda n_bytes: None),
            device=device,
        )


def spoiled(folder: Path, copy: Path) -> Path:
    """A model whose weights are right, and which no library can load."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "hal9000"}))
    return copy


@pytest.mark.fault(
    "quality",
    "A variant does not load as users load it",
    "Exit 6 with the reason; nothing is published.",
)
def test_a_variant_that_users_cannot_load_is_refused_by_name(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    source, variants = made
    broken = spoiled(variants["int8"], tmp_path / "int8")
    with pytest.raises(
        GateError, match=r"int8 does not run when it is loaded as users load it: .*hal9000"
    ):
        measured(source, {"int8": broken})


def test_a_source_that_does_not_run_either_says_nothing_of_the_variant(
    made: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, variants = made

    def failing(folder: Path, **_: object) -> None:
        raise DoesNotRun("OSError: something of this machine's")

    monkeypatch.setattr("smolquant.evaluate.speed.measure_speed", failing)
    (metrics,) = measured(source, {"int8": variants["int8"]}).values()
    assert metrics.tokens_per_second is None
    assert metrics.mean_kl is not None


def test_on_a_gpu_it_is_not_measured() -> None:
    """Kernels differ from GPU to GPU, so that a failure on one is no fault of what was made."""
    fault = DoesNotRun("RuntimeError: no kernel image")
    assert isinstance(evaluate._not_running("int8", fault, "cuda"), CannotMeasure)
    assert isinstance(evaluate._not_running("int8", fault, "cpu"), GateError)


def test_without_kernels_a_variant_is_loaded_with_plain_weights_and_has_no_speed(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    _, variants = made
    folder = variants["float8_dynamic"]
    assert measure_speed(folder, weight_bytes=10**6, variant="float8_dynamic") is None
    with pytest.raises(DoesNotRun, match="hal9000"):
        measure_speed(spoiled(folder, tmp_path / "f"), weight_bytes=10**6, variant="float8_dynamic")


def test_speed_is_none_where_it_cannot_be_had(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    source, _ = made
    assert measure_speed(source, weight_bytes=10**15) is None, "does not fit"
    assert measure_speed(source, weight_bytes=10**6, timeout=0.1) is None, "takes too long"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DoesNotRun, match="config.json"):
        measure_speed(tmp_path / "nothing", weight_bytes=10**6)


def test_a_model_that_changes_its_weights_while_it_runs_is_not_measured_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RwkvConfig(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        attention_hidden_size=128,
        intermediate_size=256,
        context_length=64,
    )
    source = models.save(tmp_path / "source", config)
    tried: list[str] = []

    def speeds(self: Measurement, source: Path, variants: dict[str, Path], device: str) -> None:
        tried.extend(variants)

    monkeypatch.setattr(Measurement, "_speeds", speeds)
    variants = {"int8": quantize_folder(source, tmp_path / "out")["int8"]}
    with pytest.raises(CannotMeasure, match="RwkvModel changes weights while it runs"):
        measured(source, variants)
    assert tried == ["int8"], "though it cannot be measured, it has to run"
