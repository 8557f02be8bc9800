"""Constant memory and going on after SIGKILL, seen through the whole command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from command import run_killed, run_smolquant
from models import SIZES, save_with_tokenizer


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 1024} | changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fault(
    "cancelled",
    "The run is killed while it quantizes",
    "The same command goes on with the finished shards, to the same bytes.",
)
@pytest.mark.parametrize("quant_type", ["int8_weight_only", "both"])
def test_a_killed_run_goes_on_with_the_shards_it_has(tmp_path: Path, quant_type: str) -> None:
    source = save_with_tokenizer(tmp_path / "source", config(num_hidden_layers=6))
    arguments = ["quantize", str(source), "--save-only", "--max-shard-size", "1MB"]
    arguments += ["--quant-type", quant_type]
    (tmp_path / "whole").mkdir()
    whole = run_smolquant(*arguments, folder=tmp_path / "whole")
    assert whole.exit_code == 0, whole.log
    folder = tmp_path / "killed"
    folder.mkdir()

    run_killed(arguments, folder, after=3)

    output = folder / "quantized"
    assert not (output / "int8").exists(), "a half-made variant was put in place"
    (journal, *_) = sorted(output.glob(".int8.*/finished.jsonl"))
    finished = [json.loads(line)["name"] for line in journal.read_text().splitlines()]
    before = {name: (journal.parent / "int8" / name).stat() for name in finished}
    assert finished

    again = run_smolquant(*arguments, folder=folder)

    assert again.exit_code == 0, again.log
    assert "int8: going on from" in again.log
    for variant in ("int8", "int4") if quant_type == "both" else ("int8",):
        assert files_of(output / variant) == files_of(tmp_path / "whole/quantized" / variant)
    for name, stat in before.items():
        after = (output / "int8" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), name
    assert not list(output.glob(".int*")), "nothing is left behind"


@pytest.mark.fault(
    "cancelled",
    "A finished shard of a killed run was changed",
    "It is made again.",
)
def test_a_shard_that_changed_after_the_kill_is_made_again(tmp_path: Path) -> None:
    source = save_with_tokenizer(tmp_path / "source", config(num_hidden_layers=4))
    arguments = ["quantize", str(source), "--save-only", "--max-shard-size", "1MB"]
    run_killed(arguments, tmp_path, after=2)
    (journal,) = (tmp_path / "quantized").glob(".int8.*/finished.jsonl")
    name = json.loads(journal.read_text().splitlines()[0])["name"]
    shard = journal.parent / "int8" / name
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    damaged = shard.read_bytes()

    again = run_smolquant(*arguments, folder=tmp_path)

    assert again.exit_code == 0, again.log
    made = (tmp_path / "quantized/int8" / name).read_bytes()
    assert made != damaged
    assert made[:-1] == damaged[:-1]


@pytest.mark.fault(
    "cancelled",
    "After a kill the run is started with other options",
    "It begins anew and cleans up.",
)
def test_other_options_do_not_go_on_from_it_and_clean_it_up(tmp_path: Path) -> None:
    source = save_with_tokenizer(tmp_path / "source", config(num_hidden_layers=4))
    arguments = ["quantize", str(source), "--save-only", "--max-shard-size", "1MB"]
    run_killed(arguments, tmp_path, after=2)

    again = run_smolquant(*arguments, "--skip", "q_proj", folder=tmp_path)

    assert again.exit_code == 0, again.log
    assert "going on from" not in again.log
    assert not list((tmp_path / "quantized").glob(".int*"))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, form: str) -> None:
    peaks = []
    for layers in (1, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        wide = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": layers}
        source = save_with_tokenizer(folder / "source", config(**wide))
        if form == "bin":
            weights = source / "model.safetensors"
            torch.save(load_file(weights), source / "pytorch_model.bin")
            weights.unlink()
        run = run_smolquant("quantize", source, "--save-only", folder=folder)
        assert run.exit_code == 0, run.log
        peaks.append(run.report["variants"]["int8"]["peak_memory_bytes"])
    small, large = peaks
    assert large < small + (64 << 20), f"{large - small} bytes more for 640 MB of weights more"
