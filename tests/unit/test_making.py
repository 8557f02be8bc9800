"""Variants from a folder to their place, without a process, a Hub or a report."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, MambaConfig

import smolquant
from models import llama, logits, save_with_tokenizer
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import CheckpointError, InputError, MachineError
from smolquant.publish.local import is_whole, local_records
from smolquant.quantize import making, planning
from smolquant.report.console import Console
from smolquant.report.run_report import VariantResult
from smolquant.settings import Settings, make_settings

SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2}
MAMBA = MambaConfig(**SMALL, state_size=8, time_step_rank=32)
FALCON = FalconConfig(**SMALL, num_attention_heads=4)


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return FolderSource(save_with_tokenizer(tmp_path / "source", llama(2)))


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    yield io.StringIO()


def settings(source: FolderSource, **options: Any) -> Settings:
    output_dir = str(source.folder.parent / "out")
    return make_settings(
        model_path=str(source.folder),
        repo_name=None,
        save_only=True,
        output_dir=output_dir,
        **{"evaluate": "never", **options},
    )


def make(
    source: FolderSource, asked: Settings, log: io.StringIO, **options: Any
) -> dict[str, VariantResult]:
    console = Console({}, log)
    plans = planning.plan_variants(source, asked, asked.quant_types, console)
    with making.open_work(plans, source, asked, None, console, send=options.get("send")) as work:
        results = making.quantize_variants(
            work, console, watch=options.get("watch", lambda n_bytes: None)
        )
        return making.keep_variants(work, results)


def test_a_variant_is_whole_in_its_place_and_nothing_else_is_left(
    source: FolderSource, log: io.StringIO
) -> None:
    asked = settings(source, quant_type="both")
    done: list[int] = []
    results = make(source, asked, log, watch=done.append)
    assert {path.name for path in asked.output_dir.iterdir()} == {"int8", "int4"}
    records = local_records(asked.output_dir)
    for variant, result in results.items():
        assert result.folder == asked.output_dir / variant
        assert result.record == records[variant]
        assert is_whole(result.folder, result.record)
        assert result.seconds and result.peak_memory_bytes
    assert sum(done) == source.layout().size_bytes
    assert source.identity in log.getvalue()


def test_shards_that_are_taken_away_leave_the_rest_beside_the_place(
    source: FolderSource, log: io.StringIO
) -> None:
    taken: list[tuple[str, str]] = []

    def send(variant: str, shard: Path) -> None:
        taken.append((variant, shard.name))
        shard.unlink()

    asked = settings(source, low_disk="always")
    results = make(source, asked, log, send=send)
    assert taken == [("int8", "model.safetensors")]
    assert results["int8"].folder == asked.output_dir / ".sent-int8"
    assert not (results["int8"].folder / "model.safetensors").exists()
    assert "Each shard is sent and deleted" in log.getvalue()


def test_measured_variants_stay_whatever_the_disk_was_to_be(
    source: FolderSource, log: io.StringIO
) -> None:
    asked = settings(source, low_disk="always", evaluate="auto")
    results = make(source, asked, log, send=lambda variant, shard: pytest.fail("not to be sent"))
    assert results["int8"].folder == asked.output_dir / "int8"
    assert "The disk is not spared" in log.getvalue()


@pytest.mark.fault(
    "machine",
    "Something other than a variant lies in the variant's place",
    "Exit 2; it is left alone.",
)
def test_something_else_in_the_variants_place_is_left_alone(
    source: FolderSource, log: io.StringIO
) -> None:
    asked = settings(source)
    (asked.output_dir / "int8").mkdir(parents=True)
    (asked.output_dir / "int8" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something other than a variant"):
        make(source, asked, log)
    assert (asked.output_dir / "int8" / "thesis.txt").read_text() == "years of work"


@pytest.mark.fault(
    "meanwhile",
    "The checkpoint changes while its variants are made",
    "Exit 3; no variant is left.",
)
def test_a_source_that_changes_meanwhile_leaves_no_variant(
    source: FolderSource, log: io.StringIO
) -> None:
    asked = settings(source)

    def touch(n_bytes: int) -> None:
        (source.folder / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="changed while the checkpoint was being read"):
        make(source, asked, log, watch=touch)
    assert not local_records(asked.output_dir)


@pytest.mark.fault(
    "meanwhile",
    "A file of a variant is deleted while the run goes on",
    "Exit 4 with the file; no variant is put in its place.",
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_gone_is_noticed_before_the_variant_is_in_its_place(
    source: FolderSource, log: io.StringIO, name: str
) -> None:
    asked = settings(source)
    console = Console({}, log)
    plans = planning.plan_variants(source, asked, asked.quant_types, console)
    with (
        pytest.raises(MachineError, match=f"{name} was deleted or changed while"),
        making.open_work(plans, source, asked, None, console, send=None) as work,
    ):
        results = making.quantize_variants(work, console, watch=lambda n_bytes: None)
        (work.folders["int8"].folder / name).unlink()
        making.keep_variants(work, results)
    assert not (asked.output_dir / "int8").exists()


def test_measuring_adds_the_numbers_to_what_was_made(
    source: FolderSource, log: io.StringIO, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"<{number % 300}>" for number in range(80)))
    asked = settings(source, evaluate="auto", eval_text=str(text), eval_tokens=64)
    console = Console({}, log)
    plans = planning.plan_variants(source, asked, asked.quant_types, console)
    windows = asked.measurement.windows(plans.architecture, source.folder)
    with making.open_work(plans, source, asked, None, console, send=None) as work:
        made = making.quantize_variants(work, console, watch=lambda n_bytes: None)
        measured = making.measure_variants(work, made, windows, console)
        making.keep_variants(work, measured)
    metrics = measured["int8"].record.metrics
    assert metrics is not None and metrics.mean_kl is not None and 0 <= metrics.mean_kl < 0.1
    assert measured["int8"].evaluation_seconds > 0
    assert made["int8"].record.metrics is None
    assert local_records(asked.output_dir)["int8"].metrics == metrics


def test_a_preview_tells_sizes_to_the_byte_and_writes_nothing(
    source: FolderSource, log: io.StringIO
) -> None:
    asked = settings(source)
    planned = planning.preview_variants(source, asked, asked.quant_types, Console({}, log))["int8"]
    assert not asked.output_dir.exists()
    made = make(source, asked, log)["int8"].record
    assert (planned.quant_type, planned.predicted_bytes) == (made.quant_type, made.size_bytes)
    assert planned.tensors.keys() == made.tensors.keys()
    assert planning.preview_variants(source, asked, (), Console({}, io.StringIO())) == {}


def test_the_device_that_is_told_is_the_one_that_computes(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def device(measured: bool, **options: Any) -> str:
        asked = settings(source, **options)
        (plan,) = planning.plan_variants(
            source, asked, asked.quant_types, Console({}, io.StringIO())
        ).variants.values()
        return making.device_of(plan, asked, measured=measured)

    assert device(measured=True) == "cuda"
    assert device(measured=True, device="cpu") == "cpu"
    assert device(measured=False) == "cpu", "quantizing itself runs on the CPU"
    calibrated = {"quant_type": "int4_weight_only", "int4_method": "calibrated"}
    assert device(measured=False, **calibrated) == "cuda"


@pytest.mark.fault(
    "model",
    "The model's own code cannot run with one of its weights quantized",
    "That weight is kept, and the record says why.",
)
def test_what_the_model_cannot_run_quantized_is_kept_and_told_once(
    tmp_path: Path, log: io.StringIO
) -> None:
    mamba = FolderSource(save_with_tokenizer(tmp_path / "mamba", MAMBA))
    asked = settings(mamba, quant_type="int8_weight_only,int8_dynamic")
    planned = planning.preview_variants(mamba, asked, asked.quant_types, Console({}, log))
    reason = "MambaMixer does not run with it quantized"
    for plan in planned.values():
        assert plan.tensors["backbone.layers.1.mixer.dt_proj.weight"].reason == reason
        assert plan.tensors["backbone.layers.1.mixer.x_proj.weight"].quantized
    assert log.getvalue() == (
        f"Kept as it is in int8, int8_dynamic: backbone.layers.*.mixer.dt_proj: {reason}.\n"
    )
    again = io.StringIO()
    made = make(mamba, asked, again)["int8"].record
    assert made.tensors["backbone.layers.0.mixer.dt_proj.weight"].reason == reason
    model, _ = smolquant.load(asked.output_dir, "int8", device="cpu")
    assert torch.isfinite(logits(model)).all()


@pytest.mark.fault(
    "model",
    "The model's own code runs with none of its weights quantized",
    "Exit 3 with the class, before any work.",
)
def test_a_model_that_runs_with_nothing_quantized_is_refused(
    tmp_path: Path, log: io.StringIO
) -> None:
    falcon = FolderSource(save_with_tokenizer(tmp_path / "falcon", FALCON))
    asked = settings(falcon)
    with pytest.raises(CheckpointError, match="FalconLinear does not run with it quantized"):
        planning.plan_variants(falcon, asked, asked.quant_types, Console({}, log))
    assert not log.getvalue(), "one message is enough"
