"""int8 weights, one float32 scale a row; activations stay as they are."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.base import QuantizedRows, error_of, last_place, squared_norm
from smolquant.schemes.per_row import ScaledByRow, granularity, scaled_rows

if TYPE_CHECKING:
    import torch

_LOWEST, _STEPS = -128, 255
"""The levels of int8."""

_LEAST_SCALE = 2.0**-23
"""torchao's, the eps of float32. A row whose largest value is below 1.5e-5 loses levels to it, and below
6e-8 all of them."""

_PLACES = 64
"""A scale of fewer places is further off than rounding it to a dtype's mantissa ever is; only float16,
whose numbers below 6e-5 have fewer and fewer digits, comes to that."""


class Int8WeightOnly(ScaledByRow):
    """torchao's ``Int8WeightOnlyConfig``: symmetric, per output row."""

    quant_type: ClassVar = "int8_weight_only"
    variant: ClassVar = "int8"
    title: ClassVar = "int8 weights, one scale per row"
    best_for: ClassVar = "GPUs, and wherever closeness to the source counts more than size"
    loading: ClassVar = "stock transformers with torchao, on CPU and GPU"
    vllm_loads: ClassVar = True
    in_both: ClassVar = True
    stores_tables: ClassVar = True
    row_axes: ClassVar = {"qdata": 0, "scale": 0, "zero_point": 0}
    arithmetic = "int8"

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(granularity=granularity(transposed=transposed))

    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        from torchao.quantization import Int8Tensor

        quantized: torch.Tensor = Int8Tensor.from_hp(
            weight, granularity=granularity(transposed=transposed)
        )
        return quantized

    def quantize_rows(
        self,
        weight: "torch.Tensor",
        group_size: int | None,
        input_mean_squares: "torch.Tensor | None" = None,
    ) -> QuantizedRows:
        """torchao's arithmetic to the bit, six times as fast: no kernel sees two dtypes at once.

        Source: ``choose_qparams_affine`` (symmetric) and ``quantize_affine`` of
        torchao.quantization.quant_primitives, as ``Int8Tensor.from_hp`` calls them.
        """
        import torch

        scaled, norm, scale = scaled_rows(weight, _STEPS / 2)
        too_small = scale < max(_LEAST_SCALE, _PLACES * last_place(weight.dtype))
        scale = scale.clamp_(min=_LEAST_SCALE).float()
        scaled.mul_(1.0 / scale)
        levels = scaled.round().clamp_(_LOWEST, _LOWEST + _STEPS)
        error = scaled.sub_(levels).mul_(scale)
        parts = {
            "qdata": levels.to(torch.int8),
            "scale": scale,
            "zero_point": torch.zeros_like(scale, dtype=torch.int8),
        }
        lost = error_of(error, too_small.squeeze(1))
        return QuantizedRows(parts, squared_norm(error), norm, without_bound=lost)

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        # At most half a step of max/127 in each column, of a row whose norm is at least its maximum.
        return 1.02 * math.sqrt(columns) / 254
