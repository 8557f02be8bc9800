"""Builds the inputs of experts.py, with random weights: ``python bench/mixture.py dense|mixture FOLDER``.

It is a program of its own, since what measures must not hold torch: a process's peak counts its parent's.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from smolquant.checkpoint.tensors import StoredTensor
from smolquant.checkpoint.writer import ShardWriter, index_text, lay_out

COMMON = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32768,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
MIXTURE = Qwen3MoeConfig(
    **COMMON,
    num_hidden_layers=5,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    intermediate_size=6144,
)
DENSE = Qwen3Config(**COMMON, num_hidden_layers=50, intermediate_size=8192)
"""Both have about 3.1 billion parameters."""


def stored_one_by_one(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors in a Qwen3-MoE's files that a parameter is made of."""
    if ".mlp.experts." not in name:
        return [(name, shape)]
    place, _, stack = name.rpartition(".")
    experts, rows, columns = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[stack]
    return [
        (f"{place}.{number}.{part}.weight", (rows // len(parts), columns))
        for number in range(experts)
        for part in parts
    ]


def build(folder: Path, config: PretrainedConfig) -> None:
    """Write a checkpoint into ``folder``, its config at last."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = [
        StoredTensor(stored, torch.bfloat16, shape)
        for parameter, value in model.named_parameters()
        for stored, shape in stored_one_by_one(parameter, tuple(value.shape))
    ]
    shards = lay_out([[tensor] for tensor in tensors], {"format": "pt"}, 2 * 10**9)
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for tensor in shard.tensors:
                values = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_norm = len(tensor.shape) == 1
                writer.write(tensor.name, values.fill_(1) if is_norm else values.normal_(0, 0.02))
    if (index := index_text(shards)) is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[2]), {"dense": DENSE, "mixture": MIXTURE}[sys.argv[1]])
