"""What torchao's stored tensors stand for, computed the plain way; the oracle of several tests."""

import torch
from torchao.quantization import Int4Tensor

from smolquant.schemes.int4_packing import unpack_int4


def stored_values(quantized: torch.Tensor) -> torch.Tensor:
    """The float32 (n, K) weight that a quantized tensor of any scheme stands for."""
    if not isinstance(quantized, Int4Tensor):
        return quantized.dequantize(torch.float32)  # type: ignore[call-arg]
    levels = unpack_int4(quantized.qdata).float()
    grouped = levels.view(levels.shape[0], quantized.scale.shape[0], -1)
    scale = quantized.scale.t().float().unsqueeze(-1)
    zero = quantized.zero_point.t().float().unsqueeze(-1)
    values: torch.Tensor = (grouped * scale + zero).view(levels.shape)
    return values
