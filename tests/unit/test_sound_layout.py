"""What is wrong with a whole checkpoint is told by its cause; what is merely odd is left out, and said."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import models
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import Layout
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture, take_quantizer
from smolquant.quantize.sound_layout import _LOADED_PLAIN, sound_layout

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
Q_PROJ = "model.layers.0.self_attn.q_proj"
State = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save(tmp_path / "source", models.llama(2))


def configure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def change(folder: Path, edit: Callable[[State], State]) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def look(folder: Path) -> tuple[Layout, list[str]]:
    """The layout, and the titles of what was said of it."""
    said: list[str] = []
    layout = sound_layout(
        FolderSource(folder),
        Architecture(folder, trust_remote_code=False),
        lambda title, text: said.append(title),
    )
    return layout, said


def test_a_sound_model_is_passed_without_a_word(folder: Path) -> None:
    layout, said = look(folder)
    assert layout == FolderSource(folder).layout()
    assert not said


def test_no_quantizer_is_none(folder: Path) -> None:
    configure(folder, quantization_config=None)
    assert look(folder)[1] == []
    assert "quantization_config" not in Architecture(folder, trust_remote_code=False).config_dict


@pytest.mark.fault(
    "checkpoint",
    "A quantizer left its config on plain weights",
    "It is dropped, and that is said.",
)
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (FP8, "fp8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "gguf"}, "gguf"),
        ({}, "unknown"),
    ],
)
def test_what_a_quantizer_left_behind_on_plain_weights_is_dropped(
    folder: Path, entry: dict[str, Any], name: str
) -> None:
    configure(folder, quantization_config=entry)
    change(folder, lambda state: state | {"mtp.layers.0.up.weight": torch.ones(4, 4)})
    assert look(folder)[1] == [f"A left-over of {name} is left out"]
    architecture = Architecture(folder, trust_remote_code=False)
    assert "quantization_config" not in architecture.config_dict
    assert not hasattr(architecture.model.config, "quantization_config")


def test_an_entry_of_a_part_is_found_too() -> None:
    config = {
        "text_config": {"hidden_size": 8, "quantization_config": FP8},
        "quantization_config": None,
    }
    assert take_quantizer(config) == "fp8"
    assert config == {"text_config": {"hidden_size": 8}}


def packed(state: State) -> State:
    weight = state.pop(f"{Q_PROJ}.weight")
    return state | {f"{Q_PROJ}.qweight": weight.new_zeros(16, 128, dtype=torch.int32)}


@pytest.mark.fault(
    "checkpoint",
    "The weights were packed by another quantizer",
    "Exit 3 with the quantizer's name.",
)
@pytest.mark.parametrize(
    "edit",
    [
        packed,
        lambda state: state | {f"{Q_PROJ}.weight": state[f"{Q_PROJ}.weight"].to(torch.int8)},
        lambda state: state | {f"{Q_PROJ}.weight": torch.zeros(8192, 1, dtype=torch.uint8)},
        lambda state: state | {f"{Q_PROJ}.weight_scale_inv": torch.ones(1, 1)},
        lambda state: state | {f"{Q_PROJ}.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn)},
        lambda state: state | {f"{Q_PROJ}.weight": torch.zeros(128, 128).to(torch.float8_e5m2)},
    ],
)
def test_weights_that_a_quantizer_packed_are_refused_by_its_name(
    folder: Path, edit: Callable[[State], State]
) -> None:
    configure(folder, quantization_config=FP8)
    change(folder, edit)
    with pytest.raises(CheckpointError, match=f"quantized already, by fp8 .*{Q_PROJ}") as refusal:
        look(folder)
    assert "Start from the unquantized checkpoint" in refusal.value.hint
    assert "FineGrainedFP8Config(dequantize=True)" in refusal.value.hint


@pytest.mark.parametrize("name", _LOADED_PLAIN)
def test_the_call_that_dequantizes_is_transformers_own(name: str) -> None:
    config_class = getattr(transformers, _LOADED_PLAIN[name])
    assert "dequantize" in inspect.signature(config_class).parameters
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is config_class


def test_experts_that_a_quantizer_packed_are_refused_by_its_name(tmp_path: Path) -> None:
    """As gpt-oss is released: blocks of four bits, and their scales, for each stack."""
    folder = models.save(tmp_path / "m", models.MIXTURES["gpt_oss"]())

    def to_mxfp4(state: State) -> State:
        stacks = [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]
        for name in stacks:
            experts, inputs, outputs = state.pop(name).shape
            state[f"{name}_blocks"] = torch.zeros(experts, outputs, inputs // 32, 16).byte()
            state[f"{name}_scales"] = torch.zeros(experts, outputs, inputs // 32).byte()
        return state

    configure(folder, quantization_config={"quant_method": "mxfp4"})
    change(folder, to_mxfp4)
    with pytest.raises(CheckpointError, match="quantized already, by mxfp4 .*_proj_") as refusal:
        look(folder)
    assert "Mxfp4Config(dequantize=True)" in refusal.value.hint


@pytest.mark.fault(
    "checkpoint",
    "The weights are the empty ones that DeepSpeed ZeRO-3 saves",
    "Exit 3, named as that.",
)
@pytest.mark.parametrize("keep", [(), ("norm",)])
def test_the_empty_weights_of_zero_3_are_known_as_such(folder: Path, keep: tuple[str, ...]) -> None:
    """Small ones may be whole: not all are divided."""
    change(
        folder,
        lambda state: {
            name: tensor if any(part in name for part in keep) else tensor.new_empty(0)
            for name, tensor in state.items()
        },
    )
    with pytest.raises(CheckpointError, match="weights are empty, .* ZeRO-3") as refusal:
        look(folder)
    assert "zero_to_fp32.py" in refusal.value.hint


@pytest.mark.fault(
    "checkpoint",
    "torch.compile or data parallelism wrapped the whole model",
    "The wrapper is left out of the names.",
)
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_wrapper_around_the_whole_model_is_left_out(
    folder: Path, wrapper: str, pickled: bool
) -> None:
    plain = load_file(folder / "model.safetensors")
    change(folder, lambda state: {wrapper + name: tensor for name, tensor in state.items()})
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    layout, said = look(folder)
    assert said == [f"Every weight's name begins with {wrapper}"]
    assert set(layout.tensors) == set(plain)
    with FolderSource(folder).checkpoint() as checkpoint:
        assert checkpoint.layout == layout
        for name, tensor in checkpoint.layout.tensors.items():
            assert torch.equal(checkpoint.read_rows(tensor, 0, tensor.rows), plain[name])


@pytest.mark.fault(
    "checkpoint",
    "torch.compile or data parallelism wrapped a part of the model",
    "Exit 3 with the names.",
)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.0.", "_orig_mod.model.layers.0."),
        ("model.layers.", "model._orig_mod.layers."),
    ],
)
def test_a_wrapper_around_a_part_is_named(folder: Path, old: str, new: str) -> None:
    change(folder, lambda state: {name.replace(old, new): state[name] for name in state})
    with pytest.raises(CheckpointError, match="names that torch.compile or data parallelism") as no:
        look(folder)
    assert new in no.value.message


def test_names_shared_in_a_wrapped_pickle_are_unwrapped_too(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"module.embed": weight, "module.head": weight}, tmp_path / "m.bin")
    with Checkpoint([tmp_path / "m.bin"]) as checkpoint:
        assert checkpoint.layout.aliases == {"head": "embed"}


@pytest.mark.fault(
    "checkpoint",
    "An old single weight file hides the shards beside it",
    "Exit 3 with both names.",
)
def test_a_single_file_that_hides_the_shards_is_named(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", models.llama(2), max_shard_size="200KB")
    save_file({"lm_head.weight": torch.zeros(320, 128)}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="lies beside model.safetensors.index.json"
    ) as refusal:
        look(folder)
    assert "Remove model.safetensors" in refusal.value.hint


def test_a_whole_single_file_is_taken_as_transformers_takes_it(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert look(folder) == (FolderSource(folder).layout(), [])
