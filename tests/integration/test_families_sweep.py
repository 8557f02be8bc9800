"""A short list of families, one for each way in which they differ, through `make families`' own proof.

The whole sweep runs at night; what it proves of each family is in tools/families/prove.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

WORKS = [
    "causal/bert",  # an encoder that is a decoder
    "causal/bloom",  # position biases, a norm behind the table
    "causal/falcon_mamba",  # computes otherwise with quantized weights; one of them is multiplied by hand
    "causal/gemma3_text",  # a table of its own kind
    "causal/gpt_oss",  # experts that are multiplied from the right
    "causal/hrm_text",  # several weights of one tensor
    "causal/llama",
    "causal/mixtral",  # experts in a tensor each
    "causal/olmo_hybrid",  # one weight of several tensors, and some in float32 by its own code
    "causal/opt",  # projections in and out of the table
    "causal/phi3",  # fused projections
    "causal/qwen3_moe",
    "image-text-to-text/blip-2",  # a parameter of the model itself; runs with a picture only
    "image-text-to-text/git",  # no language model of its own
    "image-text-to-text/internvl",
    "image-text-to-text/llava",
    "image-text-to-text/qwen2_5_vl",
    "image-text-to-text/unlimited_ocr",  # transformers renames its own names once more
]
TEXT_ONLY = {"image-text-to-text/unlimited_ocr"}
"""A picture for it cannot be made by hand."""
REFUSED = {"causal/gpt2": "Conv1D", "causal/falcon": "FalconLinear"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the sweep says of int8, by family."""
    folder = tmp_path_factory.mktemp("families")
    options = ["--schemes", "int8_weight_only", "--results", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "families", *options, *WORKS, *REFUSED],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        check=True,
        capture_output=True,
    )
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {one["key"]: one for one in results}


@pytest.mark.parametrize("family", WORKS)
def test_int8_is_what_torchao_makes_in_memory(
    found: dict[str, dict[str, Any]], family: str
) -> None:
    one = found[family]
    assert one["outcomes"]["int8_weight_only"]["verdict"] == "works", one
    assert one["image"] or not family.startswith("image") or family in TEXT_ONLY


@pytest.mark.parametrize("family", REFUSED)
def test_what_nobody_can_quantize_is_refused_with_the_reason(
    found: dict[str, dict[str, Any]], family: str
) -> None:
    outcome = found[family]["outcomes"]["int8_weight_only"]
    assert outcome["verdict"] == "refused"
    assert REFUSED[family] in outcome["reason"]
    assert outcome["stock"], "transformers and torchao by themselves cannot either"
