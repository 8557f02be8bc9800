"""The plan as plain text, for ``--dry-run`` on a terminal."""

from collections.abc import Iterator, Mapping

from smolquant.record import Counts
from smolquant.report.embeddings import embedding_bytes
from smolquant.report.exceptions import LEFT_OUT, plan_exceptions
from smolquant.report.run_report import PlannedVariant
from smolquant.text import human_size, one_line, percent


def render_dry_run(planned: Mapping[str, PlannedVariant]) -> str:
    """Each variant's predicted size, its counts and its exceptions; ends without a newline."""
    return "\n\n".join("\n".join(_lines(name, plan)) for name, plan in planned.items())


def _lines(name: str, plan: PlannedVariant) -> Iterator[str]:
    tensors = plan.tensors
    source_bytes = sum(tensor.source_bytes for tensor in tensors.values())
    counts = Counts.of(tensors)
    share = (
        f", {percent(plan.predicted_bytes / source_bytes)} of the source" if source_bytes else ""
    )
    yield f"{name} ({plan.quant_type})"
    yield f"  size     {plan.predicted_bytes:,} bytes ({human_size(plan.predicted_bytes)}{share})"
    if (kept := embedding_bytes(tensors)) and plan.predicted_bytes:
        of_it = percent(kept / plan.predicted_bytes)
        yield f"  of that  {human_size(kept)} ({of_it}) embeddings"
    left_out = f", {counts.dropped} {LEFT_OUT}" if counts.dropped else ""
    yield f"  tensors  {counts.quantized} quantized, {counts.kept} kept{left_out}"
    if weighted := sum(tensor.columns_by is not None for tensor in tensors.values()):
        yield f"  columns  of {weighted} tensors weighted by the norm in front"
    for group in plan_exceptions(tensors):
        yield f"  {group.fate}: {one_line(group.reason)} ({human_size(group.size_bytes)})"
        for pattern, count in group.names:
            yield f"    {one_line(pattern)}" + (f"  x{count}" if count > 1 else "")
