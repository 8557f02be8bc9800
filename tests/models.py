"""Small models of the families that users release, built from their configs with a fixed seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

SMOLLM3_3B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
    "pad_token_id": 0,
}


def _neox() -> PretrainedConfig:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**sizes)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm3": lambda: SmolLM3Config(**SIZES, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "gpt_neox": _neox,
}

MOE: Callable[[], PretrainedConfig] = lambda: Qwen3MoeConfig(  # noqa: E731
    **SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
)

GPT2: Callable[[], PretrainedConfig] = lambda: GPT2Config(  # noqa: E731
    vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
)


def llama(layers: int) -> PretrainedConfig:
    """A Llama of some depth, untied."""
    return LlamaConfig(**SIZES | {"num_hidden_layers": layers})


def build(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model with reproducible weights, spread wide enough that logits tell models apart.

    Norms have weights of their own, as trained ones do: some columns matter more than others.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.08)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def save(folder: Path, config: PretrainedConfig, **options: Any) -> Path:
    """A checkpoint folder with weights and configs, no tokenizer."""
    dtype = options.pop("dtype", torch.bfloat16)
    build(config, dtype).save_pretrained(folder, **options)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Next-token logits on a fixed prompt, float32."""
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.float()


def save_with_tokenizer(folder: Path, config: PretrainedConfig, **options: Any) -> Path:
    """A checkpoint folder as a trainer leaves it: weights, configs, tokenizer, chat template."""
    save(folder, config, **options)
    words = {f"<{i}>": i for i in range(SIZES["vocab_size"])}
    backend = Tokenizer(WordLevel(words, unk_token="<0>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<1>", eos_token="<2>", pad_token="<0>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def save_zeros(folder: Path, config: PretrainedConfig) -> Path:
    """A checkpoint of any size whose weights, all zero, take no room on the disk: one sparse file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    entries, end = {}, 0
    for name, weight in model.named_parameters():
        begin, end = end, end + weight.nbytes
        entries[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return folder


def save_sentencepiece(folder: Path) -> Path:
    """A tokenizer that is a ``tokenizer.model`` alone, as Llama 2's: bytes, and a few words."""
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = module.ModelProto()
    types = model.SentencePiece
    special = [("<unk>", types.UNKNOWN), ("<s>", types.CONTROL), ("</s>", types.CONTROL)]
    in_bytes = [(f"<0x{byte:02X}>", types.BYTE) for byte in range(256)]
    words = [
        (word, types.NORMAL) for word in ("\u2581", *"etaoinsrh", "\u2581t", "he", "\u2581the")
    ]
    for place, (text, kind) in enumerate([*special, *in_bytes, *words]):
        model.pieces.add(piece=text, score=-float(place), type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(model.pieces)
    trainer.byte_fallback = True
    model.normalizer_spec.name = "identity"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    return folder
