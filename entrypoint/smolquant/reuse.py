"""What need not be made again: variants that are up to date, and those that an earlier run has finished.

It decides from records, the source and the settings, and knows neither a Hub nor how anything is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from smolquant.checkpoint.source import Source
from smolquant.publish.local import is_whole
from smolquant.record import VariantRecord, stack_versions
from smolquant.schemes import SCHEMES
from smolquant.settings import Settings


@dataclass(frozen=True)
class Reuse:
    """What becomes of each variant that was asked for."""

    up_to_date: Mapping[str, VariantRecord]
    """Variants in the target that the run leaves alone."""
    reusable: Mapping[str, VariantRecord]
    """Variants in the output folder that an earlier run has finished, and did not come to publish."""
    to_make: tuple[str, ...]
    """Quantization types that have to be made."""
    reasons: Mapping[str, str]
    """Variant -> a sentence that says why it is in its group; none for one that is simply not there."""

    @property
    def to_publish(self) -> tuple[str, ...]:
        """The variants that will be new in the target, in the order in which they were asked for."""
        made = [SCHEMES[quant_type].variant for quant_type in self.to_make]
        return (*self.reusable, *made)


def decide_reuse(
    there: Mapping[str, VariantRecord],
    finished: Mapping[str, VariantRecord],
    source: Source,
    settings: Settings,
    *,
    is_whole: Callable[[Path, VariantRecord], bool] = is_whole,
) -> Reuse:
    """Decide for each variant that was asked for whether it is up to date, reusable, or to be made.

    Args:
        there: the variants that stand in the target, by name.
        finished: the variants that earlier runs have left in the output folder, by name.
        is_whole: tells whether a folder holds the files of a variant as they were made.

    Returns:
        Each variant in one of three groups. The identity of the source is asked for only where a record
        may be of it, because for a folder that takes reading all of it.
    """
    up_to_date, reusable, to_make, reasons = {}, {}, [], {}
    for quant_type in settings.quant_types:
        variant = SCHEMES[quant_type].variant
        record, left = there.get(variant), finished.get(variant)
        outdated = _why_not_current(record, quant_type, source, settings)
        if record is not None and outdated is None:
            up_to_date[variant] = record
            reasons[variant] = f"{variant} is up to date"
        elif left is not None and _is_reusable(left, quant_type, source, settings, is_whole):
            reusable[variant] = left
            reasons[variant] = (
                f"{variant}: {settings.output_dir / variant} has what an earlier run made of this source"
            )
        else:
            to_make.append(quant_type)
            if outdated:
                reasons[variant] = f"{variant} is made again: {outdated}"
    return Reuse(up_to_date, reusable, tuple(to_make), reasons)


def _why_not_current(
    record: VariantRecord | None, quant_type: str, source: Source, settings: Settings
) -> str | None:
    """Why a variant has to be made although ``record`` is there; None where it need not be."""
    if record is None:
        return ""
    if settings.force:
        return "--force asks for it"
    # What smolquant bundles is no change of the owner's: only --force calibrates and measures on it anew.
    same = (settings.options_of(quant_type), *settings.earlier_options_of(quant_type))
    if not any(record.is_made_by(quant_type=quant_type, options=options) for options in same):
        return "it was made with other options, or by another version"
    if record.source.identity != source.identity:
        return "it was made from another source"
    demanded = settings.evaluate == "always" or settings.gate.covers(record.variant)
    if demanded and not settings.measurement.is_that_of(record.metrics, or_earlier=True):
        return "it was not measured as asked for now"
    return None


def _is_reusable(
    record: VariantRecord,
    quant_type: str,
    source: Source,
    settings: Settings,
    is_whole: Callable[[Path, VariantRecord], bool],
) -> bool:
    """Whether a finished variant is what this run would make, and measured as it would be."""
    return (
        not (settings.force or settings.dry_run)
        and (settings.evaluate == "never" or settings.measurement.is_that_of(record.metrics))
        and record.versions == stack_versions()
        and record.is_made_by(quant_type=quant_type, options=settings.options_of(quant_type))
        and record.source.identity == source.identity
        # A config that names code of the model's own names the repository with it.
        and (record.source.repo == source.repo or not settings.trust_remote_code)
        and is_whole(settings.output_dir / record.variant, record)
    )
