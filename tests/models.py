"""Small models of the families that users release, built from their configs with a fixed seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2MoeConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
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

MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    # One matrix an expert in the files, which transformers puts together.
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    # The same under other names, and a shared expert with a gate of its own.
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    # Stacks in the files, each matrix (K, N) and multiplied from the right.
    "gpt_oss": lambda: GptOssConfig(
        **SIZES, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=64
    ),
}

GPT2: Callable[[], PretrainedConfig] = lambda: GPT2Config(  # noqa: E731
    vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
)


def llama(layers: int) -> PretrainedConfig:
    """A Llama of some depth, untied."""
    return LlamaConfig(**SIZES | {"num_hidden_layers": layers})


def _qwen3_5() -> PreTrainedModel:
    text = SIZES | {
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
    }
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 311,
        "vision_start_token_id": 312,
        "vision_end_token_id": 313,
    }
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    )


def _gemma3() -> PreTrainedModel:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = SIZES | {"head_dim": 32, "sliding_window": 64}
    tokens = {"image_token_index": IMAGE_TOKEN, "boi_token_index": 311, "eoi_token_index": 312}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


IMAGE_TOKEN = 310

SEEING: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_5": _qwen3_5, "gemma3": _gemma3}
"""Models that answer about pictures."""


def image_inputs(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with four image tokens and the pixels of one picture, for a model of :data:`SEEING`."""
    pixels = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[5, 6, 312, *[IMAGE_TOKEN] * 4, 313, 9, 10, 11]])
    if family == "gemma3":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(1, 3, 28, 28, generator=pixels).bfloat16(),
            "token_type_ids": (ids == IMAGE_TOKEN).long(),
        }
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=pixels).bfloat16(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

OTHER_TASKS: dict[str, Callable[[], PreTrainedModel]] = {
    "reward": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_labels=1)),
    "masked": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=320,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "speech": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**_SEQ2SEQ, max_source_positions=50, suppress_tokens=None)
    ),
    "translation": lambda: MBartForConditionalGeneration(MBartConfig(**_SEQ2SEQ)),
}
"""Models that do something other than generating text."""


def build(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A causal language model with reproducible weights, see :func:`trained`."""
    torch.manual_seed(0)
    return trained(AutoModelForCausalLM.from_config(config, dtype=dtype))


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with reproducible weights, spread wide enough that logits tell models apart.

    Norms have weights of their own, as trained ones do: some columns matter more than others.
    """
    torch.manual_seed(0)
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
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """Add a tokenizer with a word a token, and a chat template."""
    words = {f"<{i}>": i for i in range(SIZES["vocab_size"])}
    backend = Tokenizer(WordLevel(words, unk_token="<0>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<1>", eos_token="<2>", pad_token="<0>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> Path:
    """Add a tokenizer with a token a byte, which any family's own tokenizer class reads."""
    vocabulary = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
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
