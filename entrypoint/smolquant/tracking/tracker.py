"""The interface to which the pipeline reports a run's events, and which records nothing by itself."""

from collections.abc import Mapping
from pathlib import Path

from smolquant.record import Options, VariantRecord


class Tracker:
    """A run that nobody records: every method does nothing."""

    @property
    def url(self) -> str | None:
        """The dashboard with this job's runs; None where none can be opened."""
        return None

    @property
    def local_command(self) -> str | None:
        """The shell command that opens the local project; None where there is none."""
        return None

    def run_url(self, variant: str) -> str | None:
        """The dashboard's page about one variant; None where none can be opened."""
        return None

    def up_to_date(self, variant: str) -> None:
        """The variant is left alone and gets no run."""

    def started(
        self, variant: str, *, options: Options, device: str, repo: str | None, revision: str | None
    ) -> None:
        """Work on a variant begins.

        Args:
            repo: of the source on the Hub, at commit ``revision``; None for a folder. What identifies
                that one is still being computed, and comes with the record.
        """

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more of the source are done, for every started variant; from any thread."""

    def completed(
        self, record: VariantRecord, *, seconds: Mapping[str, float], peak_memory_bytes: int | None
    ) -> None:
        """A variant lies in the output folder. ``seconds``: by phase, such as ``quantize``."""

    def pushed(self, urls: Mapping[str, str], commit: str) -> None:
        """The variants with these addresses were published."""

    def ended(self, error: BaseException | None) -> None:
        """The job is over; ``error`` is why it failed."""

    def finish(self, report: Path | None) -> None:
        """Deliver the rest and ``report``; waits ten seconds at most."""
