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
from smolquant.evaluate import Measurement, speed
from smolquant.evaluate.documents import EvalText
from smolquant.evaluate.speed import Speed, Speeds, measure_speeds
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

    both = Speed(fault="OSError: something of this machine's")
    monkeypatch.setattr(speed, "measure_speeds", lambda *_, **__: Speeds(both, {"int8": both}))
    (metrics,) = measured(source, {"int8": variants["int8"]}).values()
    assert metrics.tokens_per_second is None
    assert metrics.mean_kl is not None


def test_on_a_gpu_it_is_not_measured() -> None:
    """Kernels differ from GPU to GPU, so that a failure on one is no fault of what was made."""
    fault = "RuntimeError: no kernel image"
    assert isinstance(evaluate._not_running("int8", fault, "cuda"), CannotMeasure)
    assert isinstance(evaluate._not_running("int8", fault, "cpu"), GateError)


def test_each_model_is_told_of_on_its_own(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """One that runs, one that no library can load, one without kernels here, and one that is nowhere."""
    source, variants = made
    (tmp_path / "nothing").mkdir()
    heard: list[tuple[str, float | None]] = []
    found = measure_speeds(
        source,
        {
            "int4": variants["int4"],
            "int8": spoiled(variants["int8"], tmp_path / "int8"),
            "float8_dynamic": variants["float8_dynamic"],
            "int8_dynamic": tmp_path / "nothing",
        },
        heard=lambda begun, left: heard.append((begun, left)),
    )
    int4 = found.variants["int4"]
    for ran in (found.source, int4):
        assert not ran.fault
        assert ran.decode_tokens_per_second and ran.decode_tokens_per_second > 1
        assert ran.prefill_tokens_per_second
        assert ran.prefill_tokens_per_second > ran.decode_tokens_per_second
        assert ran.peak_memory_bytes and 10**8 < ran.peak_memory_bytes < 2 * 10**9
    assert found.source.decode_ratio is None and int4.decode_ratio and int4.prefill_ratio
    assert int4.decode_ratio.low <= int4.decode_ratio.median <= int4.decode_ratio.high
    assert int4.bytes_read and found.source.bytes_read
    assert int4.bytes_read < found.source.bytes_read
    assert sum(int4.kernels.values()) == 14 and not found.source.kernels
    assert "hal9000" in found.variants["int8"].fault
    assert found.variants["float8_dynamic"] == Speed(), "no kernels, and so no speed"
    assert found.variants["int8_dynamic"] == Speed(), "no weights"
    assert found.threads and found.capability and found.load_average is not None
    assert heard


def test_what_has_no_kernels_here_has_to_load_all_the_same(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    broken = spoiled(made[1]["float8_dynamic"], tmp_path / "f")
    found = measure_speeds(None, {"float8_dynamic": broken})
    assert "hal9000" in found.variants["float8_dynamic"].fault
    assert found.source == Speed()


def test_speed_is_none_where_it_cannot_be_had(
    made: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, variants = made
    assert measure_speeds(source, {}, timeout=0.01).source == Speed(), "takes too long"
    monkeypatch.setattr(speed, "available_bytes", lambda: 10**6)
    found = measure_speeds(source, {"int8": variants["int8"]})
    assert (found.source, found.variants) == (Speed(), {"int8": Speed()}), "does not fit"
    assert found.threads is None


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

    def speeds(self: Measurement, source: Path, variants: dict[str, Path], *_: object) -> None:
        tried.extend(variants)

    monkeypatch.setattr(Measurement, "_speeds", speeds)
    variants = {"int8": quantize_folder(source, tmp_path / "out")["int8"]}
    with pytest.raises(CannotMeasure, match="RwkvModel changes weights while it runs"):
        measured(source, variants)
    assert tried == ["int8"], "though it cannot be measured, it has to run"
