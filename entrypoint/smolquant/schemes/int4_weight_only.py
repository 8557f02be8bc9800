"""int4 weights in groups of columns, each with a scale and a zero point, in torchao's plain layout.

The plain layout is the one that means the same on every machine. Packing for a kernel depends on the
CPU (AVX2 and AVX512 differ) and is left to the moment of loading, see :mod:`smolquant.int4_kernels`.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.base import GROUP_SIZES, Decision, Keep, Quantize, Scheme

if TYPE_CHECKING:
    import torch

_MIDPOINT = 8
"""tinygemm counts levels from 0 to 15, ``Int4Tensor`` from -8 to 7: w = (level - 8) * scale + zero."""


class Int4WeightOnly(Scheme):
    """Asymmetric round-to-nearest with torchao's tinygemm parameters, stored as ``Int4Tensor``."""

    quant_type: ClassVar = "int4_weight_only"
    variant: ClassVar = "int4"
    title: ClassVar = "int4 weights, a scale and a zero point per group"
    best_for: ClassVar = (
        "CPUs and small memories, where size counts more than closeness to the source"
    )
    loading: ClassVar = (
        "smolquant on a CPU (stock transformers alone cannot run int4 on a CPU), "
        "smolquant or mslk on a GPU"
    )
    row_axes: ClassVar = {"qdata": 0, "scale": 1, "zero_point": 1}

    def options(self, group_size: int) -> dict[str, int]:
        return {"group_size": group_size}

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        fitting = [size for size in GROUP_SIZES if size <= group_size and columns % size == 0]
        if not fitting:
            return Keep(f"{columns} columns are not a multiple of {GROUP_SIZES[0]}")
        if max(fitting) == group_size:
            return Quantize(group_size)
        return Quantize(max(fitting), f"{columns} columns are not a multiple of {group_size}")

    def torchao_config(self, group_size: int) -> Any:
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=group_size)

    def quantize(self, weight: "torch.Tensor", group_size: int | None) -> "torch.Tensor":
        import torch
        from torchao.quantization import Int4Tensor, MappingType
        from torchao.quantization.quant_primitives import (
            _choose_qparams_affine_tinygemm,
            _quantize_affine_tinygemm,
        )

        assert group_size is not None
        rows, columns = weight.shape
        block = [1, group_size]
        scale, zero = _choose_qparams_affine_tinygemm(
            weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, weight.dtype
        )
        levels = _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
        quantized: torch.Tensor = Int4Tensor(
            qdata=pack_int4(levels.sub_(_MIDPOINT).to(torch.int8)),
            scale=scale.reshape(rows, -1).t().contiguous(),
            zero_point=zero.reshape(rows, -1).t().contiguous(),
            block_size=block,
            shape=torch.Size((rows, columns)),
        )
        return quantized

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        # At most half a step of (high - low)/15 in each column, of a group whose norm is at least that
        # of its two ends, (high - low)/sqrt(2).
        assert group_size is not None
        return 1.02 * math.sqrt(2 * group_size) / 30

    def dequantize(self, quantized: "torch.Tensor") -> "torch.Tensor":
        from smolquant.int4_kernels import unpack_int4

        levels = unpack_int4(quantized.qdata).float()  # type: ignore[attr-defined]
        groups = quantized.scale.shape[0]  # type: ignore[attr-defined]
        grouped = levels.view(levels.shape[0], groups, -1)
        scale = quantized.scale.t().float().unsqueeze(-1)  # type: ignore[attr-defined]
        zero = quantized.zero_point.t().float().unsqueeze(-1)  # type: ignore[attr-defined]
        weight: torch.Tensor = (grouped * scale + zero).view(levels.shape)
        return weight


def pack_int4(values: "torch.Tensor") -> "torch.Tensor":
    """Two values in [-8, 7] a byte, the even column in the low nibble.

    Args:
        values: (n, K) int8, K even.

    Returns:
        (n, K / 2) int8, the layout of torchao's ``Int4Tensor.qdata``.
    """
    low, high = values[:, ::2], values[:, 1::2]
    return (low & 0xF) | (high << 4)
