"""A linear on the CPU for torchao's plain ``Int4Tensor``, which has one for CUDA only (through mslk).

Importing this registers it and leaves CUDA as it is. Each weight is repacked for this CPU at its first use,
and so is each expert of a stack.
"""

from typing import Any

import torch
from torch.nn import functional
from torchao.quantization import Int4Tensor

from smolquant.runtime.kernels import pack_for_this_cpu

_upstream_linear = Int4Tensor._TORCH_FN_TABLE[Int4Tensor][functional.linear]


@Int4Tensor.implements_torch_function(functional.linear)  # type: ignore[untyped-decorator]
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    activation, weight = args[0], args[1]
    if activation.device.type != "cpu":
        upstream: torch.Tensor = _upstream_linear(func, types, args, kwargs)
        return upstream
    packed = getattr(weight, "_packed_for_this_cpu", None)
    if packed is None:
        packed = weight._packed_for_this_cpu = pack_for_this_cpu(weight)
    bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    return functional.linear(activation, packed, bias)
