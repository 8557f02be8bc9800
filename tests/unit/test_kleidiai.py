"""KleidiAI's int4 path, with the plain loops that torch has for it where there is no KleidiAI."""

import copy
import platform
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from smolquant.runtime import cpu_linear, registry, stacks
from smolquant.runtime.kernels import dequantize, kernels, use_kernels
from smolquant.runtime.kleidiai import kleidiai_lacks, not_packable, pack_for_kleidiai
from smolquant.schemes import SCHEMES
from stored_values import stored_values

INT4 = SCHEMES["int4_weight_only"]


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Far enough from zero that zero points matter."""
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) * 0.05 + 0.03).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (256, 64), (128, 128), (512, 256)])
@pytest.mark.parametrize("rows", [1, 7, 48])
def test_a_layer_is_off_by_no_more_than_int8_activations_are(
    rows: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    stored: Any = INT4.quantize(weight_of(rows, columns), group)
    exact = stored_values(stored)
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 3, columns, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)

    output = functional.linear(inputs, pack_for_kleidiai(stored), bias)

    assert (output.dtype, output.shape) == (dtype, (2, 3, rows))
    wanted = inputs.double() @ exact.double().t() + bias.double()
    # Half a step of int8 in each input, times what the kernel multiplies it with: levels * scale.
    low, high = inputs.double().amin(-1).clamp(max=0), inputs.double().amax(-1).clamp(min=0)
    zero_point = stored.zero_point.t().double().repeat_interleave(group, 1)
    reach = (exact.double() - zero_point).abs().sum(1)
    bound = ((high - low) / 255 * 0.5).unsqueeze(-1) * reach * 1.01
    assert ((output.double() - wanted).abs() <= bound + wanted.abs() * 2**-8 + 1e-4).all()


def test_zero_points_add_no_error() -> None:
    """Inputs that int8 holds exactly give what the stored weights do, to float32's rounding."""
    stored = INT4.quantize(weight_of(33, 256), 64)
    inputs = torch.randint(-127, 128, (4, 256), generator=torch.Generator().manual_seed(0)).float()
    inputs[:, 0], inputs[:, 1] = -128, 127
    output = functional.linear(inputs, pack_for_kleidiai(stored))
    wanted = inputs.double() @ stored_values(stored).double().t()
    assert (output - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.fixture
def arm_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be had here: KleidiAI. torch's plain loops stand in for it."""
    monkeypatch.setattr(torch.backends.kleidiai, "is_available", lambda: True)
    monkeypatch.setattr(cpu_linear, "is_compiled", lambda: False)


@pytest.mark.usefixtures("arm_without_compiled_code")
def test_a_model_runs_with_it_where_the_compiled_code_is_missing() -> None:
    layer = nn.Linear(640, 48, dtype=torch.bfloat16)
    stored = INT4.quantize(layer.weight.detach(), 32)
    exact = stored_values(stored)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    model = nn.Sequential(layer)
    use_kernels(model)
    assert model[0].weight.shape == (48, 640)
    assert type(model[0].weight.data).__name__ == "KleidiAIInt4Tensor"
    inputs = torch.randn(5, 640, dtype=torch.bfloat16)
    wanted = inputs.float() @ exact.t() + layer.bias.float()
    for copied in (model, copy.deepcopy(model)):
        assert (copied(inputs).float() - wanted).norm() < 0.02 * wanted.norm()
    dequantize(model)
    assert (layer.weight.float() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.usefixtures("arm_without_compiled_code")
def test_what_it_cannot_take_goes_to_the_next_kernel() -> None:
    stored = INT4.quantize(weight_of(16, 64, torch.float16), 32)
    assert not_packable(stored) == "KleidiAI's scales are bfloat16"
    assert registry.kernel_of(stored).name == "torch, 4 bits, packed for this CPU"
    stack = stacks._joined([INT4.quantize(weight_of(16, 64), 32)] * 2)
    assert not_packable(stack) == "experts are not packed for KleidiAI"


def test_smolquants_own_kernel_comes_first_and_x86_has_no_kleidiai() -> None:
    stored = INT4.quantize(weight_of(16, 64), 32)
    names = [kernel.name for kernel in registry.KERNELS["Int4Tensor", "cpu"]]
    assert names.index("smolquant, 4 bits") < names.index("KleidiAI, 4 bits, not measured")
    if platform.machine() == "x86_64":
        assert kleidiai_lacks(stored) == "torch has no KleidiAI on this CPU"
    assert kernels(nn.Linear(1, 1)) == {}
