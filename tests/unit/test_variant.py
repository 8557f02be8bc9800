"""What stands in a variant's folder beside its weights."""

import json
from pathlib import Path

from smolquant.quantize.variant import _copy

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
