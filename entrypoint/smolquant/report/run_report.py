"""What a run came to: all that summaries, outputs and report.json are made of."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from smolquant.record import SourceRecord, TensorRecord, VariantRecord
from smolquant.report.failure import Failure

Outcome = Literal["failed", "planned", "up to date", "saved", "proposed", "published"]


@dataclass(frozen=True)
class VariantResult:
    """One variant that this run made, or found up to date."""

    record: VariantRecord
    seconds: float | None
    """Wall time of making it; None where an earlier run did."""
    peak_memory_bytes: int | None
    url: str | None
    """Its subfolder on the Hub; None when nothing was published."""
    up_to_date: bool


class PlannedVariant(Protocol):
    """What a dry run tells of a variant."""

    @property
    def quant_type(self) -> str:
        """The scheme's name."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Every source tensor's fate."""

    @property
    def predicted_bytes(self) -> int:
        """Size of the weight files to come, headers included."""


@dataclass(frozen=True)
class RunResult:
    """A whole run, finished or failed; whatever a failed run did not reach is None or empty."""

    model: str
    """What was asked for: a folder or a Hub id."""
    repo_id: str | None
    source: SourceRecord | None
    variants: Mapping[str, VariantResult]
    repo_url: str | None
    commit_sha: str | None
    pull_request_url: str | None
    trackio_url: str | None
    changed: bool
    error: BaseException | None
    output_dir: Path
    dry_run: bool
    save_only: bool
    command: str
    """Reproduces the run; holds no token."""
    versions: Mapping[str, str]
    trackio_command: str | None = None
    """Opens the local Trackio project."""
    verdict: str = ""
    """The owner's limits that the release has kept, with what was measured."""
    unmeasured: str = ""
    """Why nothing was measured, where it was to be."""
    planned: Mapping[str, PlannedVariant] = field(default_factory=dict)
    """A dry run's variants."""

    @property
    def outcome(self) -> Outcome:
        """How the run ended, in one word."""
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
        """The error as users see it."""
        return None if self.error is None else Failure.of(self.error)

    def to_report(self) -> dict[str, Any]:
        """The content of report.json, made of JSON's own types."""
        failure = self.failure
        return {
            "source": None if self.source is None else asdict(self.source),
            "variants": {name: _variant_report(variant) for name, variant in self.variants.items()},
            "commit_sha": self.commit_sha,
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
        "quantized_tensors": record.quantized_tensors,
        "kept_tensors": record.kept_tensors,
        "seconds": variant.seconds,
        "peak_memory_bytes": variant.peak_memory_bytes,
        "metrics": None if record.metrics is None else asdict(record.metrics),
        "url": variant.url,
        "up_to_date": variant.up_to_date,
    }
