"""Mixtures of experts: stacks are streamed from whatever files hold, stored as torchao does, and run."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torchao.quantization import quantize_
from transformers import (
    AutoModelForCausalLM,
    HrmTextConfig,
    JetMoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

import models
from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.tensors import ConvertedTensor, SourceTensor, row_blocks
from smolquant.errors import CheckpointError
from smolquant.model import conversion
from smolquant.model.architecture import Architecture
from smolquant.quantize import engine
from smolquant.quantize.plan import make_plan
from smolquant.quantize.planned import VariantPlan
from smolquant.quantize.trial import Trial, try_variants
from smolquant.quantize.variant import finish_variant, write_record
from smolquant.record import VariantRecord
from smolquant.runtime.load import load_model
from smolquant.runtime.packing import pack_for_this_cpu
from smolquant.runtime.stacks import each_expert
from smolquant.schemes import BY_VARIANT, SCHEMES
from stored_values import stored_values

GROUP_SIZE = 64
STACK = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module", params=list(models.MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``checkpoint/`` and every variant that the mixture can have."""
    folder = tmp_path_factory.mktemp(request.param)
    models.save(folder / "checkpoint", models.MIXTURES[request.param]())
    write_variants(folder / "checkpoint", folder)
    return folder


def write_variants(checkpoint: Path, folder: Path, *types: str) -> dict[str, VariantPlan]:
    """Variants of ``checkpoint`` as a run leaves them, and their plans: all that have a layout for it."""
    source = FolderSource(checkpoint)
    architecture = Architecture(checkpoint, trust_remote_code=False)
    plans = make_plan(
        architecture.converted(source.layout()),
        architecture,
        [SCHEMES[quant_type] for quant_type in types or SCHEMES],
        group_size=GROUP_SIZE,
        dtype="auto",
        max_shard_size=10**9,
        skip=(),
        however_little=True,
    )
    plans = {variant: plan for variant, plan in plans.items() if plan.stacks}  # not all on a GPU
    for variant in plans:
        (folder / variant).mkdir(parents=True)
    with source.checkpoint() as opened:
        written = engine.quantize_checkpoint(
            opened,
            plans,
            {variant: folder / variant for variant in plans},
            advance=lambda n_bytes: None,
        )
    for variant, plan in plans.items():
        record = finish_variant(
            folder / variant,
            plan,
            written[variant],
            source=source,
            config=architecture.config_dict,
            options={},
            source_bytes=source.layout().size_bytes,
        )
        write_record(folder / variant, record)
    return plans


def stock(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", ["int8", "int8_dynamic", "float8"])
def test_what_stock_transformers_loads_is_what_torchao_makes_in_memory(
    mixture: Path, variant: str
) -> None:
    """Bit for bit, stacks and linear layers, by the very config that the variant publishes."""
    stored, expected = stock(mixture / variant), stock(mixture / "checkpoint")
    config = stored.config.quantization_config.get_apply_tensor_subclass()
    quantize_(expected, config, filter_fn=None)
    ours, theirs = dict(stored.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert type(ours[name].data) is type(parameter.data), name
        for part in ("qdata", "scale", "zero_point"):
            if hasattr(parameter, part):
                mine, its = getattr(ours[name], part), getattr(parameter, part)
                assert mine.shape == its.shape
                assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), f"{name}.{part}"
        if type(parameter) is nn.Parameter:
            assert torch.equal(ours[name], parameter), name
    assert [p for p in ours.values() if p.ndim == 3 and type(p) is not nn.Parameter]
    if "gpt_oss" not in mixture.name:  # torchao has no kernel for what is multiplied from the right
        expected.set_experts_implementation("eager")
        assert torch.equal(models.logits(stored), models.logits(expected))


@pytest.mark.parametrize("variant", ["int8", "int8_dynamic", "float8", "int4"])
def test_experts_compute_with_their_stored_weights(mixture: Path, variant: str) -> None:
    """What smolquant.load runs, held against the source's code with what the stored weights stand for.

    Experts alone: a router's near ties fall one way or the other by rounding.
    """
    place = "model.layers.1.mlp.experts"
    reference = stock(mixture / "checkpoint").get_submodule(place)
    for name, stack in stock(mixture / variant).get_submodule(place).named_parameters():
        if type(stack) is not nn.Parameter:
            experts = [stored_values(stack[number]) for number in range(len(stack))]
            values = torch.stack(experts)
            as_transposes = variant == "int4" and "gpt_oss" in mixture.name
            reference.get_parameter(name).data.copy_(values.mT if as_transposes else values)
    torch.manual_seed(0)
    inputs = torch.randn(6, models.SIZES["hidden_size"]).bfloat16()
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 0]])
    weights = torch.rand(6, 2).bfloat16()
    model = load_model(mixture / variant, BY_VARIANT[variant], "cpu").get_submodule(place)
    expected = reference(inputs, chosen, weights).float()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = model(inputs, chosen, weights).float()
        assert (got - expected).norm() / expected.norm() < 0.02


def test_only_experts_that_a_token_chose_are_packed_and_computed(tmp_path: Path) -> None:
    config = models.MIXTURES["qwen3_moe"]()
    config.num_experts = 16
    models.save(tmp_path / "checkpoint", config)
    write_variants(tmp_path / "checkpoint", tmp_path, "int4_weight_only")
    importlib.import_module("smolquant.torchao")
    model = stock(tmp_path / "int4")
    with torch.no_grad():
        model(torch.tensor([[5]]))
    for name, weight in model.named_parameters():
        if weight.ndim == 3:
            assert len(weight.__dict__["_experts"]) == config.num_experts_per_tok, name


def test_a_record_says_of_what_a_stack_is_made_and_why_routers_stay(mixture: Path) -> None:
    record = VariantRecord.in_folder("int8", (mixture / "int8/quantization.json").read_bytes())
    stack = record.tensors[STACK]
    one_by_one = "gpt_oss" not in mixture.name
    assert (stack.experts, stack.kind, stack.quantized) == (4, "expert", True)
    assert stack.made_of == (8 if one_by_one else 1), "a gate and an up projection of each expert"
    assert stack.transposed != one_by_one
    assert stack.relative_error is not None
    stored = {
        name for path in (mixture / "checkpoint").glob("*.safetensors") for name in load_file(path)
    }
    assert sum(record.counts.__dict__.values()) == len(stored)
    routers = {
        name: one for name, one in record.tensors.items() if "gate.w" in name or "router" in name
    }
    assert routers
    assert not any(router.quantized for router in routers.values())
    if "qwen2" in mixture.name:
        assert "router" in record.tensors["model.layers.0.mlp.shared_expert_gate.weight"].reason
        assert record.tensors["model.layers.0.mlp.shared_expert.up_proj.weight"].quantized


def test_a_published_config_names_the_stacks_and_how_they_run(mixture: Path) -> None:
    config = json.loads((mixture / "int8/config.json").read_text())
    assert config["experts_implementation"] == "eager"
    named = config["quantization_config"]["quant_type"]["default"]["_data"]["fqn_to_config"]
    of_stack = named[r"re:model\.layers\.\d+\.mlp\.experts\.gate_up_proj"]
    axis = 1 if "gpt_oss" in mixture.name else -1
    assert of_stack["_data"]["granularity"]["_data"] == {"dim": axis}


def test_stacks_do_not_depend_on_how_their_rows_are_cut(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BLOCK_BYTES", 5_000)  # 19 rows
    plans = write_variants(mixture / "checkpoint", tmp_path)
    for variant in plans:
        file = f"{variant}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (mixture / file).read_bytes()


@pytest.mark.fault(
    "checkpoint",
    "The checkpoint has layers that the model does not run",
    "They are carried along unquantized, under their own names.",
)
def test_a_layer_that_the_model_lacks_is_carried_along_under_its_own_names(tmp_path: Path) -> None:
    config = models.MIXTURES["qwen3_moe"]()
    models.save(tmp_path, config)
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    names = architecture.converted(FolderSource(tmp_path).layout()).tensors
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names


@pytest.mark.fault(
    "checkpoint",
    "An expert has another shape than the others",
    "Exit 3 with the stack that they cannot make.",
)
def test_experts_of_different_shapes_are_refused_by_name(tmp_path: Path) -> None:
    models.save(tmp_path, models.MIXTURES["qwen3_moe"]())
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    state = load_file(tmp_path / "model.safetensors")
    state[name] = state[name][:64].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    architecture = Architecture(tmp_path, trust_remote_code=False)
    with pytest.raises(CheckpointError, match="cannot make 'model.layers.0.mlp.experts.down_proj'"):
        architecture.converted(FolderSource(tmp_path).layout())


def test_what_transformers_computes_from_whole_tensors_is_read_as_it_would_be(
    tmp_path: Path,
) -> None:
    """HRM's files hold gate, queries, keys and values in one tensor, which its model splits."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = HrmTextConfig(**sizes, num_key_value_heads=2, head_dim=16)
    model = models.build(config)
    model.save_pretrained(tmp_path)
    architecture = Architecture(tmp_path, trust_remote_code=False)
    source = FolderSource(tmp_path)
    layout = architecture.converted(source.layout())
    converted = [t for t in layout.tensors.values() if isinstance(t, ConvertedTensor)]
    assert converted
    expected = model.state_dict()
    with source.checkpoint() as checkpoint:
        for tensor in converted:
            assert torch.equal(checkpoint.read_whole(tensor), expected[tensor.name]), tensor.name
            assert torch.equal(checkpoint.read_rows(tensor, 1, 3), expected[tensor.name][1:3]), (
                tensor.name
            )


def test_a_stack_is_packed_as_its_experts_are() -> None:
    stack = SCHEMES["int4_weight_only"].quantize(torch.randn(3, 40, 64).bfloat16(), 32)
    packed = each_expert(pack_for_this_cpu)(stack)
    inputs = torch.randn(5, 64).bfloat16()
    for number in range(3):
        alone = pack_for_this_cpu(stack[number])
        assert torch.equal(
            functional.linear(inputs, packed[torch.tensor(number)]),
            functional.linear(inputs, alone),
        )


@pytest.mark.fault(
    "checkpoint",
    "Experts are stored twice, as a stack and one by one",
    "Exit 3 with the names.",
)
def test_experts_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    models.save(tmp_path, models.MIXTURES["qwen3_moe"]())
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 128, 64)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    architecture = Architecture(tmp_path, trust_remote_code=False)
    with pytest.raises(CheckpointError, match=r"experts.down_proj' is stored twice"):
        architecture.converted(FolderSource(tmp_path).layout())


def test_experts_that_share_memory_in_a_pickle_are_read_as_others(tmp_path: Path) -> None:
    """As in a model that was made of a dense one, each expert a copy of its layer."""
    models.save(tmp_path, models.MIXTURES["qwen3_moe"]())
    state = load_file(tmp_path / "model.safetensors")
    first = state["model.layers.0.mlp.experts.0.down_proj.weight"]
    for number in (1, 2, 3):
        state[f"model.layers.0.mlp.experts.{number}.down_proj.weight"] = first
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = FolderSource(tmp_path)
    layout = Architecture(tmp_path, trust_remote_code=False).converted(source.layout())
    stack = layout.tensors["model.layers.0.mlp.experts.down_proj"]
    with source.checkpoint() as checkpoint:
        assert torch.equal(checkpoint.read_whole(stack), first.expand(4, -1, -1))


def test_what_is_computed_from_whole_tensors_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save(tmp_path / "checkpoint", models.MIXTURES["qwen3_moe"]())
    converted, asked = conversion._converted, list[str]()

    def counted(target: str, group: Any, model: Any, whole: Any) -> Any:
        if not whole[0].is_meta:
            asked.append(target)
        return converted(target, group, model, whole)

    monkeypatch.setattr(conversion, "_joined", lambda target, group: None)
    monkeypatch.setattr(conversion, "_converted", counted)
    write_variants(folder, tmp_path, "int8_weight_only")
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == 4
    written = (tmp_path / "int8/model.safetensors").read_bytes()
    monkeypatch.undo()
    write_variants(folder, tmp_path / "joined", "int8_weight_only")
    assert written == (tmp_path / "joined/int8/model.safetensors").read_bytes()


def skeleton(folder: Path, config: PretrainedConfig) -> Architecture:
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    return Architecture(folder, trust_remote_code=False)


def test_a_shared_expert_is_no_router_whatever_its_width(tmp_path: Path) -> None:
    """Qwen3-Next has as many experts as its shared one has columns inside."""
    sizes = {**models.SIZES, "head_dim": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = Qwen3NextConfig(
        **sizes, num_experts=16, shared_expert_intermediate_size=16, moe_intermediate_size=32
    )
    architecture = skeleton(tmp_path, config)
    block = "model.layers.0.mlp"
    for name, reason in {"shared_expert.up_proj": "", "shared_expert_gate": "a router"}.items():
        parameter = architecture.parameter(f"{block}.{name}.weight")
        assert parameter is not None
        assert parameter.keep_reason.startswith(reason), name
        assert bool(parameter.keep_reason) == bool(reason)


def test_stacks_whose_names_tell_nothing_are_taken_as_linear_layers_are(tmp_path: Path) -> None:
    """JetMoe's are all called weight, and lie (E, N, K)."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "kv_channels": 16}
    config = JetMoeConfig(**sizes, intermediate_size=48, num_key_value_heads=2)
    architecture = skeleton(tmp_path, config)
    stacks = [n for n, p in architecture.model.named_parameters() if p.ndim == 3]
    assert stacks
    for name in stacks:
        parameter = architecture.parameter(name)
        assert parameter is not None
        assert not parameter.contracts_rows, name


def test_a_stack_is_tried_though_the_other_of_its_experts_is_kept(tmp_path: Path) -> None:
    config = models.MIXTURES["qwen3_moe"]()
    config.moe_intermediate_size = 48  # no multiple of the smallest group, for what contracts it
    folder = models.save(tmp_path / "checkpoint", config)
    architecture = Architecture(folder, trust_remote_code=False)
    plans = make_plan(
        architecture.converted(FolderSource(folder).layout()),
        architecture,
        [SCHEMES["int4_weight_only"]],
        group_size=32,
        dtype="auto",
        max_shard_size=10**9,
        skip=(),
    )
    assert [stack.name.rpartition(".")[2] for stack in plans["int4"].stacks] == ["gate_up_proj"] * 2
    assert try_variants(architecture, plans, folder) == {"int4": Trial()}


@pytest.mark.parametrize("quant_type", ["int8_weight_only", "float8_weight_only"])
def test_other_indices_of_a_stack_are_torchaos(quant_type: str) -> None:
    stack = SCHEMES[quant_type].quantize(torch.randn(4, 32, 64).bfloat16(), None)
    assert stack[1:3].shape == (2, 32, 64)
    assert stack[torch.tensor(1)].shape == stack[-1].shape == (32, 64)
    if quant_type == "int8_weight_only":
        assert stack[torch.tensor([3])].shape == (1, 32, 64)


def test_a_matrix_that_is_taken_whole_is_not_cut_to_suit_vectors() -> None:
    tensor = SourceTensor("experts", torch.bfloat16, (1, 100, 64))
    assert list(row_blocks(tensor, tensor.size_bytes, within=100)) == [(0, 100)]
