"""The plan's exceptions: what was not quantized as asked, and why, short enough to read."""

from collections.abc import Mapping
from dataclasses import dataclass

from smolquant.record import TensorRecord
from smolquant.text import fold_names


@dataclass(frozen=True)
class PlanException:
    """Source tensors that share a fate and its reason."""

    fate: str
    """``kept``, or how it was quantized instead: ``group 64``, or ``a scale per row``."""
    reason: str
    size_bytes: int
    """What they take in the variant."""
    names: list[tuple[str, int]]
    """Folded names, each with how many tensors it stands for."""


def plan_exceptions(tensors: Mapping[str, TensorRecord]) -> list[PlanException]:
    """The tensors that were not quantized as their scheme would, by fate and reason, the largest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.quantized and not tensor.reason:
            continue
        groups.setdefault((_fate(tensor), tensor.reason), []).append(name)
    exceptions = [
        PlanException(
            fate, reason, sum(tensors[name].size_bytes for name in names), fold_names(names)
        )
        for (fate, reason), names in groups.items()
    ]
    return sorted(exceptions, key=lambda group: group.size_bytes, reverse=True)


def _fate(tensor: TensorRecord) -> str:
    if not tensor.quantized:
        return "kept"
    return f"group {tensor.group_size}" if tensor.group_size else "a scale per row"
