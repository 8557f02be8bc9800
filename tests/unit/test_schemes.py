"""Each scheme against torchao's own arithmetic."""

import math

import pytest
import torch
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8Tensor, PerRow, quant_api, quantize_
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)

from smolquant.runtime.packing import pack_for_this_cpu
from smolquant.schemes import BOTH, SCHEMES, Keep, Quantize, Scheme
from smolquant.schemes.float8_weight_only import _rounded_to_float8
from smolquant.schemes.int4_packing import pack_int4, unpack_int4
from smolquant.schemes.int4_weight_only import Int4WeightOnly
from stored_values import stored_values

INT4 = SCHEMES["int4_weight_only"]
RTN = Int4WeightOnly("rtn")
EVERY_WAY = [*SCHEMES.values(), RTN]
each_way = pytest.mark.parametrize("scheme", EVERY_WAY, ids=lambda scheme: scheme.arithmetic)


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """float8 cannot be compared as numbers; and zeros of either sign are different bytes."""
    same = one.shape == other.shape and one.dtype is other.dtype
    return same and torch.equal(*(data.contiguous().view(torch.uint8) for data in (one, other)))


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


def tinygemm_rounding(
    weight: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torchao's own levels (0 to 15), scales and zero points, by rounding to nearest."""
    block = (1, group_size)
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, weight.dtype
    )
    levels = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    return levels, scale, zero


def test_int4_stands_for_the_values_of_torchaos_tinygemm_rounding() -> None:
    weight = random_weight(32, 256)
    levels, scale, zero = tinygemm_rounding(weight, 64)
    expected = _dequantize_affine_tinygemm(
        levels, (1, 64), scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )

    ours = stored_values(RTN.quantize(weight, 64))

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

    exact = x.float() @ stored_values(weight).t()
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
        assert same_bits(data, getattr(expected, part)), part
    error = (stored_values(expected).double() - weight.double()).square().sum().item()
    assert rows.squared_error == pytest.approx(error, rel=1e-3)
    assert rows.squared_norm == pytest.approx(weight.double().square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_nearest_is_torchaos_to_the_bit(dtype: torch.dtype) -> None:
    weight = random_weight(40, 512, torch.float32).mul(0.02).to(dtype)
    levels, scale, zero = tinygemm_rounding(weight, 128)
    parts = RTN.quantize_rows(weight, 128).parts
    assert torch.equal(unpack_int4(parts["qdata"]), (levels - 8).to(torch.int8))
    assert same_bits(parts["scale"], scale.view(40, -1).t().contiguous())
    assert same_bits(parts["zero_point"], zero.view(40, -1).t().contiguous())


def difficult_rows(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of every size that a dtype has, of zeros, of one large value, and of values halfway."""
    weight = random_weight(rows, columns, torch.float32)
    largest = torch.finfo(dtype).max / weight.abs().max()
    tiny = torch.finfo(dtype).smallest_normal
    weight *= torch.logspace(math.log2(tiny), math.log2(largest) - 1, rows, base=2).unsqueeze(1)
    halfway = torch.arange(columns) % 32 + 0.5
    for row, values in ((2, 0.0), (3, -0.0), (5, 448 / halfway), (7, halfway)):
        weight[row] = values
    weight[5, 0] = 448
    weight[9, 1:] *= 1e-5
    return weight.to(dtype)


@pytest.mark.parametrize("quant_type", ["float8_weight_only", "float8_dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(48, 160), (16, 16), (33, 50), (64, 2048), (12, 2)])
def test_float8_is_torchaos_to_the_bit_wherever_torchaos_is_a_number(
    quant_type: str, dtype: torch.dtype, rows: int, columns: int
) -> None:
    scheme, weight = SCHEMES[quant_type], difficult_rows(rows, columns, dtype)
    before = weight.clone()
    theirs = Float8Tensor.from_hp(weight, granularity=PerRow())

    # By row blocks, as a checkpoint is streamed; only some have a row that torchao must be asked for.
    blocks = [scheme.quantize_rows(block, None) for block in torch.split(weight, 4)]

    assert same_bits(weight, before)
    qdata, scale = (
        torch.cat([block.parts[part].view(torch.uint8) for block in blocks])
        for part in ("qdata", "scale")
    )
    assert same_bits(scale, theirs.scale.view(torch.uint8))
    flat = theirs.scale.squeeze(1) == 0
    assert flat.any() and not flat.all()
    assert same_bits(qdata[~flat], theirs.qdata.view(torch.uint8)[~flat])
    assert not qdata[flat].any(), "where torchao divides by zero there are zeros"
    whole = scheme.quantize(weight, None)
    assert same_bits(whole.qdata.view(torch.uint8), qdata)  # type: ignore[attr-defined]
    exact, stored = weight.double(), stored_values(whole).double()
    assert stored.isfinite().all()
    errors = torch.split((stored - exact).square().sum(1), 4)
    for block, error, values in zip(blocks, errors, torch.split(exact, 4), strict=True):
        if math.isfinite(block.squared_norm) and values.square().max() > 1e-36:
            assert block.squared_error == pytest.approx(error.sum().item(), rel=1e-3)


def test_every_number_of_float8_and_all_between_them_are_rounded_as_by_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].sort().values
    halfway = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (1e9, -1e9)]
    values = torch.cat([numbers, halfway, *beside, torch.tensor([1e-40, -1e-45, 449.7, -449.7])])
    assert torch.equal(_rounded_to_float8(values), values.to(torch.float8_e4m3fn).float())


def test_float8_dynamic_is_what_its_config_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config insists on a GPU before it does what any device can; that insistence is left out."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    scheme, weight = SCHEMES["float8_dynamic"], random_weight(64, 256)
    linear = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight)
    quantize_(linear, scheme.torchao_config(128))
    ours, theirs = ({"w.weight": w} for w in (scheme.quantize(weight, None), linear.weight.data))
    for (name, mine), (other, its) in zip(
        flatten_tensor_state_dict(ours)[0].items(),
        flatten_tensor_state_dict(theirs)[0].items(),
        strict=True,
    ):
        assert name == other
        assert same_bits(mine, its)
    assert flatten_tensor_state_dict(ours)[1] == flatten_tensor_state_dict(theirs)[1]
    small = nn.Linear(256, 24, bias=False, dtype=torch.bfloat16)
    quantize_(small, scheme.torchao_config(128))
    kept = type(small.weight.data) is torch.Tensor
    assert kept == isinstance(scheme.decide(24, 256, 128), Keep)
    assert isinstance(scheme.decide(32, 256, 128), Quantize)


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [32, 512])
def test_no_weight_is_further_from_its_source_than_the_bound(
    scheme: Scheme, dtype: torch.dtype, columns: int
) -> None:
    """Including rows in which all values but the largest are of the size that suits a scheme worst."""
    for size in [1.0, 0.5, 2**-5, *(2.0**-k * 1.0625 for k in range(1, 16))]:
        weight = (random_weight(8, columns, torch.float32).sign() * size * 0.3).to(dtype)
        weight[:, 0] = 0.3
        rows = scheme.quantize_rows(weight, 32)
        bound = scheme.max_relative_error(columns, 32)
        assert math.sqrt(rows.squared_error / rows.squared_norm) <= bound, size


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
                and same_bits(data, other.quantize_rows(weight, 64).parts[part])
                for part, data in one.quantize_rows(weight, 64).parts.items()
            )
            assert same == (one.arithmetic == other.arithmetic), (one.variant, other.variant)


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exponent", [-3, -4, -5, -6, -7, -9, -12, -20, -30, -38, -44])
def test_the_error_of_a_tiny_weight_is_what_it_is_and_no_fault(
    scheme: Scheme, dtype: torch.dtype, exponent: int
) -> None:
    """Squares of its values are zero in float32; and where a scheme has no scale as small, it is said."""
    weight = (random_weight(24, 512, torch.float64) * 10.0**exponent).to(dtype)
    weight[3] = 0
    rows = scheme.quantize_rows(weight, 128)
    exact = weight.double()
    error = (stored_values(scheme.quantize(weight, 128)).double() - exact).square().sum().item()
    norm = exact.square().sum().item()
    assert rows.squared_norm == pytest.approx(norm, rel=1e-3)
    assert rows.squared_error == pytest.approx(error, rel=1e-2, abs=1e-6 * norm)
    assert 0 <= rows.without_bound <= rows.squared_error
    bounded = math.sqrt((rows.squared_error - rows.without_bound) / norm) if norm else 0.0
    assert bounded <= scheme.max_relative_error(512, 128), (
        "the error of rows or groups too small for a scale belongs into QuantizedRows.without_bound"
    )
    if exponent >= -3:
        assert not rows.without_bound, "of ordinary weights every error has its bound"


@each_way
def test_a_tiny_row_excuses_no_other(scheme: Scheme) -> None:
    weight = random_weight(24, 512)
    weight[3] *= 1e-30
    rows = scheme.quantize_rows(weight, 128)
    assert rows.without_bound <= 1e-9 * rows.squared_error
