"""The end of a run, told whichever way it ends.

On success, failure and cancellation alike a run's report becomes report.json, step outputs, a job summary
and, where something went wrong, one annotation. Nothing is decided here.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

from smolquant.errors import MachineError
from smolquant.memory import is_out_of_memory
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.report.files import (
    REPORT_NAME,
    own_like_workspace,
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
        if error is not None:
            self.error = _explained(error)
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
        try:
            if not report.dry_run:
                self._write_report(report)
            elif report.planned:
                console.info(render_dry_run(report.planned))
            write_outputs(report, environ, redact=console.redact)
            write_summary(render_summary(report), environ, redact=console.redact)
        finally:
            tracker.finish(report.output_dir / REPORT_NAME)
        own_like_workspace([report.output_dir], environ)

    def _write_report(self, report: RunReport) -> None:
        output_dir = report.output_dir
        try:
            write_report(report, output_dir, redact=self.console.redact)
        except OSError as error:
            self.console.warning("No report.json", f"{output_dir} cannot be written to: {error}")


def _explained(error: BaseException) -> BaseException:
    """Put the machine's own refusals in the user's terms; return any other error as it is."""
    if is_out_of_memory(error):
        return MachineError("The machine ran out of memory.", hint="Use a runner with more memory.")
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNO:
        place = error.filename or "A file"
        return MachineError(
            f"{place} could not be used: {error.strerror}.",
            hint="Make room or give access there; variants go to --output-dir, and what is downloaded "
            "to HF_HOME.",
        )
    return error
