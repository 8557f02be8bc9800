"""What multiplies with a stored weight: one entry for each way, by the class of the weight and its device.

A kernel either computes with the weight as it is stored, or wants another one in its place. The first of a
weight's kernels that can be had is the one in use; without one, torchao computes as it does by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4Tensor, Int4TilePackedTo4dTensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quant_primitives import MappingType

from smolquant.errors import InputError
from smolquant.memory import page_out
from smolquant.runtime import cpu_linear
from smolquant.runtime.compiled import Stored
from smolquant.runtime.kleidiai import kleidiai_lacks, pack_for_kleidiai
from smolquant.runtime.many_tokens import in_blocks
from smolquant.runtime.packing import has_mslk, pack_for_cuda, pack_for_this_cpu
from smolquant.runtime.stacks import each_expert
from smolquant.schemes.int4_packing import unpack_int4

Linear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Inputs (..., K) and a bias (N,) or None -> (..., N)."""


@dataclass(frozen=True)
class Kernel:
    """One way of multiplying with stored weights: by compiled code of ours, by a function, or by what
    torchao has for the stored weight or for another that takes its place."""

    name: str
    lacks: Callable[[Any], str]
    """Why it cannot be had for a weight, or is not worth having; empty where it is to be used."""
    stored: Callable[[Any], Stored] | None = None
    """The stored weight (N, K), or a stack of them -> its parts for :mod:`smolquant.runtime.cpu_linear`."""
    linear: Callable[[Any], Linear] | None = None
    """The stored weight (N, K) -> the function that multiplies with it."""
    replace: Callable[[Any], torch.Tensor] | None = None
    """The stored weight, or a stack of them -> what takes its place, with a linear of its own."""


def _nothing(weight: Any) -> str:
    return ""


def _compiled_lacks() -> str:
    if not cpu_linear.is_compiled():
        return "smolquant was installed without its compiled code"
    if not cpu_linear.has_threads():
        return "torch's threads cannot be used here"
    return ""


# --- int8 on a CPU --------------------------------------------------------------------------------


def _int8_lacks(weight: Any) -> str:
    return _compiled_lacks() or _int8_differs(weight)


def _int8_differs(weight: Any) -> str:
    """What is not as this package stores int8 weights."""
    activations = weight.act_quant_kwargs
    rows, columns = weight.qdata.shape[-2:]
    if list(weight.block_size)[-2:] != [1, columns] or weight.scale.numel() != rows:
        return "its scales are not one a row"
    if weight.act_pre_scale is not None or weight.act_quant_scale is not None:
        return "its inputs are scaled"
    if activations is not None and (
        not isinstance(activations.granularity, PerRow)
        or activations.mapping_type != MappingType.SYMMETRIC
        or activations.reduce_range
    ):
        return "its inputs are not quantized token by token"
    return "" if weight.qdata.is_contiguous() else "its levels do not lie row by row"


def _int8_stored(weight: Any) -> Stored:
    dynamic = weight.act_quant_kwargs is not None
    return Stored(weight.qdata, weight.scale, dynamic=dynamic)


_ALIGNMENT = 64
"""Where torch's kernel for int8 expects levels to begin, in bytes: on a CPU with AVX512 it ends the process
otherwise. A safetensors file that is mapped into memory aligns them to 8."""


def _torch_int8_lacks(weight: Any) -> str:
    if weight.act_quant_kwargs is not None:
        return "torch's kernel leaves inputs as they are"
    return _int8_differs(weight)


def _torch_int8_linear(weight: Any) -> Linear:
    if weight.qdata.data_ptr() % _ALIGNMENT:
        weight.qdata = weight.qdata.clone()
    levels, stored_scale = weight.qdata, weight.scale.flatten()

    def widen(start: int, stop: int, out: torch.Tensor) -> None:
        torch.mul(levels[start:stop], stored_scale[start:stop].unsqueeze(1), out=out)

    def linear(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        scale = stored_scale.to(inputs.dtype)
        if len(flat) <= cpu_linear.FEW_TOKENS:
            output: torch.Tensor = torch.ops.aten._weight_int8pack_mm(
                flat.contiguous(), levels, scale
            )
            output = output if bias is None else output + bias
        else:
            output = in_blocks(flat, len(levels), widen, bias)
        return output.view(*inputs.shape[:-1], -1)

    return linear


# --- int4 on a CPU --------------------------------------------------------------------------------


def _int4_lacks(weight: Any) -> str:
    if weight.act_pre_scale is not None:
        return "its inputs are scaled"
    if weight.block_size[-1] % 32 or weight.block_size[-1] > 2048:
        return "its groups are not of 32 columns, or twice as many, and so on"
    return _compiled_lacks()


def _int4_stored(weight: Any) -> Stored:
    return Stored(weight.qdata, *row_by_row(weight))


def row_by_row(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points, (N, K / group size), of a weight that is stored with (K / group size, N).

    Their memory is turned around at first use, so that a row's lie side by side; the weight keeps the shape
    that torchao wants, as a view, and nothing is kept twice. Stacks (E, N, K) are turned matrix by matrix.
    """
    if not weight.scale.transpose(-2, -1).is_contiguous():
        weight.scale, weight.zero_point = _turned(weight.scale), _turned(weight.zero_point)
    return weight.scale.transpose(-2, -1), weight.zero_point.transpose(-2, -1)


def _turned(values: torch.Tensor) -> torch.Tensor:
    """The same values, in the order of their transpose. Those of a mapped file leave the process."""
    turned = values.transpose(-2, -1).contiguous().transpose(-2, -1)
    page_out(values.data_ptr(), values.numel() * values.itemsize)
    return turned


def column_by_column(weight: Any) -> None:
    """Undo :func:`row_by_row`, for what expects scales and zero points as torchao lays them out."""
    weight.scale = weight.scale.contiguous()
    weight.zero_point = weight.zero_point.contiguous()


# --- Elsewhere ------------------------------------------------------------------------------------


def plain(weight: Any) -> torch.Tensor:
    """The weight that a stored one stands for, made once; torchao would make it again at every call.

    Raises:
        InputError: it was packed for a kernel, which cannot be undone.
    """
    made: torch.Tensor
    if isinstance(weight, Int4Tensor):  # torchao has no way back from it
        levels = unpack_int4(weight.qdata).float()
        levels = levels.view(*levels.shape[:-1], -1, weight.block_size[-1])
        scale, zero_point = weight.scale.transpose(-2, -1), weight.zero_point.transpose(-2, -1)
        made = (levels * scale.unsqueeze(-1) + zero_point.unsqueeze(-1)).flatten(-2)
        return made.to(weight.dtype)
    if isinstance(weight, Int4OpaqueTensor | Int4TilePackedTo4dTensor):
        raise InputError(
            "The model's weights are packed for this machine's kernel, and cannot be unpacked.",
            hint="Load the variant with AutoModelForCausalLM.from_pretrained, and dequantize that model.",
        )
    made = weight.dequantize()
    return made


def _mslk_lacks(weight: Any) -> str:
    return "" if has_mslk() else "the package mslk is not installed"


TORCHAO = Kernel("torchao's own", _nothing)
"""What computes with a weight that has no entry."""

KERNELS: Mapping[tuple[str, str], tuple[Kernel, ...]] = {
    ("Int8Tensor", "cpu"): (
        Kernel("smolquant, 8 bits", _int8_lacks, stored=_int8_stored),
        Kernel("torch, 8 bits", _torch_int8_lacks, linear=_torch_int8_linear),
    ),
    ("Int4Tensor", "cpu"): (
        Kernel("smolquant, 4 bits", _int4_lacks, stored=_int4_stored),
        Kernel("KleidiAI, 4 bits, not measured", kleidiai_lacks, replace=pack_for_kleidiai),
        Kernel(
            "torch, 4 bits, packed for this CPU", _nothing, replace=each_expert(pack_for_this_cpu)
        ),
    ),
    ("Int4Tensor", "cuda"): (
        Kernel("mslk, 4 bits", _mslk_lacks),
        Kernel("torch, 4 bits, in tiles", _nothing, replace=each_expert(pack_for_cuda)),
    ),
    ("Float8Tensor", "cpu"): (Kernel("plain weights", _nothing, replace=plain),),
}
"""(class of the stored weight, type of its device) -> its kernels, the best one first."""


def kernel_of(weight: Any) -> Kernel:
    """What multiplies with a stored weight, (N, K) or a stack of them, on its device."""
    for kernel in KERNELS.get((type(weight).__name__, weight.qdata.device.type), ()):
        if not kernel.lacks(weight):
            return kernel
    return TORCHAO


def lacking(weight: Any) -> str:
    """Why the best kernel for a stored weight is not the one in use; empty where it is."""
    best = KERNELS.get((type(weight).__name__, weight.qdata.device.type), (TORCHAO,))[0]
    return best.lacks(weight)
