"""What quantizing a mixture of experts costs beside a dense model of the same bytes, as whole processes.

``python bench/experts.py`` (or ``make bench-experts``) builds both and prints a table. The mixture is
shaped like Qwen3-MoE, with 128 experts a layer, one matrix each in its files. ROUNDS says how often each is
measured; the cases take turns, and medians are reported.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from perf import WORK, medians, ours
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


def build(name: str, config: PretrainedConfig) -> Path:
    """A checkpoint with random bfloat16 weights, made once."""
    folder = WORK / f"input-{name}"
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
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
    return folder


def main() -> None:
    """Measure and print."""
    WORK.mkdir(exist_ok=True)
    inputs = {"dense": build("dense", DENSE), "mixture": build("mixture", MIXTURE)}
    sizes = {
        name: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for name, folder in inputs.items()
    }
    cases = {
        (name, asked): replace(ours(folder, asked), name=f"{name}, {asked}")
        for asked in ("int8_weight_only", "int4_weight_only")
        for name, folder in inputs.items()
    }
    found = medians(list(cases.values()), int(os.environ.get("ROUNDS", "3")))
    print("| | source | wall | CPU | source a second | peak memory |\n|---|--:|--:|--:|--:|--:|")
    for (name, _), case in cases.items():
        sample = found[case.name]
        print(
            f"| {case.name} | {sizes[name] / 1e9:.2f} GB | {sample.seconds:.1f} s "
            f"| {sample.cpu_seconds:.1f} s | {sizes[name] / sample.seconds / 1e9:.2f} GB/s "
            f"| {sample.peak_bytes / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    main()
