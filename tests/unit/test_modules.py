"""A loaded model's linear modules: what they keep, share, save, move and give back."""

import copy
import gc
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torchao.quantization import Int4Tensor, Int8Tensor
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import smolquant
from compat.prove import fixtures
from smolquant.runtime import compiled
from smolquant.runtime.cpu_linear import FEW_TOKENS
from smolquant.runtime.kernels import dequantize, kernels, use_kernels
from smolquant.runtime.modules import QuantizedLinear, WideLinear
from smolquant.runtime.registry import plain
from smolquant.schemes import SCHEMES

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    dtype=torch.bfloat16,
)
CPU_TYPES = ["int8_weight_only", "int8_dynamic", "int4_weight_only"]
IDS = torch.arange(24).view(2, 12)


def plain_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()


def stored_model(quant_type: str) -> Any:
    """As a variant is loaded: every linear layer but the head has its stored weight."""
    model, scheme = plain_model(), SCHEMES[quant_type]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            group = 32 if "group_size" in scheme.options(32) else None
            stored = scheme.quantize(module.weight.detach(), group)
            module.weight = nn.Parameter(stored, requires_grad=False)
    return model


def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        computed: torch.Tensor = model(input_ids=ids, **options).logits.float()
    return computed


def dequantized_logits(quant_type: str) -> torch.Tensor:
    """Of a model with the plain weights that the stored ones stand for."""
    return logits(dequantize(stored_model(quant_type)))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("quant_type", CPU_TYPES)
def test_a_model_computes_with_its_stored_weights(quant_type: str) -> None:
    """Prompts, single tokens after a cache, left padding: all through our modules."""
    model = stored_model(quant_type)
    use_kernels(model)
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    wanted, bound = dequantized_logits(quant_type), 0.05 if "dynamic" in quant_type else 0.02
    assert difference(logits(model), wanted) < bound
    with torch.inference_mode():
        begun = model(input_ids=IDS[:, :-1], use_cache=True)
        last = model(input_ids=IDS[:, -1:], cache=begun.cache)
    assert difference(last.logits.float()[:, -1], wanted[:, -1]) < 2 * bound
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shifted = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert difference(shifted[:, 3:], wanted) < 2 * bound


def test_projections_of_the_same_inputs_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls a layer instead of seven, and the same outputs to the bit."""
    model = stored_model("int4_weight_only")
    use_kernels(model)
    alone = copy.deepcopy(model)  # what belongs together belongs to a process, and is not copied
    calls: list[int] = []
    original = smolquant.runtime.cpu_linear.Linears.__call__

    def counted(self: Any, inputs: torch.Tensor) -> Any:
        results = original(self, inputs)
        calls.append(len(results))
        return results

    monkeypatch.setattr(smolquant.runtime.cpu_linear.Linears, "__call__", counted)
    ids = IDS[:1, :1]
    together = logits(model, ids)
    assert calls == [3, 1, 2, 1] * 2
    calls.clear()
    assert torch.equal(logits(alone, ids), together)
    assert calls == [1] * 14


def test_modules_that_get_other_inputs_are_parted() -> None:
    """As in attention to another sequence: what was computed for nothing is computed once."""
    model = stored_model("int8_weight_only")
    use_kernels(model)
    attention, inputs = model.model.layers[0].self_attn, torch.randn(1, 64, dtype=torch.bfloat16)
    others = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(2):
            attention.q_proj(inputs)
            wanted = dequantize(copy.deepcopy(attention.k_proj))(others)
            assert difference(attention.k_proj(others).float(), wanted.float()) < 0.02
        assert attention.q_proj._together is None


def test_a_new_weight_is_the_one_that_counts() -> None:
    model = stored_model("int8_weight_only")
    use_kernels(model)
    attention, inputs = model.model.layers[0].self_attn, torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        attention.q_proj(inputs)
        attention.k_proj(inputs)
        attention.v_proj(inputs)
        compiled: Any = torch.compile(attention.k_proj, backend="eager")
        assert compiled(inputs).count_nonzero()
        zeros = SCHEMES["int8_weight_only"].quantize(torch.zeros(32, 64).bfloat16(), None)
        attention.k_proj.weight = nn.Parameter(zeros, requires_grad=False)
        attention.q_proj(inputs)
        assert not compiled(inputs).count_nonzero()
        attention.q_proj(inputs)
        assert not attention.k_proj(inputs).count_nonzero()


def test_weights_that_are_taken_away_are_freed() -> None:
    """A model that is streamed holds one layer at a time."""
    model = stored_model("int4_weight_only")
    use_kernels(model)
    logits(model, IDS[:1, :1])
    attention = model.model.layers[0].self_attn
    levels = weakref.ref(attention.q_proj.weight.qdata)
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        module._parameters["weight"] = nn.Parameter(torch.empty(0, device="meta"))
    gc.collect()
    assert levels() is None


@pytest.mark.parametrize("quant_type", CPU_TYPES)
def test_a_model_that_has_run_is_saved_as_it_was_published(quant_type: str, tmp_path: Path) -> None:
    """Copied, pickled or saved by stock transformers, before and after running, it is the same."""
    model = stored_model(quant_type)
    config = SCHEMES[quant_type].torchao_config(32)
    model.config.quantization_config = TorchAoConfig(config, modules_to_not_convert=["lm_head"])
    published = {name: copy.deepcopy(value) for name, value in model.state_dict().items()}
    use_kernels(model)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)
    for name, value in model.state_dict().items():
        assert_same(value, published[name])


@pytest.mark.parametrize("variant", ["int8", "float8"])
def test_a_model_that_was_loaded_is_pickled(variant: str) -> None:
    """With what transformers has added to it meanwhile, such as how a module describes itself."""
    model, _ = smolquant.load(fixtures()[-1], variant)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    assert repr(again) == repr(model)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Int8Tensor | Int4Tensor):
        for part in one.tensor_data_names:
            assert torch.equal(getattr(one, part), getattr(other, part))
    else:
        assert torch.equal(one, other)


def test_what_is_to_be_trained_has_gradients() -> None:
    """Inputs that need them go through the plain weight, for adapters beside frozen layers."""
    for quant_type in CPU_TYPES:
        model = stored_model(quant_type)
        use_kernels(model)
        layer = model.model.layers[0].mlp.up_proj
        inputs = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
        layer(inputs).sum().backward()
        wanted = plain(layer.weight).float().sum(0)
        assert inputs.grad is not None
        assert difference(inputs.grad[0].float(), wanted) < 0.02


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_plain_layer_that_is_trained_has_gradients(trained: str) -> None:
    """Many tokens of it would go through blocks, which are overwritten and have no derivative."""
    layer = nn.Linear(32, 48).requires_grad_(False)
    layer.__class__ = WideLinear
    inputs = torch.randn(FEW_TOKENS + 1, 32)
    wanted = nn.functional.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs), wanted)
    parameter = layer.get_parameter(trained).requires_grad_()
    for _ in range(2):
        parameter.grad = None
        layer(inputs).sum().backward()
        exact = (
            inputs.sum(0).expand(48, -1) if trained == "weight" else torch.full((48,), len(inputs))
        )
        torch.testing.assert_close(parameter.grad, exact.to(parameter))


def test_dequantize_gives_back_a_plain_model(tmp_path: Path) -> None:
    model = stored_model("int4_weight_only")
    use_kernels(model)
    wanted = logits(model)
    plain = dequantize(model)
    assert plain is model
    assert {type(module) for module in plain.modules() if isinstance(module, nn.Linear)} == {
        nn.Linear
    }
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(logits(again), wanted) < 0.02


def test_kernels_tells_what_multiplies() -> None:
    model = stored_model("int4_weight_only")
    use_kernels(model)
    told = kernels(model)
    assert len(told) == 14
    assert set(told.values()) == {"smolquant, 4 bits"}


def test_a_weight_without_the_best_kernel_falls_back_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing was compiled, torch's packed kernels compute, in one line said once."""
    wanted = {quant_type: dequantized_logits(quant_type) for quant_type in CPU_TYPES}
    monkeypatch.setattr(compiled, "_COMPILED", Path("/never/compiled.so"))
    for module in ("cpu_linear", "many_tokens"):
        monkeypatch.setattr(f"smolquant.runtime.{module}.library", compiled.library.__wrapped__)
    for quant_type in CPU_TYPES:
        model = stored_model(quant_type)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="smolquant"):
            use_kernels(model)
        (told,) = caplog.messages
        assert "without its compiled code (14)" in told
        if quant_type != "int4_weight_only":  # that one is another weight now
            assert all("without its compiled code" in why for why in kernels(model).values())
        bound = 0.05 if "dynamic" in quant_type else 0.02
        assert difference(logits(model), wanted[quant_type]) < bound
        assert difference(logits(model, IDS[:, :1]), wanted[quant_type][:, :1]) < bound


def test_levels_that_lie_anywhere_are_safe_with_the_kernel_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of a mapped file do; where the CPU has AVX512, torch's kernel would end the process."""
    wanted = dequantized_logits("int8_weight_only")
    monkeypatch.setattr("smolquant.runtime.cpu_linear.library", lambda: None)
    model = stored_model("int8_weight_only")
    for weight in model.parameters():
        if isinstance(weight, Int8Tensor):
            levels = weight.qdata
            room = torch.empty(levels.numel() + 64, dtype=torch.int8)
            start = (8 - room.data_ptr()) % 64
            weight.qdata = room[start : start + levels.numel()].view(levels.shape).copy_(levels)
            assert weight.qdata.data_ptr() % 64 == 8
    use_kernels(model)
    assert difference(logits(model, IDS[:, :6]), wanted[:, :6]) < 0.02


@pytest.mark.parametrize("quant_type", CPU_TYPES)
def test_compiled_it_generates_the_same(quant_type: str) -> None:
    """As ``generate`` compiles it, with a static cache: one graph for every token, int8 tables in it."""
    model = stored_model(quant_type)
    table = SCHEMES["int8_weight_only"].quantize(model.model.embed_tokens.weight.detach(), None)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = nn.Parameter(table, requires_grad=False)
    use_kernels(model)
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    as_whole = CompileConfig(fullgraph=True, backend=compiler, mode=None)
    as_whole._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": as_whole}
    found = [generated(model, **options) for options in ({}, static)]
    assert len(graphs) == 1
    assert torch.equal(*(one.sequences for one in found))
    eager, compiled = (torch.stack(one.logits).float() for one in found)
    assert difference(compiled, eager) < 0.01


def generated(model: Any, **options: Any) -> Any:
    """Six tokens after a prompt, and their logits."""
    asked = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    asked |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **asked, **options)


def test_int8_tables_are_looked_up_by_row() -> None:
    table = nn.Embedding(50, 32, dtype=torch.bfloat16)
    stored = SCHEMES["int8_weight_only"].quantize(table.weight.detach(), None)
    table.weight = nn.Parameter(stored, requires_grad=False)
    use_kernels(table)
    ids = torch.tensor([[3, 49], [3, 0]])
    assert torch.equal(table(ids), stored.dequantize()[ids])
