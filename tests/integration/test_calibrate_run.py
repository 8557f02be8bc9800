"""--int4-method calibrated through the whole command."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import models
from command import Run, run_smolquant
from conftest import WRITE
from localhub import LocalHub
from smolquant import load
from smolquant.record import VariantRecord

INT4 = ("--save-only", "--quant-type", "int4_weight_only", "--group-size", "64")

KILLED_IN_CALIBRATION = """
import os, runpy, signal
import smolquant.quantize.calibrate as module

calibrated, left = module._calibrated, 9

def calibrated_or_die(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return calibrated(*arguments)

module._calibrated = calibrated_or_die
runpy.run_module("smolquant", run_name="__main__")
"""
"""The command, killed at a weight of the second layer."""

RunSmolquant = Callable[..., Run]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"<{(i * i + i // 7) % 317}>" for i in range(4_000)))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "quantized/int4/model.safetensors")


def record(folder: Path) -> VariantRecord:
    return VariantRecord.from_json((folder / "quantized/int4/quantization.json").read_text())


def calibrating(text: Path, *options: str) -> tuple[Any, ...]:
    return (*INT4, "--int4-method", "calibrated", "--calibration-text", text, *options)


def test_a_variant_is_made_from_the_owners_text_and_loads(
    smolquant: RunSmolquant, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    run = smolquant("quantize", checkpoint, *calibrating(text), actions=True)
    assert run.exit_code == 0, run.log
    assert "calibrating int4" in run.log
    made, options = weights(tmp_path), record(tmp_path).options
    assert options["int4_method"] == "calibrated"
    assert len(str(options["calibration_sha256"])) == 64
    assert not list((tmp_path / "quantized").glob(".int4*")), "nothing is left behind"

    loaded, _ = load(tmp_path / "quantized", variant="int4", device="cpu")
    source = AutoModelForCausalLM.from_pretrained(checkpoint)
    difference = models.logits(loaded) - models.logits(source)
    assert difference.norm() / models.logits(source).norm() < 0.5

    again = smolquant("quantize", checkpoint, *calibrating(text), actions=True)
    assert again.outputs["changed"] == "false", again.log

    text.write_text(text.read_text()[2_000:])
    other = smolquant("quantize", checkpoint, *calibrating(text), actions=True)
    assert other.exit_code == 0, other.log
    assert other.outputs["changed"] == "true", "another text makes another variant"
    changed = weights(tmp_path)
    assert any(not torch.equal(made[name], changed[name]) for name in made)


def test_it_is_measured_and_published_like_any_other(
    smolquant: RunSmolquant, hub: LocalHub, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    measured = tmp_path / "measured.txt"
    measured.write_text(" ".join(reversed(text.read_text().split())))
    run = smolquant(
        "quantize",
        *(checkpoint, "alice/model", "--quant-type", "both", "--group-size", "64"),
        *("--int4-method", "calibrated", "--calibration-text", text),
        *("--evaluate", "always", "--eval-text", measured, "--eval-tokens", "400", "--max-kl", "5"),
        hub=hub,
        token=WRITE.value,
        actions=True,
    )
    assert run.exit_code == 0, run.log
    published = json.loads(hub.read("alice/model", "int4/quantization.json"))
    assert published["metrics"]["mean_kl"] > 0
    assert published["device"] == "cpu", "which its bytes depend on"
    int8 = json.loads(hub.read("alice/model", "int8/quantization.json"))
    assert "calibration_sha256" not in int8["options"]
    assert int8["device"] is None


@pytest.mark.fault(
    "cancelled",
    "The run is killed while it calibrates",
    "The same command makes up for it, to the same bytes.",
)
def test_a_run_killed_while_it_calibrates_is_made_up_for(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    arguments = [str(argument) for argument in ("quantize", checkpoint, *calibrating(text))]
    assert run_smolquant(*arguments, folder=whole).exit_code == 0

    died = run_smolquant(*arguments, folder=killed, script=KILLED_IN_CALIBRATION)
    assert died.exit_code == -signal.SIGKILL, died.log
    assert not (killed / "quantized/int4").exists()
    assert list((killed / "quantized").glob(".int4.*/calibrated/*.safetensors")), "a layer was done"

    again = run_smolquant(*arguments, folder=killed)
    assert again.exit_code == 0, again.log
    assert not list((killed / "quantized").glob(".int4*"))
    assert (killed / "quantized/int4/model.safetensors").read_bytes() == (
        whole / "quantized/int4/model.safetensors"
    ).read_bytes()


def test_memory_does_not_grow_with_the_number_of_layers(text: Path, tmp_path: Path) -> None:
    peaks = []
    for layers in (4, 32):
        folder = tmp_path / str(layers)
        folder.mkdir()
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
        config = LlamaConfig(**models.SIZES | sizes)
        source = models.save_with_tokenizer(folder / "source", config)
        run = run_smolquant("quantize", source, *calibrating(text), folder=folder)
        assert run.exit_code == 0, run.log
        peaks.append(run.report["variants"]["int4"]["peak_memory_bytes"])
    small, large = peaks
    # What the allocator keeps differs from run to run by tens of megabytes.
    assert large < small + 100_000_000, f"{large - small} bytes more for 213 MB of weights more"


@pytest.mark.fault(
    "input",
    "The calibration text is too short",
    "Exit 2 with both numbers.",
)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--calibration-text", "text.txt"), "--int4-method search uses no text"),
        (("--int4-method", "calibrated", "--calibration-text", "missing.txt"), "cannot be read"),
        (("--int4-method", "calibrated", "--calibration-text", "short.txt"), "takes at least 2048"),
    ],
)
def test_texts_that_do_not_serve_are_refused(
    smolquant: RunSmolquant, checkpoint: Path, text: Path, options: tuple[str, ...], said: str
) -> None:
    text.with_name("short.txt").write_text("<5> " * 100)
    run = smolquant("quantize", checkpoint, *INT4, *options, actions=True)
    assert run.exit_code == 2, run.log
    assert said in run.annotations[0]
    assert "--calibration-text" in run.log


@pytest.mark.fault(
    "checkpoint",
    "There is no tokenizer to calibrate with",
    "Exit 3.",
)
def test_a_checkpoint_without_a_tokenizer_is_refused(
    smolquant: RunSmolquant, text: Path, tmp_path: Path
) -> None:
    bare = models.save(tmp_path / "bare", models.FAMILIES["smollm3"]())
    run = smolquant("quantize", bare, *calibrating(text), actions=True)
    assert run.exit_code == 3, run.log
    assert "tokenizer" in run.annotations[0]
