"""A model that is streamed from disk computes what the model in memory computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Int4Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, OPTConfig

import models
from evaluate_parts import quantize_folder
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import STORED_DTYPES
from smolquant.model.architecture import Architecture
from smolquant.model.layerwise import StreamedModel
from smolquant.model.weights import SourceWeights, VariantWeights
from smolquant.runtime.kernels import use_kernels
from smolquant.schemes import BY_VARIANT

SIZES = {name: value for name, value in models.SIZES.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, Callable[[], Any]] = {
    **models.FAMILIES,
    "gpt2": models.GPT2,
    # Logits that are capped after the head, and layers with a sliding window shorter than the text.
    "gemma2": lambda: Gemma2Config(
        **models.SIZES, head_dim=32, sliding_window=16, final_logit_softcapping=5.0
    ),
    # Logits that are scaled after the head.
    "granite": lambda: GraniteConfig(**models.SIZES, logits_scaling=8.0, embedding_multiplier=6.0),
    # The layers' list is not in the base model itself, and positions have a table of their own.
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64),
}
WINDOWS = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(1))


def from_pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def head_logits(streamed: StreamedModel, hidden: torch.Tensor, block: int) -> torch.Tensor:
    parts = []
    for first in range(0, streamed.vocabulary_size, block):
        with streamed.head_rows(first, min(first + block, streamed.vocabulary_size)) as logits:
            parts.append(logits(hidden))
    return torch.cat(parts, dim=-1)


def in_memory(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head is given, and float32 logits, of each window by itself."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    with torch.inference_mode():
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for window in WINDOWS:
            model(window.unsqueeze(0), use_cache=False)
        handle.remove()
        hidden = torch.cat(seen)
        head.weight = torch.nn.Parameter(head.weight.float())  # of its own where it was tied
        handle = head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        logits = torch.cat(
            [model(window.unsqueeze(0), use_cache=False).logits for window in WINDOWS]
        )
        handle.remove()
    return hidden, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_source_equals_the_model_in_memory(family: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", FAMILIES[family]())
    architecture = Architecture(folder, trust_remote_code=False)
    hidden, logits = in_memory(from_pretrained(folder))
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        streamed = StreamedModel(architecture, SourceWeights(checkpoint, architecture))
        states = streamed.hidden_states(WINDOWS)
        assert states.dtype is torch.bfloat16
        assert torch.equal(states, hidden)
        in_blocks = head_logits(streamed, states.flatten(0, 1), block=100)
    torch.testing.assert_close(in_blocks, logits.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert all(parameter.is_meta for parameter in streamed._model.parameters())


@pytest.mark.parametrize("variant", BY_VARIANT)
@pytest.mark.parametrize("family", ["smollm3", "gemma3", "phi3"])
def test_variant_equals_the_model_in_memory(family: str, variant: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", FAMILIES[family]())
    variants = quantize_folder(folder, tmp_path / "out")
    architecture = Architecture(folder, trust_remote_code=False)
    loaded = from_pretrained(variants[variant])
    assert any(isinstance(p, Int4Tensor) for p in loaded.parameters()) == (variant == "int4")
    use_kernels(loaded)
    hidden, logits = in_memory(loaded)
    files = sorted(variants[variant].glob("*.safetensors"))
    with Checkpoint(files, STORED_DTYPES) as checkpoint:
        weights = VariantWeights(checkpoint, architecture, files[0])
        streamed = StreamedModel(architecture, weights, prepare=use_kernels)
        states = streamed.hidden_states(WINDOWS)
        assert torch.equal(states, hidden)
        in_blocks = head_logits(streamed, states.flatten(0, 1), block=1000)
    torch.testing.assert_close(in_blocks, logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_sharded_variant_and_a_float32_pickle_are_read(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", FAMILIES["llama"](), dtype=torch.float32)
    variants = quantize_folder(folder, tmp_path / "out", max_shard_size=300_000)
    files = sorted(variants["int8"].glob("*.safetensors"))
    assert len(files) > 1
    model = from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    architecture = Architecture(folder, trust_remote_code=False)
    with (
        Checkpoint([folder / "pytorch_model.bin"]) as checkpoint,
        Checkpoint(files) as quantized,
    ):
        source = StreamedModel(architecture, SourceWeights(checkpoint, architecture))
        variant = StreamedModel(architecture, VariantWeights(quantized, architecture, files[0]))
        states = source.hidden_states(WINDOWS)
        assert states.dtype is torch.float32
        assert torch.equal(states, in_memory(model)[0])
        difference = (variant.hidden_states(WINDOWS).float() - states).norm() / states.norm()
    assert 0 < difference < 0.05


def test_a_window_does_not_depend_on_the_others(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", FAMILIES["gemma2"]())
    architecture = Architecture(folder, trust_remote_code=False)
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        streamed = StreamedModel(architecture, SourceWeights(checkpoint, architecture))
        together = streamed.hidden_states(WINDOWS)
        alone = streamed.hidden_states(WINDOWS[1:2])
    assert torch.equal(together[1:2], alone)


def test_advance_tells_every_byte_of_the_layers(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "source", FAMILIES["llama"]())
    architecture = Architecture(folder, trust_remote_code=False)
    told: list[int] = []
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        streamed = StreamedModel(
            architecture, SourceWeights(checkpoint, architecture), advance=told.append
        )
        streamed.hidden_states(WINDOWS)
        outside = {"model.embed_tokens.weight", "lm_head.weight"}
        inside = sum(
            tensor.size_bytes
            for name, tensor in checkpoint.layout.tensors.items()
            if name not in outside
        )
    assert sum(told) == streamed.size_bytes == inside
