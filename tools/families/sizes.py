"""What the default configs of some families lack or have too much of, before they are shrunk.

A default config that transformers cannot build a model of has no value where checkpoints have one, and a
few have so many different layers, or tables of hashes, that nothing can be cut by rule.
"""

from collections.abc import Mapping
from typing import Any

_HEADS: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_WITH_HEAD_DIM = _HEADS | {"intermediate_size": 256, "head_dim": 32}

_GLM_ROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [8, 12, 12],
    "partial_rotary_factor": 0.5,
}

_BLT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 512,
    "split_ngram_parts": 8,
}

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blenderbot": {"decoder_layers": 2, "encoder_layers": 2},
    "blip-2": {"image_token_index": 250},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_global_transformer": _BLT | {"hidden_size": 256},
    "blt_local_decoder": _BLT | {"hidden_size_global": 256},
    "blt_local_encoder": _BLT | {"hidden_size_global": 256},
    "blt_patcher": _BLT,
    "chameleon": {"vocabulary_map": {"<image>": 100, "<racm3:break>": 101, "<eoss>": 102}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"num_hidden_layers": 2, "num_experts_per_tok": 2}
    | {"mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 1408},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1}
    | {"moe_intermediate_size": 1408},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 128},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    | {"first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}}
    | {"vq_config": {"base_channels": 32}},
    "gemma3": {"mm_tokens_per_image": 49},
    "glm4v_moe_text": {"head_dim": 128, "rope_parameters": _GLM_ROPE},
    "glm4v_text": {"rope_parameters": _GLM_ROPE},
    "gpt_neox_japanese": {"num_hidden_layers": 2},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "helium": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "hunyuan_v1_dense": _WITH_HEAD_DIM,
    "hunyuan_v1_moe": _WITH_HEAD_DIM | {"num_experts": 8, "moe_topk": 2},
    "idefics3": {"vision_config": {"image_size": 256}},
    "instructblip": {"image_token_index": 250},
    "instructblipvideo": {"video_token_index": 250},
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "ministral": _WITH_HEAD_DIM,
    "nemotron": {"num_key_value_heads": 8},
    "qwen2_5_vl": {"vision_config": {"out_hidden_size": 8192}},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "qwen3_omni_moe_thinker": {"text_config": {"num_attention_heads": 32}},
    "qwen4_exp_text": _INDEXER,
    "hunyuan_vl_text": _WITH_HEAD_DIM
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4] * 4}},
    "smolvlm": {"vision_config": {"image_size": 256}},
    "step3p7": {"text_config": {"sliding_window": 32}},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
}
"""Model type, or that of the text config in it -> entries."""
