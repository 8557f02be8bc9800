"""What a run came to: the facts that report.json, the summary and the step outputs are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from smolquant.record import SourceRecord, TensorRecord, VariantRecord
from smolquant.report.failure import Failure

Outcome = Literal["failed", "planned", "up to date", "saved", "proposed", "published"]


@dataclass(frozen=True)
class VariantResult:
    """One variant that this run made, or found made already."""

    record: VariantRecord
    folder: Path | None = None
    """The folder of its files on this machine; None for one that stands in the target."""
    seconds: float | None = None
    """Wall time of making it, together with the run's others; None where an earlier run did."""
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    url: str | None = None
    """The address of its subfolder on the Hub; None when nothing was published."""
    tracking_url: str | None = None
    """The page of its run in Trackio."""
    up_to_date: bool = False


@dataclass(frozen=True)
class PlannedVariant:
    """What a dry run tells of a variant."""

    quant_type: str
    """The scheme's name."""
    tensors: Mapping[str, TensorRecord]
    """Every source tensor's fate."""
    predicted_bytes: int
    """Size of the weight files to come, headers included."""


@dataclass
class RunReport:
    """A whole run, finished or failed; whatever a failed run did not reach is None or empty.

    The pipeline fills it in, in the order in which the facts become known; everybody else only reads it.
    """

    model: str
    """What was asked for: a folder or a Hub id."""
    output_dir: Path
    command: str = ""
    """Reproduces the run; holds no token."""
    dry_run: bool = False
    save_only: bool = False
    repo_id: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    source: SourceRecord | None = None
    planned: Mapping[str, PlannedVariant] = field(default_factory=dict)
    """A dry run's variants."""
    variants: dict[str, VariantResult] = field(default_factory=dict)
    repo_url: str | None = None
    commit_sha: str | None = None
    tag: str | None = None
    """The tag that the commit was given on the Hub, or had."""
    branches: dict[str, str] = field(default_factory=dict)
    """Variant -> the address of the branch that has it at its root, as main has it."""
    pull_request_url: str | None = None
    changed: bool = False
    verdict: str = ""
    """The owner's limits that the release has kept, with what was measured."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Variants that do not keep the owner's limits -> the numbers and the limits."""
    unmeasured: str = ""
    """Why nothing was measured, where it was to be."""
    files: Sequence[Path] = ()
    """What was written beside the variants."""
    trackio_url: str | None = None
    trackio_command: str | None = None
    """Opens the local Trackio project."""
    error: BaseException | None = None

    @property
    def outcome(self) -> Outcome:
        """The end of the run in one to three words."""
        if self.error is not None:
            return "failed"
        if self.dry_run:
            return "planned"
        if not self.changed:
            return "up to date"
        if self.save_only:
            return "saved"
        return "proposed" if self.pull_request_url else "published"

    @property
    def failure(self) -> Failure | None:
        """Why the run failed, as users see it."""
        return None if self.error is None else Failure.of(self.error)

    def to_json(self) -> dict[str, Any]:
        """The content of report.json, made of JSON's own types."""
        failure = self.failure
        planned = {
            name: {"quant_type": plan.quant_type, "predicted_bytes": plan.predicted_bytes}
            for name, plan in self.planned.items()
        }
        return {
            **({"planned": planned} if self.dry_run else {}),
            "source": None if self.source is None else asdict(self.source),
            "variants": {
                name: _variant_report(variant) | {"refused": self.refused.get(name)}
                for name, variant in self.variants.items()
            },
            "commit_sha": self.commit_sha,
            "branches": self.branches,
            "trackio_url": self.trackio_url,
            "unmeasured": self.unmeasured or None,
            "error": failure
            and {
                "type": failure.type,
                "message": failure.message,
                "hint": failure.hint,
                "exit_code": failure.exit_code,
            },
        }


def _variant_report(variant: VariantResult) -> dict[str, Any]:
    record = variant.record
    return {
        "quant_type": record.quant_type,
        "size_bytes": record.size_bytes,
        "source_size_bytes": record.source.size_bytes,
        "quantized_tensors": record.counts.quantized,
        "kept_tensors": record.counts.kept,
        "dropped_tensors": record.counts.dropped,
        "seconds": variant.seconds,
        "peak_memory_bytes": variant.peak_memory_bytes,
        "metrics": None if record.metrics is None else asdict(record.metrics),
        "url": variant.url,
        "up_to_date": variant.up_to_date,
    }
