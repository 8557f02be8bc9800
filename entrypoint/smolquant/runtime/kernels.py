"""int4 on the machine at hand: from the portable layout on disk to the one that a kernel wants.

The CPU layout differs between AVX2, AVX512 and neither, and a weight packed for another one gives
garbage without an error (https://github.com/pytorch/ao/issues/3800). So it is made here, when a model
is loaded, and never stored.
"""

import torch
from torch import nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

_ROW_MULTIPLE = 16
"""The CPU kernel computes this many output features at a time."""

_LEVEL_OFFSET = 8
"""``Int4Tensor`` stores -8..7, the kernels count 0..15."""

_PACKED_ROWS = 256
"""Rows packed at a time, since unpacked levels take eight times the memory. A multiple of the rows that
any CPU's layout interleaves (64 at most), so that the packed blocks join to the packed whole."""


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`smolquant.schemes.int4_weight_only.pack_int4`.

    Args:
        packed: (N, K / 2) int8, two values a byte, the even column in the low nibble.

    Returns:
        (N, K) int8 in [-8, 7].
    """
    low = (packed << 4) >> 4  # arithmetic shifts carry the sign of the low nibble
    high = packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def pack_for_this_cpu(weight: Int4Tensor) -> Int4OpaqueTensor:
    """The same weight in the layout of this CPU's int4 kernel.

    Args:
        weight: (N, K) on the CPU, in groups of 32, 64, 128 or 256. Any N: the kernel wants multiples
            of 16, so rows of zeros are added, and ``Int4OpaqueTensor`` cuts their outputs off.
    """
    rows, columns = weight.shape
    padding = -rows % _ROW_MULTIPLE
    scale = functional.pad(weight.scale.t(), (0, 0, 0, padding))
    zero_point = functional.pad(weight.zero_point.t(), (0, 0, 0, padding))
    # One allocation to copy blocks into: kept one by one, they would pin the heap between temporaries.
    qdata = torch.empty((rows + padding, columns // 2), dtype=torch.uint8)
    for start in range(0, rows, _PACKED_ROWS):
        block = _pack_rows(weight.qdata[start : start + _PACKED_ROWS])
        qdata[start : start + len(block)] = block
    return Int4OpaqueTensor(
        qdata=qdata,
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, zero_point, scale.dtype),
        block_size=list(weight.block_size),
        shape=weight.shape,
        act_pre_scale=weight.act_pre_scale,
    )


def _pack_rows(packed: torch.Tensor) -> torch.Tensor:
    """(n, K / 2) as stored -> (n rounded up, K / 2) uint8 in this CPU's layout."""
    levels = unpack_int4(packed).to(torch.int32) + _LEVEL_OFFSET
    levels = functional.pad(levels, (0, 0, 0, -len(levels) % _ROW_MULTIPLE))
    interleaved: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return interleaved


def pack_for_cuda(weight: Int4Tensor) -> torch.Tensor:
    """The same weight in the tile-packed layout, which torch's own CUDA kernel reads.

    Args:
        weight: (N, K) bfloat16 on a CUDA device.
    """
    from torchao.quantization import Int4TilePackedTo4dTensor

    rows, columns = weight.shape
    padded_rows, padded_columns = -(-rows // 8) * 8, -(-columns // 1024) * 1024
    groups = padded_columns // weight.block_size[-1]
    levels = unpack_int4(weight.qdata).to(torch.int32) + _LEVEL_OFFSET
    levels = functional.pad(levels, (0, padded_columns - columns, 0, padded_rows - rows))
    grid = (0, groups - weight.scale.shape[0], 0, padded_rows - rows)
    scale = functional.pad(weight.scale.t(), grid)
    zero_point = functional.pad(weight.zero_point.t(), grid)
    packed = torch.ops.aten._convert_weight_to_int4pack(
        (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8), 8
    )
    weight_for_cuda: torch.Tensor = Int4TilePackedTo4dTensor(
        qdata=packed,
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, zero_point, scale.dtype),
        block_size=list(weight.block_size),
        shape=weight.shape,
        act_pre_scale=weight.act_pre_scale,
    )
    return weight_for_cuda


def has_mslk() -> bool:
    """Whether torchao's own CUDA kernel for the plain layout is installed."""
    return hasattr(torch.ops.mslk, "bf16i4bf16_rowwise")


def pack_model(model: nn.Module) -> None:
    """Turn every plain int4 weight of ``model`` into what its device computes with, in place."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Int4Tensor):
            continue
        if weight.device.type == "cpu":
            packed = pack_for_this_cpu(weight)
        elif weight.device.type == "cuda" and not has_mslk():
            packed = pack_for_cuda(weight)
        else:
            continue
        module.weight = nn.Parameter(packed, requires_grad=False)
