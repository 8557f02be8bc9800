"""The interface to which the pipeline reports a run's events, and which records nothing by itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from smolquant.record import Options, VariantRecord


class Tracker:
    """A run that is not recorded: every method does nothing."""

    @property
    def url(self) -> str | None:
        """The dashboard with this job's runs; None where none can be opened."""
        return None

    @property
    def files(self) -> Sequence[Path]:
        """What recording has left in the output folder."""
        return ()

    @property
    def local_command(self) -> str | None:
        """The shell command that opens the local project; None where there is none."""
        return None

    def run_url(self, variant: str) -> str | None:
        """The dashboard's page about one variant; None where none can be opened."""
        return None

    def up_to_date(self, variant: str) -> None:
        """The variant stays as it is and gets no run."""

    def started(
        self, variant: str, repo: str | None, revision: str | None, options: Options, device: str
    ) -> None:
        """Work on a variant begins.

        Args:
            repo: the source's repository on the Hub, at commit ``revision``; None for a folder, whose
                identity is still being computed and comes with the record.
        """

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more of the source are done for every started variant; called from any thread."""

    def completed(
        self, record: VariantRecord, *, seconds: Mapping[str, float], peak_memory_bytes: int | None
    ) -> None:
        """A variant is made and, where it was to be, measured; it may still be refused.

        Args:
            seconds: the duration of each phase, such as ``quantize``.
        """

    def pushed(self, urls: Mapping[str, str], commit: str) -> None:
        """The variants with these addresses were published."""

    def ended(self, error: BaseException | None) -> None:
        """The job is over; ``error`` is the reason if it failed."""

    def finish(self, report: Path | None) -> None:
        """Deliver the rest and ``report``; this waits ten seconds at most."""
