"""int8 weights, one float32 scale a row; activations stay as they are."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.base import Decision, Quantize, Scheme

if TYPE_CHECKING:
    import torch


class Int8WeightOnly(Scheme):
    """torchao's ``Int8WeightOnlyConfig``: symmetric, per output row."""

    quant_type: ClassVar = "int8_weight_only"
    variant: ClassVar = "int8"
    title: ClassVar = "int8 weights, one scale per row"
    best_for: ClassVar = "GPUs, and wherever closeness to the source counts more than size"
    loading: ClassVar = "stock transformers with torchao, on CPU and GPU"
    row_axes: ClassVar = {"qdata": 0, "scale": 0, "zero_point": 0}

    def options(self, group_size: int) -> dict[str, int]:
        return {}

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        return Quantize()

    def torchao_config(self, group_size: int) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    def quantize(self, weight: "torch.Tensor", group_size: int | None) -> "torch.Tensor":
        from torchao.quantization import Int8Tensor, PerRow

        quantized: torch.Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
        return quantized

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        # At most half a step of max/127 in each column, of a row whose norm is at least its maximum.
        return 1.02 * math.sqrt(columns) / 254

    def dequantize(self, quantized: "torch.Tensor") -> "torch.Tensor":
        import torch

        return quantized.dequantize(torch.float32)  # type: ignore[call-arg]
