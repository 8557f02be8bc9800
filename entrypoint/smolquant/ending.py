"""The end of a run, told whichever way it ends.

On success, failure and cancellation alike a run's report becomes report.json, step outputs, a job summary
and, where something went wrong, one annotation. Nothing is decided here.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

from smolquant import cancellation
from smolquant.errors import MachineError
from smolquant.memory import is_out_of_memory
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.report.files import (
    REPORT_NAME,
    own_like_workspace,
    write_details,
    write_outputs,
    write_report,
    write_summary,
)
from smolquant.report.plan_text import render_dry_run
from smolquant.report.run_report import RunReport
from smolquant.report.summary import render_summary
from smolquant.tracking.tracker import Tracker

_MACHINE_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass
class Ending:
    """A context in which a run goes on; its end is told, and no exception leaves it."""

    report: RunReport
    console: Console
    environ: Mapping[str, str]
    tracker: Tracker = field(default_factory=Tracker)
    """What records the run, once that is known."""
    passed_on: int | None = None
    """The exit code of another process that did the run and has told its end."""
    error: BaseException | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of the command, once the context is left."""
        if self.error is not None:
            return Failure.of(self.error).exit_code
        return self.passed_on or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[True]:
        cancellation.begin_to_tell()
        if error is not None:
            # What a library has made of a cancellation is one, too.
            self.error = cancellation.received() or _explained(error)
            self.console.error(self.error)
        if self.passed_on is None:
            self._tell()
        return True

    def _tell(self) -> None:
        tracker, console, environ = self.tracker, self.console, self.environ
        tracker.ended(self.error)
        report = replace(
            self.report,
            error=self.error,
            trackio_url=tracker.url,
            trackio_command=tracker.local_command,
        )
        output_dir = report.output_dir
        if report.dry_run and report.planned:
            console.info(render_dry_run(report.planned))
        if self.error is not None and not Failure.of(self.error).expected:
            with self._where_possible("There is no file of details"):
                details = write_details(report, self.error, redact=console.redact)
                console.info(f"Please attach {details} when you report this.")
        with self._where_possible("There is no report.json"):
            if not report.dry_run:
                write_report(report, output_dir, redact=console.redact)
        with self._where_possible("The step has no outputs"):
            write_outputs(report, environ, redact=console.redact)
        with self._where_possible("There is no job summary"):
            write_summary(render_summary(report), environ, redact=console.redact)
        tracker.finish(output_dir / REPORT_NAME)
        with self._where_possible("Files in the workspace stay root's"):
            own_like_workspace([output_dir], environ)

    @contextmanager
    def _where_possible(self, consequence: str) -> Iterator[None]:
        """Warn of a file that cannot be written: the run is over, and its exit code stands."""
        try:
            yield
        except OSError as error:
            place = error.filename or "A file"
            why = error.strerror or type(error).__name__
            self.console.warning(consequence, f"{place} cannot be written to: {why}.")


def _explained(error: BaseException) -> BaseException:
    """Put the machine's own refusals in the user's terms; return any other error as it is."""
    if is_out_of_memory(error):
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return MachineError(
                "The GPU ran out of memory.", hint="Use --device cpu, or a GPU with more memory."
            )
        return MachineError("The machine ran out of memory.", hint="Use a runner with more memory.")
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNO:
        place = error.filename or "A file"
        return MachineError(
            f"{place} could not be used: {error.strerror}.",
            hint="Make room or give access there; variants go to --output-dir, and what is downloaded "
            "to HF_HOME.",
        )
    return error
