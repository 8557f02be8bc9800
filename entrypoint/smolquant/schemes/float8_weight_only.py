"""float8 weights (e4m3), one float32 scale a row; activations stay as they are."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

from smolquant.schemes.base import QuantizedRows, error_of, last_place, squared_norm
from smolquant.schemes.per_row import ScaledByRow, granularity, scaled_rows

if TYPE_CHECKING:
    import torch

_LARGEST = 448.0
"""The largest value of e4m3."""
_SMALLEST_NORMAL = 2.0**-6
_PLACES = 8
"""A scale of fewer places, the smallest numbers of its dtype, is off by more than 2^-4 of itself."""
_TO_ITS_LAST_PLACE = 1.5 * 2.0**20
"""What a power of two is multiplied by, so that float32 numbers of that size end where e4m3's numbers of
the power itself do: float32 has 23 bits of mantissa, e4m3 has three."""


class Float8WeightOnly(ScaledByRow):
    """torchao's ``Float8WeightOnlyConfig``: symmetric, per output row."""

    quant_type: ClassVar = "float8_weight_only"
    variant: ClassVar = "float8"
    title: ClassVar = "float8 weights, one scale per row"
    best_for: ClassVar = "GPUs, for weights of very different sizes within a row"
    loading: ClassVar = "stock transformers with torchao, on CPU and GPU"
    vllm_loads: ClassVar = True
    computes_as_stored: ClassVar = True
    # To multiply with a weight, torchao makes a float32 copy, scales it, and makes one in bfloat16.
    layer_memory: ClassVar = 5.0
    row_axes: ClassVar = {"qdata": 0, "scale": 0}
    arithmetic = "float8"

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig

        return (
            Float8WeightOnlyConfig(granularity=granularity(transposed=True))
            if transposed
            else Float8WeightOnlyConfig()
        )

    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        from torchao.quantization import Float8Tensor

        return zero_rows_as_zeros(
            Float8Tensor.from_hp(weight, granularity=granularity(transposed=transposed))
        )

    def quantize_rows(
        self,
        weight: "torch.Tensor",
        group_size: int | None,
        input_mean_squares: "torch.Tensor | None" = None,
    ) -> QuantizedRows:
        """torchao's arithmetic to the bit, several times as fast: nothing is converted back from float8.

        Source: ``_choose_scale_float8`` and ``_quantize_affine_float8`` of
        torchao.quantization.quant_primitives, as ``Float8Tensor.from_hp`` calls them.
        """
        import torch

        scaled, norm, scale = scaled_rows(weight, _LARGEST)
        scale = scale.float()
        if bool((scale < torch.finfo(weight.dtype).smallest_normal).any()):
            return self._quantize_narrow_rows(weight, norm)
        scaled.div_(scale)
        qdata = scaled.to(torch.float8_e4m3fn)
        error = torch.linalg.vector_norm(scaled.sub_(_rounded_to_float8(scaled)), dim=1)
        return QuantizedRows(
            {"qdata": qdata, "scale": scale}, squared_norm(error.mul_(scale.squeeze(1))), norm
        )

    def _quantize_narrow_rows(self, weight: "torch.Tensor", norm: float) -> QuantizedRows:
        """The same by torchao, for rows whose scale is zero or lacks digits: there it clamps values."""
        import torch

        quantized: Any = self.quantize(weight, None)
        error = quantized.dequantize(torch.float32).sub_(weight.float())
        parts = {part: getattr(quantized, part) for part in self.row_axes}
        too_small = parts["scale"].squeeze(1) < _PLACES * last_place(weight.dtype)
        lost = error_of(error, too_small)
        return QuantizedRows(parts, squared_norm(error), norm, without_bound=lost)

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        # A value that is normal in e4m3 has four significant bits, so rounding moves it by at most 2^-4 of
        # itself. What is smaller than 2^-6, after scaling, moves by at most half of the least step, 2^-10,
        # where the row's largest value is 448: 2^-10/448 of a row's norm at most, in each column. A scale
        # that is rounded to bfloat16 leaves the largest value within 2^-8 of 448, which is less than 2^-4
        # too. (Only a scale of fewer places than _PLACES is further off.)
        return 1.02 * math.hypot(2**-4, math.sqrt(columns) * 2**-10 / _LARGEST)


def zero_rows_as_zeros(quantized: Any) -> "torch.Tensor":
    """Store zeros in rows whose scale is zero, in place, where torchao divides by it and stores NaN.

    These rows are zeros, or too small for their dtype to hold their 448th part.

    Args:
        quantized: a ``Float8Tensor`` with a scale a row.
    """
    import torch

    quantized.qdata.view(torch.uint8).masked_fill_(quantized.scale == 0, 0)
    tensor: torch.Tensor = quantized
    return tensor


def _rounded_to_float8(scaled: "torch.Tensor") -> "torch.Tensor":
    """The values of e4m3 that are nearest to float32 ``scaled``, without leaving float32.

    Args:
        scaled: smaller than 464, from where on 448 is no longer what they round to.

    Converting from float8 takes eight times as long. Adding a number whose last place is worth as much as
    the value's would be in e4m3 makes the processor round to it, ties to even, as the conversion does.
    """
    import torch

    power = scaled.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=_SMALLEST_NORMAL)
    moved = torch.add(scaled, power, alpha=_TO_ITS_LAST_PLACE)
    return moved.sub_(power, alpha=_TO_ITS_LAST_PLACE)
