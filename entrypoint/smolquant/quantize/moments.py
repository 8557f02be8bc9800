"""Second moments of what weights are given, added up in an order that never changes."""

import torch

_TOKENS_AT_ONCE = 512
"""Fixed, like everything that orders the arithmetic: the same inputs give the same bytes."""


def add_moments(moments: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """The sum of x x^T over more inputs x, in place.

    Args:
        moments: (K, K) float32 that was added up before; None at first.
        inputs: (..., K).
    """
    columns = inputs.shape[-1]
    if moments is None:
        moments = torch.zeros(columns, columns, device=inputs.device)
    for some in torch.split(inputs.reshape(-1, columns), _TOKENS_AT_ONCE):
        exact = some.float()
        moments.addmm_(exact.t(), exact)
    return moments
