"""Calibrates a stack of experts: each on the tokens that were routed to it.

A stack is no module with an input of its own. So the calls that transformers' plain loop makes are
watched: which matrix it takes out of a stack, and what it multiplies that with. An expert that too few
tokens reach is searched for by itself, as without a text.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from smolquant.quantize.moments import add_moments
from smolquant.quantize.planned import PlannedTensor
from smolquant.schemes import Quantize, Scheme

LEAST_TOKENS = 32
"""Routed to an expert; from fewer, nothing is learned of most of its columns."""


class RoutedInputs(TorchFunctionMode):
    """What each expert of some stacks is given, while this is entered."""

    def __init__(self, stacks: Mapping[str, torch.Tensor]) -> None:
        """``stacks``: name -> (E, N, K), the very tensors that the model holds."""
        super().__init__()
        self._names = {id(stack): name for name, stack in stacks.items()}
        self._matrices: dict[int, tuple[torch.Tensor, str, int]] = {}
        """Identity of a matrix that was taken out -> itself, which keeps it, and its stack and number."""
        self._inputs: dict[tuple[str, int], list[torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            name = self._names.get(id(args[0]))
            if name is not None and result.ndim == 2:
                self._matrices[id(result)] = (result, name, operator.index(args[1]))
        elif func is functional.linear and id(args[1]) in self._matrices:
            _, name, number = self._matrices[id(args[1])]
            self._inputs.setdefault((name, number), []).append(args[0])
        return result

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)  # type: ignore[no-untyped-call]
        self._matrices.clear()

    def moments(self, name: str, number: int) -> torch.Tensor | None:
        """(K, K) float32, the second moments of an expert's inputs; None where they are too few.

        The inputs are given away.
        """
        inputs = self._inputs.pop((name, number), [])
        if sum(map(len, inputs)) < LEAST_TOKENS:
            return None
        return add_moments(None, torch.cat(inputs))


def calibrate_stack(
    scheme: Scheme, stack: torch.Tensor, planned: PlannedTensor, inputs: RoutedInputs
) -> tuple[dict[str, torch.Tensor], int]:
    """Find every expert of a stack.

    Args:
        stack: (E, N, K); the experts that are found from their inputs are replaced in it by what they were
            found to be.

    Returns:
        The stored parts, whose rows are those of all experts, one after another; and how many experts were
        searched for without inputs.

    Raises:
        ValueError: an expert's inputs are not finite.
    """
    assert isinstance(planned.decision, Quantize)
    group_size = planned.decision.group_size
    found: dict[str, list[torch.Tensor]] = {}
    searched = 0
    for number in range(len(stack)):
        weight = stack[number].to(planned.dtype)
        moments = inputs.moments(planned.name, number)
        if moments is None:
            searched += 1
            parts = _searched(scheme, weight, group_size)
        else:
            parts, stands_for = scheme.calibrate(weight, group_size, scheme.feedback(moments))
            stack[number].copy_(stands_for)
        for part, rows in parts.items():
            found.setdefault(part, []).append(rows.contiguous().cpu())
    return {part: torch.cat(rows) for part, rows in found.items()}, searched


def _searched(
    scheme: Scheme, weight: torch.Tensor, group_size: int | None
) -> Mapping[str, torch.Tensor]:
    """The parts of an expert as its scheme finds them without a text, with the weight's rows first."""
    parts = scheme.quantize_rows(weight.cpu(), group_size).parts
    return {part: rows.movedim(scheme.row_axes[part], 0) for part, rows in parts.items()}
