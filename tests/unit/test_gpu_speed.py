"""The benchmark of a GPU, tried where there is none: the same code with a small model on the CPU."""

from pathlib import Path

import pytest
import torch

import gpu_speed
import models
import on_gpu
from smolquant.schemes import BY_VARIANT


def test_the_benchmark_measures_every_variant_that_the_device_can_run(tmp_path: Path) -> None:
    source = models.save_with_tokenizer(tmp_path / "source", models.FAMILIES["llama"]())
    report = gpu_speed.measure(source, tmp_path / "work", "cpu", seconds=0, sizes=(16, 2))
    rows = [line for line in report.splitlines() if "tok/s" in line]
    names = [row.split("|")[1].strip() for row in rows]
    runs_here = [name for name, scheme in BY_VARIANT.items() if scheme.cuda_capability is None]
    assert names == [gpu_speed.SOURCE, *runs_here]
    assert "torch " in report


def test_without_a_gpu_it_is_skipped_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DEVICE", raising=False)
    gpu_speed.main()
    assert "Skipped: torch sees no GPU" in capsys.readouterr().out


@pytest.mark.parametrize("what", on_gpu.COMMANDS)
def test_no_python_that_sees_a_gpu_is_no_failure(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_PYTHON", "/bin/false")
    assert on_gpu.main(what) == 0
    assert "Skipped: torch sees no GPU (/bin/false asked)" in capsys.readouterr().out


def test_a_gpu_that_cannot_be_used_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"  # its torch sees a GPU; torchao is not there
    python.write_text('#!/bin/sh\ncase "$2" in *torchao*) exit 1;; esac\n')
    python.chmod(0o755)
    monkeypatch.setenv("GPU_PYTHON", str(python))
    assert on_gpu.main("test") == 1
    assert "-m pip install torchao" in capsys.readouterr().out
