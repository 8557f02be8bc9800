"""Every source tensor exactly once, with its reason, and sizes known before a weight is read."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CodeGenConfig

import models
from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.tensors import SourceTensor
from smolquant.errors import CheckpointError, GateError
from smolquant.model.architecture import Architecture
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.planning import remarks_of
from smolquant.schemes import SCHEMES, Quantize, scheme_of
from smolquant.schemes.int4_weight_only import DEFAULT_INT4_METHOD, Int4Method


def plan_of(
    folder: Path,
    *quant_types: str,
    architecture: Architecture | None = None,
    int4_method: Int4Method = DEFAULT_INT4_METHOD,
    **options: Any,
) -> dict[str, VariantPlan]:
    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        asked: dict[str, Any] = {
            "group_size": 128,
            "dtype": "auto",
            "max_shard_size": 10**9,
            "skip": (),
            **options,
        }
        architecture = architecture or Architecture(folder, trust_remote_code=False)
        schemes = [
            scheme_of(quant_type, int4_method=int4_method) for quant_type in quant_types or SCHEMES
        ]
        return make_plan(checkpoint.layout, architecture, schemes, **asked)


def reasons(plan: VariantPlan) -> dict[str, str]:
    return {tensor.source.name: tensor.record().reason for tensor in plan.tensors}


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.fault(
    "quality",
    "A weight is further from its source than rounding can put it",
    "Exit 6 with the weight; nothing is published.",
)
def test_a_wild_relative_error_is_refused_and_named(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    (plan,) = plan_of(folder, "int8_weight_only").values()
    at_their_bounds = dict(plan.error_bounds)
    name = "model.layers.1.mlp.up_proj.weight"
    plan.check_error_bounds(at_their_bounds)
    for error in (at_their_bounds[name] * 1.01, float("nan")):
        with pytest.raises(GateError, match=f"1 weights of int8 .* {name!r} has a relative error"):
            plan.check_error_bounds(at_their_bounds | {name: error})
    with pytest.raises(GateError, match=f"2 weights of int8 .* {name!r} has .* of nan"):
        plan.check_error_bounds(
            at_their_bounds | {"model.layers.0.mlp.up_proj.weight": 9.0, name: float("nan")}
        )


def test_every_tensor_has_one_fate_and_a_reason_where_it_is_kept(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    (plan,) = plan_of(folder, "int8_weight_only").values()

    assert sorted(reasons(plan)) == sorted(load_file(folder / "model.safetensors"))
    kept = {name: reason for name, reason in reasons(plan).items() if reason}
    assert kept["model.embed_tokens.weight"] == "embedding"
    assert kept["lm_head.weight"] == "output head"
    assert kept["model.norm.weight"] == "norm"
    assert kept["model.layers.0.self_attn.q_proj.bias"] == "bias"
    quantized = [t.source.name for t in plan.tensors if isinstance(t.decision, Quantize)]
    assert len(quantized) == 2 * 7, "every linear weight of two layers"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_tensor_of_a_plan_says_what_it_is(family: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES[family]())
    (plan,) = plan_of(folder, "int8_weight_only").values()
    kinds = {tensor.source.name: tensor.record().kind for tensor in plan.tensors}
    assert set(kinds.values()) <= {"embedding", "output head", "norm", "linear"}
    for tensor in plan.tensors:
        quantized = isinstance(tensor.decision, Quantize)
        assert not quantized or kinds[tensor.source.name] == "linear"
        assert kinds[tensor.source.name] != "linear" or quantized or "bias" in tensor.source.name
    tables = [name for name, kind in kinds.items() if kind in ("embedding", "output head")]
    assert all("embed" in name or "lm_head" in name for name in tables)
    assert tables


def test_int4_uses_a_smaller_group_and_says_so(tmp_path: Path) -> None:
    config = models.FAMILIES["llama"]()
    config.intermediate_size = 192
    plan = plan_of(models.save(tmp_path / "m", config), "int4_weight_only")["int4"]
    (down,) = (t for t in plan.tensors if t.source.name == "model.layers.0.mlp.down_proj.weight")
    assert down.record().group_size == 64
    assert "192 columns are not a multiple of 128" in down.record().reason


def test_skip_keeps_modules_by_name(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    (plan,) = plan_of(folder, "int8_weight_only", skip=[r"layers\.1\..*down_proj"]).values()
    assert reasons(plan)["model.layers.1.mlp.down_proj.weight"] == r"--skip layers\.1\..*down_proj"
    assert reasons(plan)["model.layers.0.mlp.down_proj.weight"] == ""
    assert "model.layers.1.mlp.down_proj" in plan.kept_modules
    assert "lm_head" in plan.kept_modules, "naming modules drops transformers' own default"


@pytest.mark.parametrize(
    ("stored", "asked", "given"),
    [
        (torch.float32, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_dtype_of_what_stays(
    tmp_path: Path, stored: torch.dtype, asked: str, given: torch.dtype
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["smollm3"](), dtype=stored)
    (plan,) = plan_of(folder, "int8_weight_only", dtype=asked).values()
    (norm,) = (t for t in plan.tensors if t.source.name == "model.norm.weight")
    assert (plan.dtype, norm.parts[""].dtype) == (given, given)


@pytest.mark.fault(
    "model",
    "The model has no linear layers",
    "Exit 3 with what it has instead.",
)
def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.GPT2())
    with pytest.raises(CheckpointError, match=r"100% of its weight bytes.*Conv1D"):
        plan_of(folder, "int8_weight_only")


@pytest.mark.fault(
    "model",
    "Nearly all of the model would stay as it is",
    "Exit 3 with the share and what keeps it.",
)
def test_a_model_that_would_stay_nearly_full_size_is_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    with pytest.raises(CheckpointError, match="would stay as they are.*--skip mlp"):
        plan_of(folder, "int8_weight_only", skip=["mlp"])


@pytest.mark.fault(
    "model",
    "The type's kernels do not compute in the dtype asked for",
    "Exit 3 with both.",
)
def test_a_type_that_computes_in_another_dtype_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"](), dtype=torch.float16)
    with pytest.raises(CheckpointError, match="float16, and float8_dynamic computes with bfloat16"):
        plan_of(folder, "float8_dynamic")
    assert plan_of(folder, "float8_weight_only")["float8"].dtype is torch.float16
    assert plan_of(folder, "float8_dynamic", dtype="bfloat16")["float8_dynamic"].error_bounds


def test_tables_stored_by_the_variants_own_scheme_are_the_only_ones_by_option(
    tmp_path: Path,
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    found = reasons(plan_of(folder, "int8_weight_only", embeddings="int8")["int8"])
    by_option = {name for name, reason in found.items() if "by --embeddings int8" in reason}
    assert by_option == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint lacks a weight that its config asks for",
    "Exit 3 with the weight.",
)
def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    change_weights(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        plan_of(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["smollm3"]())
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert plan_of(folder)


@pytest.mark.fault(
    "checkpoint",
    "A weight has another shape than its config asks for",
    "Exit 3 with the weight and its shape.",
)
def test_a_shape_that_config_does_not_ask_for_is_named(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    change_weights(folder, lambda state: state.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' has the shape \[8\]"):
        plan_of(folder)


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint has a tensor that the model has no place for",
    "Exit 3 with the tensor.",
)
@pytest.mark.parametrize("name", ["v_head.summary.weight", "model.layers.0.adapter.weight", "x"])
def test_a_tensor_that_nothing_is_known_of_is_refused_however_small(
    name: str, tmp_path: Path
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    change_weights(folder, lambda state: state.update({name: torch.ones(8)}))
    with pytest.raises(CheckpointError, match=rf"no place for 1 tensors .*'{re.escape(name)}'"):
        plan_of(folder, "int8_weight_only")


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint has buffers that the model makes by itself or ignores",
    "They are left out, with the reason.",
)
@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,), "a rotary buffer"),
        ("model.embeddings.position_ids", (1, 64), "a buffer of positions"),
        ("model.layers.1.attention.masked_bias", (), "an attention mask"),
        ("model.layers.1.attn.bias", (1, 1, 64, 64), "an attention mask"),
    ],
)
def test_buffers_of_older_versions_are_dropped_and_counted_so(
    name: str, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    change_weights(folder, lambda state: state.update({name: torch.ones(shape)}))
    (plan,) = plan_of(folder, "int8_weight_only").values()
    records = {tensor.source.name: tensor.record() for tensor in plan.tensors}
    dropped = {one: record for one, record in records.items() if record.dropped}
    assert list(dropped) == [name]
    assert dropped[name].reason.startswith(reason)
    assert (dropped[name].quantized, dropped[name].size_bytes) == (False, 0)
    assert dropped[name].kind == "other"
    (remark,) = remarks_of(plan)
    assert remark.startswith(f"1 tensors are left out, such as {name}: {reason}")


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint has buffers that the model makes by itself or ignores",
    "They are left out, with the reason.",
)
def test_what_the_models_own_class_ignores_is_dropped(tmp_path: Path) -> None:
    config = CodeGenConfig(vocab_size=320, n_embd=64, n_layer=1, n_head=4, rotary_dim=16)
    config.architectures = ["CodeGenForCausalLM"]
    config.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    tensor = SourceTensor("transformer.h.0.attn.causal_mask", torch.uint8, (1, 1, 64, 64))
    fate = architecture.unplaced(tensor)
    assert fate is not None
    assert not fate.carried
    assert fate.reason == "ignored by the model's own class when it is loaded"


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint has layers that the model does not run",
    "They are carried along unquantized, under their own names.",
)
@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.up_proj.weight", "model.layers.2.norm.weight"])
def test_layers_that_are_not_run_are_carried_along_as_they_are(name: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    change_weights(folder, lambda state: state.update({name: torch.ones(64, 64).bfloat16()}))
    (plan,) = plan_of(folder, "int8_weight_only").values()
    (carried,) = (tensor for tensor in plan.tensors if tensor.source.name == name)
    assert carried.record().dropped is carried.record().quantized is False
    assert carried.size_bytes == carried.source.size_bytes
    assert carried.name == name
    assert "carried along unquantized" in remarks_of(plan)[0]


@pytest.mark.fault(
    "checkpoint",
    "config.json makes no model: an unknown type, impossible sizes, code of its own",
    "Exit 3 with the reason.",
)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "hal9000"}', "does not know the model type 'hal9000'"),
        ("{}", "does not know the model type None"),
        ("[]", "not a JSON object"),
        ("{", "cannot be read"),
        ('{"model_type": "vit"}', "not a causal language model"),
        ('{"model_type": "llama", "hidden_size": "x"}', "cannot build the model"),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", '
            '"AutoModelForCausalLM": "own.Model"}}',
            "running code from a repository is off.*--trust-remote-code",
        ),
    ],
)
def test_configs_that_make_no_model_are_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        Architecture(tmp_path, trust_remote_code=False)


@pytest.mark.fault(
    "checkpoint",
    "There is no config.json",
    "Exit 3.",
)
def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        Architecture(tmp_path, trust_remote_code=False)


def test_the_norm_in_front_is_planned_where_the_scheme_weighs_columns(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    plans = plan_of(folder, "int8_weight_only", "int4_weight_only")
    in_front = {
        variant: {tensor.name: tensor.norm for tensor in plan.tensors if tensor.norm}
        for variant, plan in plans.items()
    }
    assert not in_front["int8"]
    assert len(in_front["int4"]) == 2 * 5, "all linear weights but o_proj and down_proj"
    up = in_front["int4"]["model.layers.1.mlp.up_proj.weight"]
    assert up is not None
    stored = {attribute: source.name for attribute, source in up.sources.items()}
    assert stored == {"weight": "model.layers.1.post_attention_layernorm.weight"}
    told = {tensor.name: tensor.record().columns_by for tensor in plans["int4"].tensors}
    assert told["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.post_attention_layernorm"
    assert told["model.layers.1.mlp.down_proj.weight"] is None
    (rounded,) = plan_of(folder, "int4_weight_only", int4_method="rtn").values()
    assert not any(tensor.norm for tensor in rounded.tensors)


def test_a_norm_whose_weights_are_not_in_the_checkpoint_tells_nothing(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    architecture = Architecture(folder, trust_remote_code=False)
    assert not architecture.model.training, "dropout would stand between a norm and its weight"
    up = "model.layers.0.mlp.up_proj.weight"
    norm = architecture.norms_in_front[up]
    elsewhere = replace(norm, parameters={"weight": "nowhere"})
    architecture.norms_in_front = {up: elsewhere}
    (plan,) = plan_of(folder, "int4_weight_only", architecture=architecture).values()
    assert not any(tensor.norm for tensor in plan.tensors)


@pytest.mark.fault(
    "checkpoint",
    "A weight holds integers or booleans, or no values",
    "Exit 3 with the weight and what it is stored as.",
)
@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(256, 128, dtype=torch.int8), "stored as I8, integers where the model has"),
        (torch.ones(256, 128, dtype=torch.bool), "stored as BOOL, integers where the model has"),
        (torch.ones(0, 128), "has the shape \\[0, 128\\], and so no values"),
    ],
    ids=["int8", "bool", "empty"],
)
def test_a_weight_without_numbers_of_its_kind_is_named(
    tmp_path: Path, weight: torch.Tensor, said: str
) -> None:
    folder = models.save(tmp_path / "m", models.FAMILIES["llama"]())
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda state: state.update({name: weight}))
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' .*{said}"):
        plan_of(folder, "int8_weight_only")
