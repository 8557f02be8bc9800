"""The int4 grid of each group of columns that stands for the group's weights best, found without data.

Rounding to nearest spreads a group's 16 levels from its lowest to its highest value, and so lets two
outliers decide how coarse everything between them becomes. Here both ends are searched for: each
candidate range is fitted by least squares, and the best is rounded and fitted once more (a step of Lloyd's
algorithm for a grid of two parameters; further steps change nothing that a model would notice).

Two things matter more to a model than the last per cent of squared error, and are settled last. Least
squares shrinks: what it fits is smaller than the weights by the share of its error, in every layer in the
same direction. So the scale is set to where the error is orthogonal to the weights. And the zero point
is chosen for the scale as stored, rounded to the model's precision, so that a group keeps its mean.

Arithmetic is elementwise float32 with sums within groups: a row's result depends on that row alone.
"""

import itertools

import torch

LOWEST, HIGHEST = -8, 7
_STEPS = HIGHEST - LOWEST

_CUTS = (0.0, 0.5, 1.0, 1.5)
_RANGES = [cuts for cuts in itertools.product(_CUTS, _CUTS) if abs(cuts[0] - cuts[1]) <= 0.5]
"""How far a candidate range begins above the lowest and ends below the highest value, in steps of rounding
to nearest. Cutting deeper gives less squared error, and worse models: large weights matter. What cuts one
end much deeper than the other is a third of all pairs and is chosen where it hardly matters."""

_CHUNK = 1 << 17
"""Weights at a time: few enough for the cache, enough to make the interpreter's share of the time small."""


def search_grids(
    weight: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose levels, scales and zero points, so that w is about level * scale + zero_point.

    Args:
        weight: (n, K), K a multiple of ``group_size``; bfloat16, float16 or float32.

    Returns:
        (n, K) levels in [-8, 7], float32; scales and zero points, both (n, K / group_size) in the
        weight's dtype, the scales positive.
    """
    rows, columns = weight.shape
    chunks = [
        _Groups(chunk.reshape(-1, group_size)).search()
        for chunk in torch.split(weight, max(1, _CHUNK // columns))
    ]
    levels, scale, zero_point = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return levels.view(rows, columns), scale.view(rows, -1), zero_point.view(rows, -1)


class _Groups:
    """Groups of weights, (n, group size), and the grids that are tried on them.

    Values are in units in which rounding to nearest rounds to the integers from -8 to 7, so that a
    candidate range is the same two numbers in every group.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self._weight = weight.float()
        self._size = weight.shape[1]
        self._low, high = torch.aminmax(self._weight, dim=1, keepdim=True)
        step = high.sub_(self._low).div_(_STEPS)
        # A group of equal values has no step; whatever it is given, its values are the lowest level.
        self._step = torch.where(step > 0, step, torch.finfo(torch.float32).tiny)
        self._values = (self._weight - self._low).div_(self._step).add_(LOWEST)
        self._mean = self._values.mean(1, keepdim=True)
        self._levels = torch.empty_like(self._values)
        self._product = torch.empty_like(self._values)

    def search(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Levels (n, group size), scales and zero points (n, 1)."""
        slope, offset = self._best_candidate()
        self._round(slope, offset)
        slope, offset, _ = self._fit(*self._moments())
        self._round(slope, offset)
        slope = self._unshrunk(slope, *self._moments())
        scale = (slope * self._step).to(self._dtype).clamp_(min=_least_scale(self._dtype))
        stored = scale.float()
        offset = self._mean - self._levels.mean(1, keepdim=True).mul_(stored / self._step)
        exact = offset.sub_(LOWEST).mul_(self._step).add_(self._low)
        zero_point = exact.to(self._dtype)
        # Far from zero a stored zero point may be steps away from where it should be.
        steps_away = (exact - zero_point.float()).div_(stored).round_()
        self._levels.add_(steps_away).clamp_(LOWEST, HIGHEST)
        return self._levels, scale, zero_point

    def _best_candidate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The fit of the range that leaves the least squared error; (n, 1) slopes and offsets."""
        moments = []
        for above_low, below_high in _RANGES:
            factor = _STEPS / (_STEPS - above_low - below_high)
            zero = torch.tensor(LOWEST - (LOWEST + above_low) * factor)
            torch.add(zero, self._values, alpha=factor, out=self._levels)
            self._levels.round_().clamp_(LOWEST, HIGHEST)
            moments.append(self._moments())
        fits = self._fit(*(torch.stack(parts) for parts in zip(*moments, strict=True)))
        slopes, offsets, explained = fits
        best = explained.argmax(0, keepdim=True)
        return slopes.gather(0, best)[0], offsets.gather(0, best)[0]

    def _round(self, slope: torch.Tensor, offset: torch.Tensor) -> None:
        torch.sub(self._values, offset, out=self._levels)
        self._levels.div_(slope).round_().clamp_(LOWEST, HIGHEST)

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per group, of the levels: mean, mean square, and mean product with the values."""
        mean = self._levels.mean(1, keepdim=True)
        square = torch.mul(self._levels, self._levels, out=self._product).mean(1, keepdim=True)
        mixed = torch.mul(self._levels, self._values, out=self._product).mean(1, keepdim=True)
        return mean, square, mixed

    def _fit(
        self, mean: torch.Tensor, square: torch.Tensor, mixed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The line from levels to values by least squares: slope, offset, and variance explained."""
        covariance, variance = mixed - mean * self._mean, square - mean * mean
        slope = torch.where(covariance > 0, covariance / variance, 1.0)
        return slope, self._mean - slope * mean, slope * covariance

    def _unshrunk(
        self, slope: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, mixed: torch.Tensor
    ) -> torch.Tensor:
        """The slope that leaves an error orthogonal to the values, where there is one."""
        covariance = mixed - mean * self._mean
        squares = torch.mul(self._values, self._values, out=self._product).mean(1, keepdim=True)
        spread = squares - self._mean * self._mean
        return torch.where(covariance > 0, spread / covariance, slope)


def _least_scale(dtype: torch.dtype) -> float:
    """The smallest positive scale to store: a level divided by it must stay a number."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
