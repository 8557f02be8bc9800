"""The device that these tests run on: a GPU, or none of them runs.

``SMOLQUANT_GPU_TESTS_ON=cpu`` runs on the CPU what can be, to try the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch

import models
from evaluate_parts import quantize_folder


@pytest.fixture(scope="session")
def device() -> str:
    """``cuda``; skips where there is none."""
    asked = os.environ.get("SMOLQUANT_GPU_TESTS_ON", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return asked


@pytest.fixture(scope="session")
def cuda(device: str) -> str:
    """For what a CPU cannot stand in for."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(scope="session")
def source(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("gpu") / "source"
    return models.save_with_tokenizer(folder, models.FAMILIES["llama"]())


@pytest.fixture(scope="session")
def variants(source: Path) -> Path:
    """The folder of all of its variants."""
    quantize_folder(source, source.parent / "quantized")
    for folder in (source.parent / "quantized").iterdir():
        models.save_tokenizer(folder)
    return source.parent / "quantized"
