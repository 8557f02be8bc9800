"""Linear layers and tables of torchao's stored weights, on a CPU, through the registry's kernels.

Importing this registers them with torchao's classes, and leaves other devices as they are: whatever calls
``torch.nn.functional.linear`` or ``embedding`` with such a weight, a module or a mixture's loop over its
experts, computes with it as it is stored.
"""

from typing import Any

import torch
from torch.nn import functional
from torchao.quantization import Int4Tensor, Int8Tensor

import smolquant.runtime.stacks  # noqa: F401 - lets experts be taken out of their stacks
from smolquant.runtime import cpu_linear
from smolquant.runtime.registry import column_by_column, kernel_of, plain


def can_compute(inputs: torch.Tensor) -> bool:
    """Whether kernels of the registry take such inputs. None of them has a derivative."""
    return cpu_linear.takes(inputs) and not (inputs.requires_grad and torch.is_grad_enabled())


def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    inputs, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    if weight.qdata.is_cpu:
        computed = _on_cpu(inputs, weight, bias)
        if computed is not None:
            return computed
    elif isinstance(weight, Int4Tensor):
        column_by_column(weight)
    upstream: torch.Tensor = _UPSTREAM[type(weight)](func, types, args, kwargs)
    return upstream


def _on_cpu(inputs: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """None where torchao's own linear is the one to use."""
    if not can_compute(inputs):
        derivable: torch.Tensor = functional.linear(inputs, plain(weight).to(inputs.dtype), bias)
        return derivable
    kernel = kernel_of(weight)
    if kernel.stored is not None:
        return cpu_linear.linear(inputs, kernel.stored(weight), bias)
    if kernel.linear is not None:
        return kernel.linear(weight)(inputs, bias)
    if kernel.replace is None:
        return None
    replaced: torch.Tensor | None = getattr(weight, "_replaced", None)
    if replaced is None:
        replaced = weight._replaced = kernel.replace(weight)
    computed: torch.Tensor = functional.linear(inputs, replaced, bias)
    return computed


def _embedding(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Rows of an int8 table: those that are looked up, and no others, become plain."""
    ids, weight = args[0], args[1]
    if weight.scale.numel() != weight.qdata.shape[0]:
        looked_up: torch.Tensor = functional.embedding(ids, weight.dequantize(), *args[2:])
        return looked_up
    scale = weight.scale.view(-1, 1)[ids].to(torch.float32)
    rows: torch.Tensor = (weight.qdata[ids] * scale).to(weight.dtype)
    return rows


_UPSTREAM = {
    stored: stored._TORCH_FN_TABLE[stored][functional.linear] for stored in (Int4Tensor, Int8Tensor)
}
for _stored in _UPSTREAM:
    _stored.implements_torch_function(functional.linear)(_linear)
Int8Tensor.implements_torch_function(functional.embedding)(_embedding)
