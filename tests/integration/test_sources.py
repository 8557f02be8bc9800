"""The same weights in every form that users have them give the same variants."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from command import Run
from smolquant.record import VariantRecord

RunSmolquant = Callable[..., Run]
CONFIG = models.FAMILIES["smollm3"]


def with_state(folder: Path, change: Callable[[dict[str, torch.Tensor], Path], object]) -> Path:
    """A checkpoint whose single weight file is taken away and handed to ``change`` to be put back."""
    models.save(folder, CONFIG())
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    change(state, folder)
    return folder


def tied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as torch saves it: the tied head is there, sharing the embedding's memory."""
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}


def as_shards(state: dict[str, torch.Tensor], folder: Path, suffix: str) -> dict[str, str]:
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    save: Callable[[dict[str, torch.Tensor], Path], object] = (
        save_file if suffix == "safetensors" else torch.save
    )
    names = sorted(state)
    halves = names[::2], names[1::2]
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        shard = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({name: state[name] for name in half}, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


FORMS: dict[str, Callable[[dict[str, torch.Tensor], Path], object]] = {
    "one safetensors": lambda state, to: save_file(state, to / "model.safetensors"),
    "safetensors shards": lambda state, to: as_shards(state, to, "safetensors"),
    "one bin": lambda state, to: torch.save(tied(state), to / "pytorch_model.bin"),
    "bin shards": lambda state, to: as_shards(state, to, "bin"),
    "legacy bin": lambda state, to: torch.save(
        state, to / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "base model's names": lambda state, to: save_file(
        {name.removeprefix("model."): value for name, value in state.items()},
        to / "model.safetensors",
    ),
}


@pytest.fixture
def expected(tmp_path: Path, smolquant: RunSmolquant) -> dict[str, torch.Tensor]:
    """The int4 weights made from a plain checkpoint."""
    folder = models.save(tmp_path / "plain", CONFIG())
    run = smolquant(
        "quantize", folder, "--save-only", "--quant-type", "int4_weight_only", "--output-dir", "a"
    )
    assert run.exit_code == 0, run.log
    return load_file(tmp_path / "a/int4/model.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_the_checkpoint_does_not_matter(
    tmp_path: Path, smolquant: RunSmolquant, expected: dict[str, torch.Tensor], form: str
) -> None:
    folder = with_state(tmp_path / "source", FORMS[form])
    run = smolquant("quantize", folder, "--save-only", "--quant-type", "int4_weight_only")
    assert run.exit_code == 0, run.log
    stored = load_file(tmp_path / "quantized/int4/model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    record = VariantRecord.from_json((tmp_path / "quantized/int4/quantization.json").read_text())
    if form == "one bin":
        assert record.tensors["lm_head.weight"].reason == (
            "tied to model.embed_tokens.weight, stored once"
        )
        assert record.tensors["lm_head.weight"].size_bytes == 0


@pytest.mark.parametrize(
    ("stored", "asked", "kept"),
    [
        (torch.float32, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_dtypes_load_and_compute_as_the_source_does(
    tmp_path: Path, smolquant: RunSmolquant, stored: torch.dtype, asked: str, kept: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = models.save(tmp_path / "source", CONFIG(), dtype=stored)
    run = smolquant("quantize", folder, "--save-only", "--dtype", asked)
    assert run.exit_code == 0, run.log
    variant = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", subfolder="int8")
    assert variant.dtype is kept
    source = models.logits(AutoModelForCausalLM.from_pretrained(folder))
    distance = (models.logits(variant) - source).norm() / source.norm()
    assert distance < 0.06


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_loads_again_where_that_is_allowed(
    tmp_path: Path, smolquant: RunSmolquant
) -> None:
    from transformers import AutoModelForCausalLM

    folder = models.save(tmp_path / "source", models.llama(layers=2))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "own_model.OwnConfig",
        "AutoModelForCausalLM": "own_model.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(OWN_MODEL)

    run = smolquant("quantize", folder, "--save-only", "--trust-remote-code")
    assert run.exit_code == 0, run.log
    where = {"subfolder": "int8", "trust_remote_code": True}
    variant = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", **where)
    source = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = models.logits(source)
    assert (models.logits(variant) - expected).norm() / expected.norm() < 0.06


def test_weights_that_share_memory_without_being_tied_are_both_stored(
    tmp_path: Path, smolquant: RunSmolquant
) -> None:
    from transformers import AutoModelForCausalLM

    folder = models.save(tmp_path / "source", models.llama(layers=2))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")

    run = smolquant("quantize", folder, "--save-only")
    assert run.exit_code == 0, run.log
    variant = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", subfolder="int8")
    assert torch.equal(variant.lm_head.weight, variant.model.embed_tokens.weight)
    expected = models.logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (models.logits(variant) - expected).norm() / expected.norm() < 0.06


def test_old_checkpoints_masks_are_no_weights(tmp_path: Path, smolquant: RunSmolquant) -> None:
    """GPT-NeoX used to save -1e9 as ``masked_bias``, an infinity in float16, which nothing reads."""
    folder = models.save(tmp_path / "source", models.FAMILIES["gpt_neox"]())
    state = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.attention.masked_bias"
    state[name] = torch.tensor(float("-inf"), dtype=torch.float16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    run = smolquant("quantize", folder, "--save-only")
    assert run.exit_code == 0, run.log
    assert name not in load_file(tmp_path / "quantized/int8/model.safetensors")


@pytest.mark.fault(
    "checkpoint",
    "Two names in the checkpoint stand for one parameter",
    "Exit 3 with both.",
)
def test_two_names_of_one_parameter_are_refused(tmp_path: Path, smolquant: RunSmolquant) -> None:
    folder = models.save(tmp_path / "source", CONFIG())
    state = load_file(folder / "model.safetensors")
    state["layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    run = smolquant("quantize", folder, "--save-only")
    assert run.exit_code == 3
    assert "are both the model's 'model.layers.0.mlp.up_proj.weight'" in run.log


@pytest.mark.fault(
    "checkpoint",
    "A pickle holds a sparse or meta tensor, or a dtype that weights never have",
    "Exit 3 with the tensor and its kind.",
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_bin_of_dtypes_that_weights_never_have(
    tmp_path: Path, smolquant: RunSmolquant, dtype: torch.dtype
) -> None:
    folder = with_state(
        tmp_path / "source",
        lambda state, to: torch.save(
            {name: value.to(dtype) for name, value in state.items()}, to / "pytorch_model.bin"
        ),
    )
    run = smolquant("quantize", folder, "--save-only")
    assert run.exit_code == 3
    assert "which unquantized weights never have" in run.log


def test_the_source_counts_tied_memory_once(tmp_path: Path, smolquant: RunSmolquant) -> None:
    folder = with_state(tmp_path / "source", FORMS["one bin"])
    run = smolquant("quantize", folder, "--save-only")
    record = VariantRecord.from_json((tmp_path / "quantized/int8/quantization.json").read_text())
    physical = sum(tensor.source_bytes for tensor in record.tensors.values())
    assert record.source.size_bytes == physical == run.report["source"]["size_bytes"]
