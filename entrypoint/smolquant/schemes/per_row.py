"""What schemes with one symmetric scale a row share: no options, any shape, and how the scale is found."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from smolquant.schemes.base import Decision, Quantize, Scheme, squared_norm

if TYPE_CHECKING:
    import torch


class ScaledByRow(Scheme):
    """A scheme whose every row has one scale, so that no group size and no number of columns matters."""

    stores_transposed: ClassVar = True

    def options(self, group_size: int) -> dict[str, int | str]:
        return {}

    def decide(self, rows: int, columns: int, group_size: int) -> Decision:
        return Quantize()


def granularity(*, transposed: bool) -> Any:
    """torchao's name for one scale a row; of a stack (E, K, N), for one a column of each matrix."""
    from torchao.quantization import PerRow

    return PerRow(dim=1) if transposed else PerRow()


class ScaledRows(NamedTuple):
    """Rows on their way to being stored."""

    values: "torch.Tensor"
    """(n, K) float32, a copy that may be changed."""
    squared_norm: float
    scale: "torch.Tensor"
    """(n, 1), in the dtype of the weight, as torchao computes it; a bfloat16 scale is a rounded one."""


def scaled_rows(weight: "torch.Tensor", largest_level: float) -> ScaledRows:
    """Find the scale with which each row's largest magnitude becomes ``largest_level``.

    Args:
        weight: (n, K), not changed.
    """
    import torch

    values = weight.to(torch.float32, copy=True)
    norm = squared_norm(values)
    # A maximum and a minimum take a fraction of the time of a maximum of magnitudes, which are a copy.
    largest = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
    return ScaledRows(values, norm, largest.to(weight.dtype).div_(largest_level))
