"""What a model's own code cannot run quantized shows on a small model of it, before the work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    OlmoConfig,
    PhiConfig,
    PretrainedConfig,
    ReformerConfig,
    RwkvConfig,
)

import models
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture
from smolquant.model.shrink import smaller_configs
from smolquant.quantize.plan import VariantPlan, make_plan
from smolquant.quantize.trial import Trial, try_variants
from smolquant.schemes import BY_VARIANT, SCHEMES, Quantize

SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2}

FALCON = FalconConfig(**SMALL, num_attention_heads=4)
MAMBA = MambaConfig(**SMALL, state_size=8, time_step_rank=32)
RWKV = RwkvConfig(**SMALL, attention_hidden_size=128, intermediate_size=256, context_length=64)


def plans_of(folder: Path, *quant_types: str, **options: Any) -> dict[str, VariantPlan]:
    return make_plan(
        FolderSource(folder).layout(),
        Architecture(folder, trust_remote_code=False),
        [SCHEMES[quant_type] for quant_type in quant_types or SCHEMES],
        group_size=128,
        dtype="auto",
        max_shard_size=10**9,
        skip=(),
        **options,
    )


def trials_of(folder: Path, *quant_types: str) -> dict[str, Trial]:
    architecture = Architecture(folder, trust_remote_code=False)
    return try_variants(architecture, plans_of(folder, *quant_types), folder)


@pytest.mark.parametrize(
    "config",
    [
        models.FAMILIES["llama"](),
        models.FAMILIES["gpt_neox"](),
        Gemma2Config(**models.SIZES, head_dim=32),
        PhiConfig(**models.SIZES),
        OlmoConfig(**models.SIZES),
        BloomConfig(**SMALL, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_what_runs_is_left_as_it_is_planned(tmp_path: Path, config: PretrainedConfig) -> None:
    folder = models.save(tmp_path / "m", config)
    assert trials_of(folder) == dict.fromkeys(BY_VARIANT, Trial())


def test_falcon_runs_with_none_of_its_weights_quantized_and_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", FALCON)
    (trial,) = trials_of(folder, "int8_weight_only").values()
    assert not trial.refusal
    assert sorted(trial.keep) == [
        rf"transformer\.h\.\d+\.{name}"
        for name in (
            r"mlp\.dense_4h_to_h",
            r"mlp\.dense_h_to_4h",
            r"self_attention\.dense",
            r"self_attention\.query_key_value",
        )
    ]
    with pytest.raises(
        CheckpointError, match="100% .* FalconLinear does not run with it quantized"
    ):
        plans_of(folder, "int8_weight_only", keep={"int8": trial.keep})


def test_mamba_keeps_the_one_weight_that_it_multiplies_by_itself(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", MAMBA)
    (trial,) = trials_of(folder, "int8_weight_only").values()
    reason = "MambaMixer does not run with it quantized"
    assert trial == Trial({r"backbone\.layers\.\d+\.mixer\.dt_proj": reason})

    (plan,) = plans_of(folder, "int8_weight_only", keep={"int8": trial.keep}).values()
    records = {tensor.name: tensor.record() for tensor in plan.tensors}
    for layer in range(2):
        assert records[f"backbone.layers.{layer}.mixer.dt_proj.weight"].reason == reason
        assert records[f"backbone.layers.{layer}.mixer.x_proj.weight"].quantized
        assert f"backbone.layers.{layer}.mixer.dt_proj" in plan.kept_modules


def test_rwkv_keeps_the_weights_that_it_rescales_in_place(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", RWKV)
    (trial,) = trials_of(folder, "int8_weight_only").values()
    assert not trial.refusal
    assert sorted(trial.keep) == [
        r"rwkv\.blocks\.\d+\.attention\.output",
        r"rwkv\.blocks\.\d+\.feed_forward\.value",
    ]
    plans_of(folder, "int8_weight_only", keep={"int8": trial.keep})  # enough is left to quantize


def test_a_model_that_computes_in_float32_only_is_refused(tmp_path: Path) -> None:
    config = ReformerConfig(
        vocab_size=320,
        hidden_size=128,
        attention_head_size=32,
        num_attention_heads=4,
        feed_forward_size=256,
        is_decoder=True,
        axial_pos_shape=(16, 32),
        axial_pos_embds_dim=(64, 64),
        attn_layers=["local", "lsh"],
        max_position_embeddings=512,
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
        num_buckets=4,
    )
    folder = models.save(tmp_path / "m", config)
    (trial,) = trials_of(folder, "int8_weight_only").values()
    assert trial.refusal.startswith("ReformerModelWithLMHead runs in float32 only")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**models.SMOLLM3_3B),
        Gemma2Config(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26),
        models.FAMILIES["gemma3"](),
    ],
    ids=["llama", "gemma2", "gemma3"],
)
def test_the_small_model_has_every_kind_of_layer_and_the_real_ones_decisions(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    folder = models.save_zeros(tmp_path / "large", config)
    architecture = Architecture(folder, trust_remote_code=False)
    small = next(smaller_configs(architecture.model, 128))
    assert set(getattr(small, "layer_types", [])) == set(getattr(config, "layer_types", []))
    assert small.num_hidden_layers <= 6

    def decisions(folder: Path) -> dict[str, bool]:
        (plan,) = plans_of(folder, "int4_weight_only").values()
        return {tensor.name: isinstance(tensor.decision, Quantize) for tensor in plan.tensors}

    of_large = decisions(folder)
    of_small = decisions(models.save(tmp_path / "small", small))
    assert of_small == {name: of_large[name] for name in of_small}
    assert sum(of_small.values()) >= 7 * 2


def test_trying_leaves_no_trace(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    trials_of(folder, "int8_weight_only")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
