"""The plan's exceptions: what was not quantized as asked, and why, short enough to read."""

from collections.abc import Mapping
from dataclasses import dataclass

from smolquant.names import fold_names
from smolquant.record import Counts, TensorRecord


@dataclass(frozen=True)
class PlanException:
    """Source tensors that share a fate and its reason."""

    quantized: bool
    """False where they were kept or left out."""
    fate: str
    """What readers are told: ``kept``, ``left out``, or how they were quantized, as ``group 64``."""
    reason: str
    size_bytes: int
    """What they take in the variant."""
    names: list[tuple[str, int]]
    """Folded names, each with how many tensors it stands for."""


LEFT_OUT = "left out"
"""The fate of what the model has no place for."""


def counted(counts: Counts) -> str:
    """``210 / 62``: quantized and kept, and what was left out where anything was."""
    left_out = f" ({counts.dropped} {LEFT_OUT})" if counts.dropped else ""
    return f"{counts.quantized} / {counts.kept}{left_out}"


def plan_exceptions(tensors: Mapping[str, TensorRecord]) -> list[PlanException]:
    """The tensors that were not quantized as their scheme would, by fate and reason, the largest first."""
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.quantized and not tensor.reason:
            continue
        alike = (tensor.quantized, _fate(tensor), tensor.reason)
        groups.setdefault(alike, []).append(name)
    exceptions = [
        PlanException(*alike, sum(tensors[name].size_bytes for name in names), fold_names(names))
        for alike, names in groups.items()
    ]
    return sorted(exceptions, key=lambda group: group.size_bytes, reverse=True)


def _fate(tensor: TensorRecord) -> str:
    if not tensor.quantized:
        return LEFT_OUT if tensor.dropped else "kept"
    return f"group {tensor.group_size}" if tensor.group_size else "a scale per row"
