"""int4 weights in the layouts of torch's own kernels, where smolquant's is not to be had.

torch's CPU layout differs between AVX2, AVX512 and neither, and a weight packed for another one gives
garbage without an error (https://github.com/pytorch/ao/issues/3800). So it is made when a model is loaded,
and never stored.
"""

import torch
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

from smolquant.schemes.int4_packing import unpack_int4

_ROW_MULTIPLE = 16
"""The CPU kernel computes this many output features at a time."""

_LEVEL_OFFSET = 8
"""``Int4Tensor`` stores -8..7, the kernels count 0..15."""

_PACKED_ROWS = 256
"""Rows packed at a time, since unpacked levels take eight times the memory. A multiple of the rows that
any CPU's layout interleaves (64 at most), so that the packed blocks join to the packed whole."""


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
