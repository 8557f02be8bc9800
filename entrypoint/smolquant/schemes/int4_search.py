"""The int4 grid of each group of columns that stands for the group's weights best, found without data.

Rounding to nearest spreads a group's 16 levels from its lowest to its highest value, and so lets two
outliers decide how coarse everything between them becomes. Here both ends are searched for: each
candidate range is fitted by least squares, and the best is rounded and fitted once more (a step of Lloyd's
algorithm for a grid of two parameters; further steps change nothing that a model would notice).

What an error does to a layer's output depends on its column: it is multiplied by that column's input.
Where something is known of how large the inputs are, the squared errors are weighted by it.

Two things matter more to a model than the last per cent of squared error, and are settled last. Least
squares shrinks: what it fits is smaller than the weights by the share of its error, in every layer in the
same direction. So the scale is set to where the error is orthogonal to the weights. And the zero point
is chosen for the scale as stored, rounded to the model's precision, so that a group keeps its mean.

The loops over a group's weights are in int4_search.c, and, for where that was not compiled, in
int4_search_in_torch.py: the same weights give the same bytes on every CPU.
"""

import ctypes
import itertools
import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from smolquant.schemes import int4_search_in_torch
from smolquant.schemes.base import last_place

_LIBRARY = Path(__file__).with_name("_int4_search.so")
"""int4_search.c, where smolquant was installed with its compiled code."""

LOWEST, HIGHEST = -8, 7
_STEPS = HIGHEST - LOWEST

_CUTS = (0.0, 0.5, 1.0, 1.5)
_RANGES = [cuts for cuts in itertools.product(_CUTS, _CUTS) if abs(cuts[0] - cuts[1]) <= 0.5]
"""How far a candidate range begins above the lowest and ends below the highest value, in steps of rounding
to nearest. Cutting deeper gives less squared error, and worse models: large weights matter. What cuts one
end much deeper than the other is a third of all pairs and is chosen where it hardly matters."""

_CUT_PRICE = 0.03
"""How much dearer a squared error is for each step that was cut to have it, for the same reason."""

_UNITS = 64
"""The units in a step of rounding to nearest. Weights are searched for as whole numbers of units, so that
the sums of level times weight, columns weighted, stay below 2^24, up to which float32 is exact."""

_MEAN_WEIGHT, _MOST_WEIGHT = 3, 16
"""How much a column counts, in whole numbers from 1 on. With more, few columns would decide where a group's
range ends. Rounding and the least weight add at most 1 to the mean; 256 columns of 4, at level 15 and
15 * 64 units, are what 2^24 holds."""

LEAST_SCALE = 2.0**-116
"""Below it, a group's values are told apart less finely than in :data:`_UNITS`, see LEAST_STEP in C."""

_LEAST_MEAN_SQUARE = 2.0**-117
"""The least share of a group's largest mean square; below it all columns count alike."""


def search_grids(
    weight: torch.Tensor, group_size: int, mean_squares: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose levels, scales and zero points, so that w is about level * scale + zero_point.

    Args:
        weight: (n, K), K a multiple of ``group_size``; bfloat16, float16 or float32.
        mean_squares: (K,), the mean square of each column's inputs in any unit; None where all are alike.

    Returns:
        (n, K) levels in [-8, 7], int8; scales and zero points, both (n, K / group_size) in the
        weight's dtype, the scales positive.
    """
    groups = weight.to("cpu", torch.float32).contiguous().view(-1, group_size)
    weights = _column_weights(weight.shape[1], group_size, mean_squares)
    levels, found = _search(groups, weights)
    wanted, mean, mean_level = found.unbind(1)
    scale = wanted.to(weight.dtype).clamp_(min=_least_scale(weight.dtype))
    stored = scale.float()
    exact_zero = mean - mean_level * stored
    zero_point = exact_zero.to(weight.dtype)
    # Far from zero a stored zero point may be steps away from where it should be.
    steps_away = (exact_zero - zero_point.float()).div_(stored).round_()
    if steps_away.count_nonzero():
        steps_away.clamp_(-_STEPS, _STEPS)
        levels.add_(steps_away.to(torch.int8).unsqueeze(1)).clamp_(LOWEST, HIGHEST)
    _suit_stored_scales(levels, groups, wanted, stored, zero_point.float())
    rows, device = len(weight), weight.device
    return (
        levels.view(weight.shape).to(device),
        scale.view(rows, -1).to(device),
        zero_point.view(rows, -1).to(device),
    )


def _suit_stored_scales(
    levels: torch.Tensor,
    groups: torch.Tensor,
    wanted: torch.Tensor,
    stored: torch.Tensor,
    zero_point: torch.Tensor,
) -> None:
    """Round again, in place, what was rounded for a scale that the dtype is far from having.

    That is so of weights near the smallest numbers of float16. Groups of equal values want no scale.
    """
    off = ((stored - wanted).abs() > wanted / _UNITS) & (wanted > LEAST_SCALE)
    if off.count_nonzero():
        steps = (groups[off] - zero_point[off].unsqueeze(1)).div_(stored[off].unsqueeze(1))
        levels[off] = steps.round_().clamp_(LOWEST, HIGHEST).to(torch.int8)


def _column_weights(
    columns: int, group_size: int, mean_squares: torch.Tensor | None
) -> torch.Tensor:
    """(K / group size, group size): how much each column counts in its group, in whole numbers."""
    if mean_squares is None:
        return torch.ones(columns // group_size, group_size, dtype=torch.float32, device="cpu")
    grouped = mean_squares.to("cpu", torch.float64).view(-1, group_size)
    # Whole numbers from here on, whose sum does not depend on the order either.
    parts = (grouped / grouped.amax(1, keepdim=True).clamp(min=_LEAST_MEAN_SQUARE) * 2**24).long()
    total = parts.sum(1, keepdim=True).clamp(min=1)
    weights = (2 * _MEAN_WEIGHT * group_size * parts + total) // (2 * total)
    return weights.clamp(1, _MOST_WEIGHT).float()


def _search(groups: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grids of ``groups``, (n, group size), whole rows of them.

    Args:
        weights: (groups of a row, group size), how much each column counts.

    Returns:
        (n, group size) levels, int8; and (n, 3), of each group the scale, the mean of its weights, and the
        mean of its levels.
    """
    # Whatever torch's defaults are: a model's own code may have changed them, and C trusts these.
    levels = torch.empty_like(groups, dtype=torch.int8)
    found = torch.empty(len(groups), 3, dtype=torch.float32, device="cpu")
    candidates = _candidates()
    groups_a_row, group_size = weights.shape
    assert len(groups) % groups_a_row == 0
    with _LOADING:
        compiled = _compiled()
    if compiled is None:
        int4_search_in_torch.search_rows(groups, weights, _UNITS, candidates, levels, found)
        return levels, found
    failed = compiled(
        groups.data_ptr(),
        len(groups) // groups_a_row,
        groups_a_row,
        group_size,
        weights.data_ptr(),
        _UNITS,
        candidates.data_ptr(),
        len(candidates),
        levels.data_ptr(),
        found.data_ptr(),
    )
    if failed:
        raise MemoryError
    return levels, found


def _least_scale(dtype: torch.dtype) -> float:
    """The smallest positive scale to store: a level divided by it must stay a number."""
    return max(last_place(dtype), torch.finfo(torch.float32).smallest_normal)


@cache
def _candidates() -> torch.Tensor:
    """(number of ranges, 3): factor and offset of level = units * factor + offset, with levels counted
    from 0, and how dear the error is that it leaves."""
    candidates = []
    for above_low, below_high in _RANGES:
        cut = above_low + below_high
        stretch = _STEPS / (_STEPS - cut)
        candidates.append((stretch / _UNITS, -above_low * stretch, 1 + _CUT_PRICE * cut))
    return torch.tensor(candidates, dtype=torch.float32, device="cpu")


_LOADING = threading.Lock()
"""Held while it is found out, so that several threads, which quantize at once, say it once."""


@cache
def _compiled() -> Callable[..., int] | None:
    """``smolquant_int4_search_rows`` of int4_search.c, which runs without Python's lock.

    None where it was never compiled, or from another version's source; that is said, once.
    """
    try:
        search = ctypes.CDLL(str(_LIBRARY)).smolquant_int4_search_rows
    except (OSError, AttributeError):
        logging.getLogger("smolquant").warning(
            "smolquant was installed without its compiled code, so torch searches for int4 weights: the "
            "same bytes, several times as slow. A wheel for this platform, or an installation from source "
            "with a C compiler, has it."
        )
        return None
    pointer, length = ctypes.c_void_p, ctypes.c_int
    sizes, candidates = (ctypes.c_int64, length, length), (pointer, length)
    search.argtypes = (pointer, *sizes, pointer, ctypes.c_float, *candidates, pointer, pointer)
    search.restype = length
    compiled: Callable[..., int] = search
    return compiled
