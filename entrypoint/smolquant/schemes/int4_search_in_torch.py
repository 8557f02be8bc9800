"""The loops of int4_search.c in torch, to the bit, for where they were not compiled.

Every sum is of whole numbers that its type holds exactly, so its order is free; everything else is rounded
operation by operation in the order of the C code. An operation that torch might fuse with the next
(``addcmul``, ``add`` with an ``alpha``) or compute as a product with an inverse would give other bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_TOP = 15.0
_LOWEST = -8
_LEAST_STEP = 2.0**-117
_LARGE = 3.0 * 2**22
"""Added to a value and taken off again, it leaves the nearest whole number, ties to even."""

_BLOCK_ELEMENTS = 1 << 17
"""Weights that are searched for at a time, so that what is made of them stays in the CPU's caches."""


@dataclass(frozen=True)
class _Groups:
    """Groups of some rows, (rows, groups a row, size), and what is known of each, (…, 1)."""

    units: torch.Tensor
    """float32 whole numbers: value = low + units * unit."""
    low: torch.Tensor
    unit: torch.Tensor
    weights: torch.Tensor
    """float32 whole numbers, (groups a row, size)."""
    total_weight: torch.Tensor
    total_units: torch.Tensor
    """float64, weighted."""
    variance: torch.Tensor
    """float64, times the square of ``total_weight``."""


@dataclass(frozen=True)
class _Moments:
    """What a choice of levels explains of each group, float64, as ``moments`` in int4_search.c."""

    levels: torch.Tensor
    with_units: torch.Tensor
    with_itself: torch.Tensor


def search_rows(
    groups: torch.Tensor,
    weights: torch.Tensor,
    units_a_step: float,
    candidates: torch.Tensor,
    levels: torch.Tensor,
    found: torch.Tensor,
) -> None:
    """Do what ``smolquant_int4_search_rows`` does, which int4_search.c describes.

    Args:
        groups: (n, size) float32, whole rows of them.
        weights: (groups a row, size) float32 whole numbers.
        candidates: (count, 3) float32.
        levels: (n, size) int8, filled in.
        found: (n, 3) float32, filled in.
    """
    rows = groups.view(-1, *weights.shape)
    for some in _blocks(len(rows), _BLOCK_ELEMENTS // weights.numel()):
        chosen, of_groups = _search(_read(rows[some], weights, units_a_step), candidates.tolist())
        levels.view(rows.shape)[some] = chosen
        found.view(len(rows), -1, 3)[some] = of_groups


def _blocks(rows: int, at_most: int) -> Iterator[slice]:
    size = max(1, at_most)
    return (slice(start, start + size) for start in range(0, rows, size))


def _read(values: torch.Tensor, weights: torch.Tensor, units_a_step: float) -> _Groups:
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    unit = high.sub_(low).div_(_TOP).clamp_(min=_LEAST_STEP).div_(units_a_step)
    units = _rounded((values - low).mul_(torch.ones_like(unit).div_(unit)))
    total_weight = _sum(weights.double())
    weighted = (units * weights).double()
    total_units = _sum(weighted)
    squares = _sum(weighted.mul_(units))
    variance = (total_weight * squares).sub_(total_units * total_units)
    return _Groups(units, low, unit, weights, total_weight, total_units, variance)


def _search(
    groups: _Groups, candidates: list[tuple[float, float, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., size) int8 levels, and (..., 3) float32: scale, mean of the values, mean of the levels."""
    best = _best_of(groups, candidates)
    slope = torch.ones_like(groups.variance)
    for _ in range(2):
        slope = torch.where(best.with_units > 0, best.with_units / best.with_itself, slope)
        factor = torch.ones_like(slope).div_(slope).float()
        offset = (best.levels - groups.total_units / slope).div_(groups.total_weight).float()
        levels = _levels_of(groups, factor, offset)
        best = _moments_of(groups, levels)
    slope = torch.where(best.with_units > 0, groups.variance / best.with_units, slope)
    scale = (slope * groups.unit).float()
    mean = (groups.total_units / groups.total_weight).float().mul_(groups.unit).add_(groups.low)
    mean_level = (best.levels / groups.total_weight).add_(_LOWEST).float()
    return levels.to(torch.int8).add_(_LOWEST), torch.cat([scale, mean, mean_level], 2)


def _best_of(groups: _Groups, candidates: list[tuple[float, float, float]]) -> _Moments:
    least = torch.full_like(groups.variance, torch.finfo(torch.float64).max)
    zero = torch.zeros_like(least)
    best = _Moments(zero, zero, zero)
    for factor, offset, dearness in candidates:
        tried = _moments_of(groups, _levels_of(groups, factor, offset))
        explained = (tried.with_units * tried.with_units).div_(tried.with_itself)
        explained = torch.where(tried.with_itself > 0, explained, zero)
        price = (groups.variance - explained).mul_(dearness)
        better = price < least
        least = torch.where(better, price, least)
        best = _Moments(
            torch.where(better, tried.levels, best.levels),
            torch.where(better, tried.with_units, best.with_units),
            torch.where(better, tried.with_itself, best.with_itself),
        )
    return best


def _levels_of(
    groups: _Groups, factor: torch.Tensor | float, offset: torch.Tensor | float
) -> torch.Tensor:
    """From 0 to 15, float32; numbers of Python's have to be float32's, too."""
    return _rounded((groups.units * factor).add_(offset)).clamp_(0, _TOP)


def _moments_of(groups: _Groups, levels: torch.Tensor) -> _Moments:
    weighted = levels * groups.weights
    total = _sum(weighted).double()
    squares = _sum(weighted * levels).double()
    products = _sum(weighted.mul_(groups.units)).double()
    return _Moments(
        total,
        (groups.total_weight * products).sub_(total * groups.total_units),
        (groups.total_weight * squares).sub_(total * total),
    )


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """In place."""
    return values.add_(_LARGE).sub_(_LARGE)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(-1, keepdim=True)
