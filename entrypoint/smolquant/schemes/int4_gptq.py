"""int4 levels chosen with the inputs that a weight meets in view: GPTQ, https://arxiv.org/abs/2210.17323.

Rounding moves a weight; what that does to the layer's outputs depends on its inputs, and most of it can be
made good by the weights that are not rounded yet. So columns are rounded one after another, and each one's
error is taken out of those that follow, as the inputs' second moments say. The grids are those of
:mod:`smolquant.schemes.int4_search`, found beforehand for the columns' inputs: so columns may come in any
order without their groups being torn apart, and those that carry most of the input come first, while most
can be adjusted.

torchao has GPTQ (torchao.prototype.gptq), which does not serve: it runs on CUDA only, takes its grids from
mslk (rounding to nearest), goes through the columns in their own order, and observes a model that is in
memory as a whole. Its AWQ keeps every module's inputs in memory, and stores one more tensor a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from smolquant.schemes.int4_search import HIGHEST, LOWEST, search_grids

_DAMPING = 0.01
"""Added to the moments' diagonal, in units of its mean (the paper's): inputs that the text happens not to
have are not free to be anything."""

_COLUMNS = 128
"""Columns whose errors are carried on together, as a matrix product."""

_ROWS = 1024
"""Rows at a time, for the sake of memory; they do not depend on each other."""


def working_bytes(rows: int, columns: int) -> int:
    """Memory that a weight's factor and levels take, and what is needed to find them; a bound."""
    factor = 3 * columns * columns
    return 4 * (factor + 6 * min(rows, _ROWS) * columns + 3 * rows * columns)


@dataclass(frozen=True)
class ErrorFeedback:
    """The factors by which later columns make good earlier errors, for all weights with these inputs."""

    order: torch.Tensor
    """(K,) columns in the order in which they are rounded."""
    factor: torch.Tensor
    """(K, K) float32, upper triangular: the Cholesky factor of the inverse moments, in that order."""
    mean_squares: torch.Tensor
    """(K,) sum of squares of each column's inputs."""

    @classmethod
    def of(cls, moments: torch.Tensor) -> "ErrorFeedback":
        """Factorize; takes memory for three more (K, K) while it runs.

        Args:
            moments: (K, K) float32, the sum of x x^T over the inputs x; not changed.

        Raises:
            ValueError: they are not finite.
        """
        diagonal = moments.diagonal()
        mean = diagonal.mean()
        if not bool(torch.isfinite(moments.sum())):
            raise ValueError("the inputs' second moments are not finite")
        order = torch.argsort(diagonal, descending=True, stable=True)
        # With the columns in reverse, the factor is the inverse of a Cholesky factor: one decomposition
        # and one inversion of a triangle, where the paper takes two and a full inverse.
        backwards = order.flip(0)
        damping = _DAMPING
        while True:
            damped = moments[backwards][:, backwards]
            damped.diagonal().add_(mean * damping + torch.finfo(mean.dtype).tiny)
            with one_thread():
                lower, failure = torch.linalg.cholesky_ex(damped)
            del damped
            if not failure:
                break
            damping *= 10  # ends: what is mostly diagonal can always be factorized
        unit = torch.eye(len(lower), device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, unit, upper=False, out=unit)
        return cls(order, inverse.flip(0, 1), diagonal.clone())


def gptq_grids(
    weight: torch.Tensor, feedback: ErrorFeedback, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose levels, scales and zero points, so that w x is about (level * scale + zero_point) x.

    Args:
        weight: (n, K), K a multiple of ``group_size``; bfloat16, float16 or float32.

    Returns:
        As :func:`smolquant.schemes.int4_search.search_grids`, whose scales and zero points these are,
        with columns weighted by their inputs.
    """
    parts = []
    for rows in torch.split(weight, _ROWS):
        _, scale, zero_point = search_grids(rows, group_size, feedback.mean_squares)
        levels = _round_sequentially(rows, scale.float(), zero_point.float(), feedback, group_size)
        parts.append((levels, scale, zero_point))
    levels, scale, zero_point = (torch.cat(part) for part in zip(*parts, strict=True))
    return levels, scale, zero_point


@contextmanager
def one_thread() -> Iterator[None]:
    """Let LAPACK not split work by threads, so that the bytes do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _round_sequentially(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    feedback: ErrorFeedback,
    group_size: int,
) -> torch.Tensor:
    """(n, K) levels; ``scale`` and ``zero_point`` are (n, K / group size)."""
    order, factor = feedback.order, feedback.factor
    groups = order // group_size
    # Columns lie along the first axis here, so that each is one run of memory.
    wanted = weight.float()[:, order].t().contiguous()
    levels = torch.empty_like(wanted)
    for begin in range(0, len(wanted), _COLUMNS):
        block = slice(begin, begin + _COLUMNS)
        errors = _round_block(
            wanted[block],
            levels[block],
            scale.t()[groups[block]],
            zero_point.t()[groups[block]],
            factor[block, block],
        )
        later = slice(begin + _COLUMNS, None)
        wanted[later].addmm_(factor[block, later].t(), errors, alpha=-1)
    in_place = torch.empty_like(levels)
    in_place[order] = levels
    return in_place.t().to(torch.int8).contiguous()


def _round_block(
    wanted: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """Round columns one after another into ``levels``; all are (columns, n), ``wanted`` is used up.

    Returns:
        The columns' errors, each in units of its own diagonal element of ``factor``.
    """
    errors = torch.empty_like(wanted)
    for column in range(len(wanted)):
        level, error = levels[column], errors[column]
        torch.sub(wanted[column], zero_point[column], out=level)
        level.div_(scale[column]).round_().clamp_(LOWEST, HIGHEST)
        torch.addcmul(zero_point[column], level, scale[column], out=error)
        torch.sub(wanted[column], error, out=error).div_(factor[column, column])
        wanted[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return errors
