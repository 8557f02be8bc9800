"""int4 weights in groups of columns, each with a scale and a zero point, in torchao's plain layout.

The plain layout is the one that means the same on every machine. Packing for a kernel depends on the
CPU (AVX2 and AVX512 differ) and is left to the moment of loading, see :mod:`smolquant.runtime.kernels`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from smolquant.schemes.base import (
    GROUP_SIZES,
    Decision,
    Keep,
    Quantize,
    QuantizedRows,
    Scheme,
    error_of,
    last_place,
    squared_norm,
)

if TYPE_CHECKING:
    import torch

    from smolquant.schemes.int4_gptq import ErrorFeedback

_MIDPOINT = 8
"""tinygemm counts levels from 0 to 15, ``Int4Tensor`` from -8 to 7: w = (level - 8) * scale + zero."""

_HIGHEST = 15
_LEAST_SCALE = 1e-6
"""torchao's, so that a group of equal values does not divide by zero."""

_PLACES = 64
"""A scale of fewer places, the smallest numbers of its dtype, is further off than a rounded one ever is."""

_CALIBRATED = "slow; on SmolLM2-135M it kept the increase to a quarter of that by search"

Int4Method = Literal["search", "calibrated", "rtn"]
INT4_METHODS: tuple[Int4Method, ...] = get_args(Int4Method)
DEFAULT_INT4_METHOD: Int4Method = "search"


def _bits(group_size: int) -> str:
    """Of a weight: four, and its share of the group's scale and zero point, 16 each."""
    return f"{4 + 32 / group_size:g}"


class Int4WeightOnly(Scheme):
    """Stored as ``Int4Tensor``, with levels and scales found by one of three methods.

    ``search`` looks for the grid that serves each group best, see
    :mod:`smolquant.schemes.int4_search`; ``rtn`` rounds to nearest with torchao's tinygemm parameters.
    ``calibrated`` needs a weight's inputs, so calibration finds the levels beforehand; a weight by itself,
    which the text never came to, is searched for.
    """

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
    stock_loads: ClassVar = False
    caution: ClassVar = "Stock transformers alone cannot run int4 on a CPU: load it with smolquant."
    in_both: ClassVar = True
    computes_as_stored: ClassVar = True
    stores_transposed: ClassVar = True
    keeps_orientation: ClassVar = (
        False  # a group lies along the inputs, which the kernels want last
    )
    row_axes: ClassVar = {"qdata": 0, "scale": 1, "zero_point": 1}

    def __init__(
        self, method: Int4Method = DEFAULT_INT4_METHOD, *, calibration: str | None = None
    ) -> None:
        """``calibration``: the sha256 of the text, where one decides the bytes."""
        self.method = method
        self.calibration_sha256 = calibration
        self.weighs_columns = method == "search"
        self.arithmetic = f"int4 by {method}"

    def options(self, group_size: int) -> dict[str, int | str]:
        options: dict[str, int | str] = {"group_size": group_size, "int4_method": self.method}
        if self.calibration_sha256 is not None:
            options["calibration_sha256"] = self.calibration_sha256
        return options

    def gentler(self, group_size: int) -> tuple[str, ...]:
        least = GROUP_SIZES[0]
        calibrated = f"--int4-method calibrated ({_CALIBRATED})"
        smaller = (
            f"--group-size {least} ({_bits(least)} bits a weight instead of {_bits(group_size)})"
        )
        return (
            *((calibrated,) if self.method != "calibrated" else ()),
            *((smaller,) if group_size > least else ()),
        )

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        fitting = [size for size in GROUP_SIZES if size <= group_size and columns % size == 0]
        if not fitting:
            return Keep(f"{columns} columns are not a multiple of {GROUP_SIZES[0]}")
        if max(fitting) == group_size:
            return Quantize(group_size)
        return Quantize(max(fitting), f"{columns} columns are not a multiple of {group_size}")

    def torchao_config(self, group_size: int, *, transposed: bool = False) -> Any:
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=group_size)

    def quantize(
        self, weight: "torch.Tensor", group_size: int | None, *, transposed: bool = False
    ) -> "torch.Tensor":
        import torch
        from torchao.quantization import Int4Tensor

        assert group_size is not None
        weight = weight.mT if transposed else weight
        # On the meta device there are only shapes, which every method shares.
        find = _round if self.method == "rtn" or weight.is_meta else _search
        grid = find(weight.reshape(-1, weight.shape[-1]), group_size)
        levels, scale, zero = (part.view(*weight.shape[:-1], -1) for part in grid)
        quantized: torch.Tensor = Int4Tensor(
            **_parts(levels, scale, zero),
            block_size=[1] * (weight.ndim - 1) + [group_size],
            shape=weight.shape,
        )
        return quantized

    def quantize_rows(
        self,
        weight: "torch.Tensor",
        group_size: int | None,
        input_mean_squares: "torch.Tensor | None" = None,
    ) -> QuantizedRows:
        """Without torchao's slower arithmetic, and by search with columns weighted."""
        assert group_size is not None
        grid = self.find_grid(weight, group_size, input_mean_squares)
        return stored_rows(weight, *grid, least_scale=self._least_scale)

    def find_grid(
        self,
        weight: "torch.Tensor",
        group_size: int,
        input_mean_squares: "torch.Tensor | None" = None,
    ) -> "Grid":
        """The levels, scales and zero points of :meth:`quantize_rows`, before they are packed."""
        if self.method == "rtn":
            return _round(weight, group_size)
        return _search(weight, group_size, input_mean_squares)

    def max_relative_error(self, columns: int, group_size: int | None) -> float:
        # At most half a step of (high - low)/15 in each column, of a group whose norm is at least that
        # of its two ends, (high - low)/sqrt(2).
        assert group_size is not None
        by_rounding = 1.02 * math.sqrt(2 * group_size) / 30
        # Calibration moves weights by more than half a step to make good for others, and no bound of how
        # far follows from the weights alone. Zeros in their place would be an error of 1.
        return min(1.0, 2 * by_rounding) if self.method == "calibrated" else by_rounding

    @property
    def _least_scale(self) -> float:
        """What a method has no smaller scales than."""
        from smolquant.schemes.int4_search import LEAST_SCALE

        return _LEAST_SCALE if self.method == "rtn" else LEAST_SCALE

    def feedback(self, moments: "torch.Tensor") -> "ErrorFeedback":
        from smolquant.schemes.int4_gptq import ErrorFeedback

        return ErrorFeedback.of(moments)

    def calibrate(
        self, weight: "torch.Tensor", group_size: int | None, feedback: "ErrorFeedback"
    ) -> "tuple[dict[str, torch.Tensor], torch.Tensor]":
        from smolquant.schemes.int4_gptq import gptq_grids
        from smolquant.schemes.int4_packing import pack_int4

        assert group_size is not None
        levels, scale, zero_point = gptq_grids(weight, feedback, group_size)
        parts = {"qdata": pack_int4(levels), "scale": scale, "zero_point": zero_point}
        return parts, values_of(levels, scale, zero_point)

    def stored_rows(
        self, weight: "torch.Tensor", parts: "Mapping[str, torch.Tensor]"
    ) -> QuantizedRows:
        from smolquant.schemes.int4_packing import unpack_int4

        levels = unpack_int4(parts["qdata"])
        grid = (levels, parts["scale"], parts["zero_point"])
        return stored_rows(weight, *grid, least_scale=self._least_scale)

    def calibration_bytes(self, rows: int, columns: int) -> int:
        from smolquant.schemes.int4_gptq import working_bytes

        return working_bytes(rows, columns)


Grid = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""(n, K) levels in [-8, 7], int8, and (n, K / group size) scales and zero points in the weight's dtype."""


def stored_rows(
    weight: "torch.Tensor",
    levels: "torch.Tensor",
    scale: "torch.Tensor",
    zero_point: "torch.Tensor",
    *,
    least_scale: float = 0.0,
) -> QuantizedRows:
    """A grid that was found for ``weight`` as it is stored, and its error."""
    parts = _parts(levels, scale, zero_point)
    exact = weight.float()
    error = values_of(levels, scale, zero_point).sub_(exact)
    lost = _error_of_tiny_groups(error, exact, scale, least_scale)
    return QuantizedRows(parts, squared_norm(error), squared_norm(exact), without_bound=lost)


def _error_of_tiny_groups(
    error: "torch.Tensor", exact: "torch.Tensor", scale: "torch.Tensor", least_scale: float
) -> float:
    """The squared error of groups in which no value is as large as the grid of the least scale."""
    least = max(1.01 * least_scale, _PLACES * last_place(scale.dtype))
    tiny = (scale <= least).view(-1)
    if not bool(tiny.any()):
        return 0.0
    groups = exact.view(len(tiny), -1)
    tiny[tiny.clone()] = groups[tiny].abs().amax(1) < (_HIGHEST + 1) * least
    return error_of(error.view(groups.shape), tiny)


def values_of(
    levels: "torch.Tensor", scale: "torch.Tensor", zero_point: "torch.Tensor"
) -> "torch.Tensor":
    """What a grid stands for: the float32 (n, K) weight."""
    grouped = levels.float().view(*scale.shape, -1)
    grouped.mul_(scale.float().unsqueeze(2)).add_(zero_point.float().unsqueeze(2))
    return grouped.view(levels.shape)


def _search(
    weight: "torch.Tensor", group_size: int, input_mean_squares: "torch.Tensor | None" = None
) -> Grid:
    from smolquant.schemes.int4_search import search_grids

    return search_grids(weight, group_size, input_mean_squares)


def _round(weight: "torch.Tensor", group_size: int) -> Grid:
    """Round to nearest as torchao does, to the bit, in place and several times as fast.

    Source: ``_choose_qparams_affine_tinygemm`` and ``_quantize_affine_tinygemm`` of
    torchao.quantization.quant_primitives, with a zero point of floating point.
    """
    import torch

    grouped = weight.view(len(weight), -1, group_size)
    exact = grouped.float()
    low, high = exact.amin(2, keepdim=True), exact.amax(2, keepdim=True)
    # In the weight's own dtype from here, as theirs, because each step rounds to it.
    low, high = low.to(weight.dtype), high.to(weight.dtype)
    scale = high.sub_(low).div_(_HIGHEST).clamp_(min=_LEAST_SCALE)
    zero = low.add_(scale * _MIDPOINT)
    levels = grouped.sub(zero - scale * _MIDPOINT).div_(scale).float().round_()
    levels.clamp_(0, _HIGHEST).sub_(_MIDPOINT)
    return levels.to(torch.int8).view(weight.shape), scale.squeeze(2), zero.squeeze(2)


def _parts(
    levels: "torch.Tensor", scale: "torch.Tensor", zero_point: "torch.Tensor"
) -> dict[str, "torch.Tensor"]:
    """A grid as ``Int4Tensor`` stores it."""
    from smolquant.schemes.int4_packing import pack_int4

    return {
        "qdata": pack_int4(levels),
        "scale": scale.mT.contiguous(),
        "zero_point": zero_point.mT.contiguous(),
    }
