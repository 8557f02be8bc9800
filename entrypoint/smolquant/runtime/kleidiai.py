"""int4 weights for KleidiAI's kernel, which torch has on ARM: where smolquant's compiled code is missing.

The kernel quantizes each token to int8 and multiplies it with levels * scale. What it lacks, the zero
points, is the same for all columns of a group, so it goes on the token's sums of each group:

    x @ (levels * scale + zero_point).T = kernel(x) + (sums of x by group) @ zero_point.T

The sums are of the token as it is, so the zero points add no error to that of int8 activations.

On other CPUs torch computes the same with plain loops, which is how this is tested. How fast the kernel is
on ARM has not been measured by this project.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torchao.quantization import Int4Tensor
from torchao.utils import TorchAOBaseTensor

_COUNTED_FROM_ZERO = 0x88
"""Added to both levels of a byte without a carry: ``Int4Tensor`` stores -8..7, the kernel reads 0..15."""

_COLUMNS_AT_A_TIME = 512
"""Of a weight that is made plain again; one input for each takes as many numbers as there are columns."""


def kleidiai_lacks(weight: Any) -> str:
    """Why KleidiAI's kernel cannot be had for a stored int4 weight; empty where it can."""
    has_kleidiai: Callable[[], bool] = torch.backends.kleidiai.is_available
    if not has_kleidiai():
        return "torch has no KleidiAI on this CPU"
    return not_packable(weight)


def not_packable(weight: Any) -> str:
    """Why a stored int4 weight cannot be packed for the kernel, on whatever CPU; empty where it can."""
    if len(weight.shape) != 2:
        return "experts are not packed for KleidiAI"
    if weight.act_pre_scale is not None:
        return "its inputs are scaled"
    if weight.block_size[-1] % 32:
        return "its groups are not of multiples of 32 columns"
    if weight.scale.dtype != torch.bfloat16:
        return "KleidiAI's scales are bfloat16"
    return ""


def pack_for_kleidiai(weight: Int4Tensor) -> "KleidiAIInt4Tensor":
    """The same weight in the kernel's layout.

    Args:
        weight: (N, K) on the CPU, of which :func:`not_packable` has nothing to say.
    """
    rows, columns = weight.shape
    group = weight.block_size[-1]
    scale = weight.scale.t().contiguous()
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(
        weight.qdata.view(torch.uint8) ^ _COUNTED_FROM_ZERO,
        scale.float() if group == columns else scale,  # a scale a row has a kernel of its own
        None,
        group,
        columns,
        rows,
    )
    zero_point = weight.zero_point.t().float().contiguous()
    return KleidiAIInt4Tensor(
        packed, zero_point, list(weight.block_size), weight.shape, weight.dtype
    )


class KleidiAIInt4Tensor(TorchAOBaseTensor):  # type: ignore[misc]
    """An int4 weight (N, K) that linear layers multiply with by KleidiAI's kernel.

    Attributes:
        qdata: levels and scales, in a layout that only the kernel knows.
        zero_point: (N, K / group size) float32.
    """

    tensor_data_names = ("qdata", "zero_point")
    tensor_attribute_names = ("block_size", "shape", "dtype")

    def __new__(
        cls,
        qdata: torch.Tensor,
        zero_point: torch.Tensor,
        block_size: list[int],
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> "KleidiAIInt4Tensor":
        made: KleidiAIInt4Tensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
        )
        return made

    def __init__(
        self,
        qdata: torch.Tensor,
        zero_point: torch.Tensor,
        block_size: list[int],
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.qdata = qdata
        self.zero_point = zero_point
        self.block_size = block_size

    def dequantize(self) -> torch.Tensor:
        """(N, K) in the weight's dtype: what the layer makes of one column alone, which is exact."""
        columns = self.shape[1]
        blocks = [
            _product(functional.one_hot(some, columns).float(), self).to(self.dtype)
            for some in torch.split(torch.arange(columns), _COLUMNS_AT_A_TIME)
        ]
        return torch.cat(blocks).t().contiguous()


def _product(inputs: torch.Tensor, weight: KleidiAIInt4Tensor) -> torch.Tensor:
    """(n, K) float32 -> (n, N) float32."""
    rows, columns = weight.shape
    group = weight.block_size[-1]
    product: torch.Tensor = torch.ops.aten._dyn_quant_matmul_4bit(
        inputs, weight.qdata, group, columns, rows
    )
    sums = inputs.view(len(inputs), -1, group).sum(2)
    return torch.addmm(product, sums, weight.zero_point.t())


@KleidiAIInt4Tensor.implements_torch_function(functional.linear)  # type: ignore[untyped-decorator]
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    inputs, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    output = _product(inputs.reshape(-1, inputs.shape[-1]).float(), weight)
    if bias is not None:
        output += bias
    return output.to(inputs.dtype).view(*inputs.shape[:-1], -1)
