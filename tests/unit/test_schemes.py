"""Each scheme against torchao's own arithmetic."""

import math

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)

from smolquant.runtime.kernels import pack_for_this_cpu, unpack_int4
from smolquant.schemes import BOTH, SCHEMES, Keep, Quantize, Scheme
from smolquant.schemes.int4_weight_only import Int4WeightOnly, pack_int4

INT4 = SCHEMES["int4_weight_only"]
RTN = Int4WeightOnly("rtn")
EVERY_WAY = [*SCHEMES.values(), RTN]
each_way = pytest.mark.parametrize("scheme", EVERY_WAY, ids=lambda scheme: scheme.arithmetic)


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("quant_type", ["int8_weight_only", "int8_dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_in_row_blocks_is_what_quantize_gives_for_the_whole(
    quant_type: str, dtype: torch.dtype
) -> None:
    weight = random_weight(48, 160, dtype)
    linear = nn.Linear(160, 48, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(weight)
    quantize_(linear, SCHEMES[quant_type].torchao_config(128))
    expected = linear.weight

    blocks = [SCHEMES[quant_type].quantize(weight[i : i + 20], None) for i in range(0, 48, 20)]

    for part in ("qdata", "scale", "zero_point"):
        joined = torch.cat([getattr(block, part) for block in blocks])
        assert torch.equal(joined, getattr(expected, part)), part
    activations = "act_quant_kwargs"
    assert getattr(blocks[0], activations) == getattr(expected, activations)


def test_int4_stands_for_the_values_of_torchaos_tinygemm_rounding() -> None:
    weight, block = random_weight(32, 256), (1, 64)
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, torch.bfloat16
    )
    levels = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    expected = _dequantize_affine_tinygemm(
        levels, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )

    ours = RTN.dequantize(RTN.quantize(weight, 64))

    # Theirs computes in bfloat16 before the last cast; ours in float32.
    assert torch.allclose(ours, expected, atol=2**-8 * weight.abs().max().item())


@pytest.mark.parametrize("scheme", [INT4, RTN])
@pytest.mark.parametrize("block_rows", [1, 20, 47])
def test_int4_blocks_of_rows_join_to_the_whole(scheme: Scheme, block_rows: int) -> None:
    weight = random_weight(300, 512)
    whole = scheme.quantize(weight, 32)
    parts = [
        scheme.quantize(weight[i : i + block_rows], 32) for i in range(0, len(weight), block_rows)
    ]
    for part, axis in scheme.row_axes.items():
        joined = torch.cat([getattr(block, part) for block in parts], dim=axis)
        assert torch.equal(joined, getattr(whole, part)), part


def test_packing_two_values_a_byte_and_back() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    packed = pack_int4(values)
    assert packed.shape == (3, 16)
    assert packed[0, 0].item() == (-8 & 0xF) | (-7 << 4), "the even column is the low nibble"
    assert torch.equal(unpack_int4(packed), values)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [16, 24, 17, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cpu_kernel_multiplies_by_the_weight_that_is_stored(
    rows: int, group: int, dtype: torch.dtype
) -> None:
    """Rows that are no multiple of 16 are padded: the kernel alone refuses them."""
    weight = INT4.quantize(random_weight(rows, 512, dtype), group)
    x = random_weight(5, 512, dtype)

    y = nn.functional.linear(x, pack_for_this_cpu(weight))

    exact = x.float() @ INT4.dequantize(weight).t()
    assert y.shape == (5, rows)
    assert (y.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize(
    ("columns", "asked", "given"),
    [(1024, 128, 128), (576, 128, 64), (96, 256, 32), (512, 256, 256), (160, 64, 32)],
)
def test_the_largest_group_that_divides_the_columns_is_used(
    columns: int, asked: int, given: int
) -> None:
    decision = INT4.decide(64, columns, asked)
    assert isinstance(decision, Quantize)
    assert decision.group_size == given
    assert bool(decision.note) == (asked != given), "a smaller group is said, the asked one is not"


def test_columns_that_no_group_divides_are_kept_with_the_reason() -> None:
    decision = INT4.decide(64, 80, 128)
    assert isinstance(decision, Keep)
    assert "80 columns" in decision.reason


def test_both_means_the_two_weight_only_schemes() -> None:
    assert [SCHEMES[name].variant for name in BOTH] == ["int8", "int4"]


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [1e-7, 0.02, 300.0])
def test_the_fast_way_stores_what_torchaos_own_does(
    scheme: Scheme, dtype: torch.dtype, spread: float
) -> None:
    weight = (random_weight(40, 512, torch.float32) * spread).to(dtype)
    weight[3] = 0
    weight[4] = weight[4, 0]
    weight[5].abs_()
    before = weight.clone()

    rows = scheme.quantize_rows(weight, 128)

    expected = scheme.quantize(weight, 128)
    assert torch.equal(weight, before), "the weight is the caller's, and other variants need it"
    assert set(rows.parts) == set(scheme.row_axes)
    for part, data in rows.parts.items():
        assert data.dtype is getattr(expected, part).dtype
        assert torch.equal(data, getattr(expected, part)), part
    error = (scheme.dequantize(expected).double() - weight.double()).square().sum().item()
    assert rows.squared_error == pytest.approx(error, rel=1e-3)
    assert rows.squared_norm == pytest.approx(weight.double().square().sum().item(), rel=1e-3)


@each_way
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_tells_of_a_value_that_is_not(
    scheme: Scheme, value: float
) -> None:
    weight = random_weight(4, 256)
    weight[2, 77] = value
    assert not math.isfinite(scheme.quantize_rows(weight, 128).squared_norm)


def test_types_that_share_their_arithmetic_store_the_same_parts() -> None:
    weight = random_weight(16, 256)
    for one in EVERY_WAY:
        for other in EVERY_WAY:
            same = all(
                part in other.quantize_rows(weight, 64).parts
                and torch.equal(data, other.quantize_rows(weight, 64).parts[part])
                for part, data in one.quantize_rows(weight, 64).parts.items()
            )
            assert same == (one.arithmetic == other.arithmetic), (one.variant, other.variant)
