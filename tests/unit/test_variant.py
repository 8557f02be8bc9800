"""What stands in a variant's folder beside its weights."""

import json
from pathlib import Path

import pytest

from smolquant.quantize.variant import _copy, _has_chat_template

REPO = "them/model"


def test_code_is_found_in_the_sources_repository_however_deep_a_config_names_it(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "processor_config.json", tmp_path / "copy.json"
    entries = {
        "image_processor": {"auto_map": {"AutoImageProcessor": "image_own.Own"}, "size": 8},
        "parts": [{"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}],
        "auto_map": {"AutoProcessor": "other/repo--processing_own.Own"},
    }
    source.write_text(json.dumps(entries))
    _copy(source, target, REPO)
    assert json.loads(target.read_text()) == {
        "image_processor": {
            "auto_map": {"AutoImageProcessor": f"{REPO}--image_own.Own"},
            "size": 8,
        },
        "parts": [{"auto_map": {"AutoTokenizer": [None, f"{REPO}--tokenization_own.Own"]}}],
        "auto_map": {"AutoProcessor": "other/repo--processing_own.Own"},
    }
    _copy(source, target, None)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("files", "has_one"),
    [
        ({}, False),
        ({"chat_template.jinja": "{{ messages }}"}, True),
        ({"chat_template.json": "{}"}, True),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": '{"chat_template": null}'}, False),
        ({"tokenizer_config.json": '{"eos_token": "chat_template"}'}, False),
        ({"tokenizer_config.json": "{broken"}, False),
        ({"tokenizer_config.json": "[]"}, False),
    ],
)
def test_a_chat_template_is_found_wherever_transformers_finds_one(
    files: dict[str, str], has_one: bool, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _has_chat_template(tmp_path) == has_one
