"""The norm in front of a weight is seen, in any family, and so is what it does to each column."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cohere2Config, Olmo2Config, PretrainedConfig

import models
from smolquant.model import norms
from smolquant.model.norms import Norm, norms_in_front
from smolquant.model.trunk import trunk_of

IN = "input_layernorm"
POST = "post_attention_layernorm"
LLAMA = {
    "self_attn.q_proj": IN,
    "self_attn.k_proj": IN,
    "self_attn.v_proj": IN,
    "mlp.gate_proj": POST,
    "mlp.up_proj": POST,
}
PRE = "pre_feedforward_layernorm"
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("smollm3", "llama", "qwen3", "mistral"), LLAMA),
    "gemma3": LLAMA | {"mlp.gate_proj": PRE, "mlp.up_proj": PRE},
    "phi3": {"self_attn.qkv_proj": IN, "mlp.gate_up_proj": POST},
    "gpt_neox": {"attention.query_key_value": IN, "mlp.dense_h_to_4h": POST},
}


def skeleton(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


def of_layer(found: dict[str, Norm], layer: int) -> dict[str, str]:
    """Module of a layer -> the norm in front of it, both by their names in the layer."""
    part = f".layers.{layer}."
    return {
        weight.partition(part)[2].removesuffix(".weight"): norm.parameters["weight"]
        .partition(part)[2]
        .removesuffix(".weight")
        for weight, norm in found.items()
        if part in weight
    }


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_norm_in_front_of_each_weight_is_found(family: str) -> None:
    found = norms_in_front(skeleton(models.FAMILIES[family]()))
    assert of_layer(found, 0) == of_layer(found, 1) == EXPECTED[family]


def test_layers_that_run_side_by_side_share_a_norm_and_norms_behind_a_layer_are_none() -> None:
    beside = of_layer(norms_in_front(skeleton(Cohere2Config(**models.SIZES, head_dim=32))), 0)
    assert beside == dict.fromkeys(LLAMA, IN)
    assert norms_in_front(skeleton(Olmo2Config(**models.SIZES))) == {}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_energies_are_the_mean_squares_of_what_the_norm_returns(family: str) -> None:
    """For inputs whose columns are alike, up to the noise of 4,000 of them; in any unit."""
    config = models.FAMILIES[family]()
    model = models.build(config, torch.float32)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4_000, config.hidden_size, generator=generator)
    for norm in norms_in_front(skeleton(config)).values():
        mean_squares = norm.input_mean_squares(
            {attribute: parameters[name].data for attribute, name in norm.parameters.items()},
            config.hidden_size,
        )
        assert mean_squares is not None
        name = norm.parameters["weight"].removesuffix(".weight")
        with torch.no_grad():
            measured = model.get_submodule(name)(inputs).double().square().mean((0, 1))
        assert mean_squares.max() > 2 * mean_squares.min(), "columns differ"
        assert torch.allclose(mean_squares, measured, rtol=0.12, atol=1e-3)


class Model(nn.Module):
    """A linear module behind something that may be a norm."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front, self.linear = front, nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return self.linear(self.front(torch.empty(*ids.shape, 8, device="meta")))


class TwiceNormed(Model):
    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return self.linear(super().forward(ids, use_cache))


class PairNorm(nn.LayerNorm):
    """Returns something that is not a tensor."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), None


class BrokenNorm(nn.LayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cannot be run here")


class InContextNorm(nn.LayerNorm):
    """Of no use by itself."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.is_meta
        return super().forward(hidden)


def test_only_a_norm_with_weights_that_is_always_in_front_is_taken() -> None:
    with torch.device("meta"):
        assert norms_in_front(Model(nn.LayerNorm(8)))["linear.weight"].parameters == {
            "weight": "front.weight",
            "bias": "front.bias",
        }
        assert norms_in_front(Model(nn.LayerNorm(8, elementwise_affine=False))) == {}
        assert norms_in_front(Model(nn.Identity())) == {}
        assert norms_in_front(Model(InContextNorm(8))) == {}
        assert norms_in_front(TwiceNormed(nn.LayerNorm(8))) == {}, "once in front, once not"


@pytest.mark.parametrize("kind", [PairNorm, BrokenNorm])
def test_a_model_that_cannot_run_without_weights_has_no_norms(kind: type[nn.LayerNorm]) -> None:
    with torch.device("meta"):
        assert norms_in_front(Model(kind(8))) == {}


@pytest.mark.parametrize("kind", [PairNorm, BrokenNorm])
def test_a_norm_that_cannot_be_asked_tells_nothing(kind: type[nn.LayerNorm]) -> None:
    with torch.device("meta"):
        norm = Norm("n", kind(8), {"weight": "w", "bias": "b"})
    values = {"weight": torch.ones(8), "bias": torch.zeros(8)}
    assert norm.input_mean_squares(values, 8) is None


def test_values_that_are_none_or_of_another_shape_tell_nothing() -> None:
    norm = Norm("n", nn.LayerNorm(8, device="meta"), {"weight": "w", "bias": "b"})
    values = {"weight": torch.ones(8), "bias": torch.zeros(8)}
    assert norm.input_mean_squares(values, 8) is not None
    assert norm.input_mean_squares(values, 4) is None
    for value in (torch.nan, torch.inf):
        assert norm.input_mean_squares(values | {"bias": torch.full((8,), value)}, 8) is None
    largest = torch.full((8,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert norm.input_mean_squares({"weight": largest, "bias": largest}, 8) is not None


def test_what_torch_makes_by_default_does_not_reach_the_energies() -> None:
    norm = Norm("n", nn.LayerNorm(8, device="meta"), {"weight": "w", "bias": "b"})
    values = {"weight": torch.arange(8.0), "bias": torch.ones(8)}
    with torch.device("meta"):
        mean_squares = norm.input_mean_squares(values, 8)
    assert mean_squares is not None
    assert torch.allclose(mean_squares, torch.arange(8.0).double().square() + 1, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(models.FAMILIES.keys() - {"smollm3"}))  # lists its layers
def test_a_very_deep_model_runs_one_layer_of_each_kind_and_knows_as_much(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models.FAMILIES[family]()
    config.num_hidden_layers = 5
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 5
    model = skeleton(config)
    expected = norms_in_front(model)
    monkeypatch.setattr(norms, "_MOST_LAYERS", 4)
    found = norms_in_front(model)
    assert found == expected
    assert of_layer(found, 4) == EXPECTED[family]
    assert len(trunk_of(model)[1]) == 5
