"""A config.json that no model can be built of is refused at once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import FAMILIES
from smolquant.errors import CheckpointError
from smolquant.model.config import read_config


def write(folder: Path, content: str) -> Path:
    (folder / "config.json").write_text(content)
    return folder


@pytest.mark.fault(
    "checkpoint",
    "config.json has numbers that no model has, such as a billion layers",
    "Exit 3 with the entry, before anything is built of them.",
)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1,000,000,000"),
        ({"n_layer": 100_000}, "'n_layer' is 100,000"),
        ({"text_config": {"num_hidden_layers": 10**5}}, "'num_hidden_layers' is 100,000"),
        ({"vision_config": {"depths": [1, 10**5]}}, "'depths' is 100,000"),
        ({"num_experts": 10**6}, "'num_experts' is 1,000,000"),
        ({"vocab_size": 10**12}, "'vocab_size' is 1,000,000,000,000"),
        ({"hidden_size": 10**9}, "'hidden_size' is"),
        ({"num_labels": 10**9}, "'num_labels' is"),
        ({"vision_config": {"num_classes": 10**8}}, "'num_classes' is"),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, json.dumps({"model_type": "llama", **changes}))
    with pytest.raises(CheckpointError, match="no model has") as refusal:
        read_config(tmp_path)
    assert said in refusal.value.message


@pytest.mark.fault(
    "checkpoint",
    "config.json is deeply nested, huge, or not JSON",
    "Exit 3 within a moment.",
)
@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a": ' * 100_000 + "1" + "}" * 100_000,
        '{"id2label": {' + ", ".join(f'"{i}": "x"' for i in range(700_000)) + "}}",
        '{"model_type": "llama"',
        "[]",
        '{"model_type": {}}',
    ],
    ids=["lists", "objects", "labels", "cut off", "no object", "no model type"],
)
def test_hostile_files_are_refused_in_no_time(tmp_path: Path, content: str) -> None:
    write(tmp_path, content)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_real_models_say_is_read(tmp_path: Path, family: str) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    assert read_config(tmp_path)["model_type"]


def test_no_default_of_transformers_is_refused(tmp_path: Path) -> None:
    """Whatever a family's released models are like, its default config is like them."""
    read = 0
    for model_type in CONFIG_MAPPING:
        try:
            config = AutoConfig.for_model(model_type)
            write(tmp_path, config.to_json_string(use_diff=False))
        except Exception:
            continue
        read_config(tmp_path)
        read += 1
    assert read > 300
