"""Stored weights on the machine at hand: from the portable layout on disk to the one that a kernel wants.

The CPU layout of int4 differs between AVX2, AVX512 and neither, and a weight packed for another one gives
garbage without an error (https://github.com/pytorch/ao/issues/3800). So it is made here, when a model
is loaded, and never stored.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros
from torchao.utils import TorchAOBaseTensor

from smolquant.runtime.stacks import each_expert
from smolquant.schemes import Scheme
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


def _pack_for_cuda_without_mslk(weight: Int4Tensor) -> torch.Tensor:
    return weight if has_mslk() else pack_for_cuda(weight)


def _plain(weight: TorchAOBaseTensor) -> torch.Tensor:
    """The weight that it stands for, made once; torchao would make it again at every call."""
    plain: torch.Tensor = weight.dequantize()
    return plain


_PACKERS: Mapping[tuple[str, str], Callable[[Any], torch.Tensor]] = {
    ("Int4Tensor", "cpu"): each_expert(pack_for_this_cpu),
    ("Int4Tensor", "cuda"): each_expert(_pack_for_cuda_without_mslk),
    ("Float8Tensor", "cpu"): _plain,
}
"""What packs a weight, by the class that it is stored as and the type of its device. A weight without an
entry runs as it is stored."""


def pack_model(model: nn.Module) -> None:
    """Turn every stored weight of ``model`` into what its device computes with, in place."""
    _replace_stored(model, _packed)


def dequantize_model(model: nn.Module) -> None:
    """Turn every stored weight of ``model`` into the plain one that it stands for, in place.

    This is for machines without the kernels of a scheme, see :func:`has_kernels`.
    """
    _replace_stored(model, _plain)


def _packed(weight: TorchAOBaseTensor) -> torch.Tensor:
    pack = _PACKERS.get((type(weight).__name__, weight.device.type))
    return pack(weight) if pack else weight


def _replace_stored(
    model: nn.Module, replacement: Callable[[TorchAOBaseTensor], torch.Tensor]
) -> None:
    """Put what ``replacement`` makes of each stored weight in its place, one by one; tied ones stay one."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, TorchAOBaseTensor):
                holders.setdefault(id(weight), []).append((module, name))
    for places in holders.values():
        module, name = places[0]
        stored: Any = module._parameters[name]
        replaced = replacement(stored)
        if replaced is not stored:
            parameter = nn.Parameter(replaced, requires_grad=False)
            for module, name in places:
                module._parameters[name] = parameter


def has_kernels(scheme: Scheme, device: str) -> bool:
    """Whether a variant of ``scheme`` computes on ``device`` as it is meant to.

    Args:
        device: ``cpu``, ``cuda`` or any device that transformers' ``device_map`` takes.
    """
    if scheme.cuda_capability is None:
        return True
    if device == "cpu" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= scheme.cuda_capability


def preparation(scheme: Scheme, device: str) -> Callable[[nn.Module], None]:
    """What makes stored weights run on ``device``: its kernels, or plain weights where it has none."""
    return pack_model if has_kernels(scheme, device) else dequantize_model
