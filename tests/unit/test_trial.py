"""What a model's own code cannot run quantized shows on a small model of it, before the work."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    LlamaConfig,
    MambaConfig,
    OlmoConfig,
    PhiConfig,
    PretrainedConfig,
    ReformerConfig,
    RwkvConfig,
    XLNetConfig,
)

import models
from smolquant.checkpoint.folder import FolderSource
from smolquant.errors import Cancelled, CheckpointError
from smolquant.model.architecture import Architecture
from smolquant.model.shrink import smaller_configs
from smolquant.quantize import trial
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.trial import Trial, try_variants
from smolquant.runtime.load import load_model
from smolquant.schemes import BY_VARIANT, SCHEMES, Quantize

SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2}

LONG = 600.0
"""Seconds; more than any machine takes, however busy."""

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
    return try_variants(architecture, plans_of(folder, *quant_types), folder, seconds=LONG)


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


@pytest.mark.fault(
    "model",
    "The model's own code runs with none of its weights quantized",
    "Exit 3 with the class, before any work.",
)
def test_falcon_runs_with_none_of_its_weights_quantized_and_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", FALCON)
    (found,) = trials_of(folder, "int8_weight_only").values()
    assert not found.refusal
    assert sorted(found.keep) == [
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
        plans_of(folder, "int8_weight_only", keep={"int8": found.keep})


@pytest.mark.fault(
    "model",
    "The model's own code cannot run with one of its weights quantized",
    "That weight is kept, and the record says why.",
)
def test_mamba_keeps_the_one_weight_that_it_multiplies_by_itself(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", MAMBA)
    (found,) = trials_of(folder, "int8_weight_only").values()
    reason = "MambaMixer does not run with it quantized"
    assert found == Trial({r"backbone\.layers\.\d+\.mixer\.dt_proj": reason})

    (plan,) = plans_of(folder, "int8_weight_only", keep={"int8": found.keep}).values()
    records = {tensor.name: tensor.record() for tensor in plan.tensors}
    for layer in range(2):
        assert records[f"backbone.layers.{layer}.mixer.dt_proj.weight"].reason == reason
        assert records[f"backbone.layers.{layer}.mixer.x_proj.weight"].quantized
        assert f"backbone.layers.{layer}.mixer.dt_proj" in plan.kept_modules


def test_a_variant_without_kernels_here_is_tried_as_one_that_has_them(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", MAMBA)
    (found,) = trials_of(folder, "float8_dynamic").values()
    assert list(found.keep) == [r"backbone\.layers\.\d+\.mixer\.dt_proj"]


def test_rwkv_keeps_the_weights_that_it_rescales_in_place(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", RWKV)
    (found,) = trials_of(folder, "int8_weight_only").values()
    assert not found.refusal
    assert sorted(found.keep) == [
        r"rwkv\.blocks\.\d+\.attention\.output",
        r"rwkv\.blocks\.\d+\.feed_forward\.value",
    ]
    plans_of(folder, "int8_weight_only", keep={"int8": found.keep})  # enough is left to quantize


REFORMER = ReformerConfig(
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
XLNET = XLNetConfig(vocab_size=320, d_model=128, n_layer=2, n_head=4, d_inner=1024)


@pytest.mark.fault(
    "model",
    "transformers loses a quantized weight as it loads the model",
    "That weight is kept, with the reason.",
)
def test_what_transformers_does_not_load_quantized_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its renamings can lose a name that torchao gives a part, without an error."""
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())

    def load_and_lose(*given: Any, prepare: Any, **options: Any) -> Any:
        def lose_and_prepare(model: Any) -> None:
            for layer in model.model.layers:
                gate = layer.mlp.gate_proj
                if type(gate.weight.data) is not torch.Tensor:
                    gate.weight = torch.nn.Parameter(torch.randn(gate.weight.shape).bfloat16())
            prepare(model)

        return load_model(*given, prepare=lose_and_prepare, **options)

    monkeypatch.setattr(trial, "load_model", load_and_lose)
    (found,) = trials_of(folder, "int8_weight_only").values()
    reason = "transformers does not load it quantized"
    assert found == Trial({r"model\.layers\.\d+\.mlp\.gate_proj": reason})


def test_layers_with_a_config_of_their_own_are_cut_like_the_rest() -> None:
    config = Gemma4TextConfig(num_hidden_layers=12)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    smallest = next(smaller_configs(model, model, 128))
    assert smallest.num_hidden_layers == 6
    assert smallest.hidden_size == 128


@pytest.mark.fault(
    "model",
    "The model computes in float32 only",
    "Exit 3.",
)
@pytest.mark.parametrize("config", [REFORMER, XLNET], ids=["reformer", "xlnet"])
def test_a_model_that_computes_in_float32_only_is_refused(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    folder = models.save(tmp_path / "m", config)
    (found,) = trials_of(folder, "int8_weight_only").values()
    (named,) = config.architectures or [""]
    assert found.refusal.startswith(
        f"{named} runs in float32 only: its code fails in bfloat16, quantized or not"
    )


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
    small = next(smaller_configs(architecture.model, architecture.language_model, 128))
    assert set(getattr(small, "layer_types", [])) == set(getattr(config, "layer_types", []))
    assert small.num_hidden_layers <= 6

    def decisions(folder: Path) -> dict[str, bool]:
        (plan,) = plans_of(folder, "int4_weight_only").values()
        return {tensor.name: isinstance(tensor.decision, Quantize) for tensor in plan.tensors}

    of_large = decisions(folder)
    of_small = decisions(models.save(tmp_path / "small", small))
    assert of_small == {name: of_large[name] for name in of_small}
    assert sum(of_small.values()) >= 7 * 2


def test_kinds_of_layers_are_those_that_read_text_though_more_and_larger_ones_see(
    tmp_path: Path,
) -> None:
    config = models.SEEING["gemma3"]().config
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, vision.num_hidden_layers = 6, 24
    text.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    vision.intermediate_size = 8192
    config.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    small = next(smaller_configs(architecture.model, architecture.language_model, 128))
    assert set(small.text_config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_trying_leaves_no_trace(tmp_path: Path, temporary: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    before = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    trials_of(folder, "int8_weight_only")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not list(temporary.iterdir())


@pytest.mark.fault(
    "model",
    "Trying the quantized model takes too long",
    "The plan stays as it is, and that is said.",
)
def test_out_of_time_nothing_is_kept_and_that_is_told(tmp_path: Path, temporary: Path) -> None:
    folder = models.save(tmp_path / "m", MAMBA)
    plans = plans_of(folder, "int8_weight_only", "int8_dynamic")
    architecture = Architecture(folder, trust_remote_code=False)
    trials = try_variants(architecture, plans, folder, seconds=0.0)
    told = Trial(untried="that took more than 0 seconds")
    assert trials == {"int8": told, "int8_dynamic": told}
    assert not list(temporary.iterdir())


@pytest.mark.fault(
    "cancelled",
    "A signal arrives while the plan is tried",
    "The run ends; its trial leaves no trace.",
)
def test_a_run_that_is_cancelled_while_trying_leaves_no_trace(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(*_: object, **__: object) -> None:
        assert list(temporary.iterdir())
        raise Cancelled(2)

    monkeypatch.setattr(trial, "finish_variant", cancelled)
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    with pytest.raises(Cancelled):
        trials_of(folder, "int8_weight_only")
    assert not list(temporary.iterdir())


@pytest.mark.fault(
    "model",
    "The trial itself fails",
    "That is said, and the run goes on.",
)
def test_a_fault_of_the_trials_own_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk for temporary files, say; or a loader that fails on small models, quantized or not."""
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as change:
        change.setattr(trial, "finish_variant", full)
        (found,) = trials_of(folder, "int8_weight_only").values()
    assert found == Trial(untried="OSError: [Errno 28] No space left on device")

    def confused(*_: object, **__: object) -> None:
        raise KeyError("layer_types")

    with monkeypatch.context() as change:
        change.setattr(trial, "load_model", confused)
        (found,) = trials_of(folder, "int8_weight_only").values()
    assert found == Trial(untried="KeyError: 'layer_types'")


@pytest.mark.fault(
    "model",
    "transformers cannot load the model quantized",
    "It is refused with the reason.",
)
def test_what_cannot_be_loaded_quantized_but_can_be_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    own = load_model

    def only_unquantized(folder: Path, *given: Any, **options: Any) -> Any:
        if "quantization_config" in (folder / "config.json").read_text():
            raise NotImplementedError("aten.equal is not there")
        return own(folder, *given, **options)

    monkeypatch.setattr(trial, "load_model", only_unquantized)
    (found,) = trials_of(folder, "int8_weight_only").values()
    assert re.fullmatch(
        r"LlamaForCausalLM cannot be loaded quantized by transformers [\d.]+: aten.equal is not there\.",
        found.refusal,
    )


def test_a_model_that_runs_with_a_picture_only_is_loaded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = {"model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 128, "vocab_size": 320}
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=sizes | heads | {"image_size": 28},
            qformer_config=sizes | heads | {"encoder_hidden_size": 128, "vocab_size": 64},
            text_config=sizes | heads | text,
        )
    )
    model.bfloat16().save_pretrained(tmp_path)
    loaded = []

    def load_and_note(*given: Any, **options: Any) -> Any:
        loaded.append(load_model(*given, **options))
        return loaded[-1]

    monkeypatch.setattr(trial, "load_model", load_and_note)
    (found,) = trials_of(tmp_path, "int8_weight_only").values()
    untried = "no small Blip2ForConditionalGeneration could be built and run on text"
    assert found == Trial(untried=untried)
    assert len(loaded) == 1
