"""The end of a run, told whichever way it ends.

On success, failure and cancellation alike a run's report becomes report.json, step outputs, a job summary
and, where something went wrong, one annotation. Nothing is decided here.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

from smolquant import cancellation
from smolquant.errors import InputError, MachineError
from smolquant.memory import is_out_of_memory
from smolquant.places import is_file
from smolquant.report.closing import render_closing
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.report.files import (
    DETAILS_NAME,
    REPORT_NAME,
    own_like_workspace,
    report_text,
    write_details,
    write_outputs,
    write_report,
    write_summary,
)
from smolquant.report.plan_text import render_dry_run
from smolquant.report.run_report import RunReport
from smolquant.report.summary import render_summary
from smolquant.text import error_words
from smolquant.tracking.tracker import Tracker

_PLACES = "variants go to --output-dir, what is downloaded to HF_HOME, and what passes to TMPDIR"
_TASKS = (
    "Raise the limit on processes (`ulimit -u`, or `--pids-limit` of the container) and on memory "
    "(`ulimit -v`), or end others."
)


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
    json_stream: TextIO | None = None
    """Where the content of report.json goes as well; None where nobody asked for that."""
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
            self.error = cancellation.received() or explained(error)
            if any(one.record.metrics for one in self.report.variants.values()):
                # The numbers, above what went wrong.
                self._close(replace(self.report, error=self.error))
            self.console.error(self.error)
        if self.passed_on is None:
            self._tell()
        return True

    def _close(self, report: RunReport) -> None:
        """The table of what was made, and what to do with it."""
        with self._where_possible("There is no table of the variants", None):
            if closing := render_closing(report):
                self.console.info(f"\n{closing}\n")

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
            with self._where_possible("There is no file of details", output_dir / DETAILS_NAME):
                details = write_details(report, self.error)
                console.info(f"Please attach {details} when you report this.")
        with self._where_possible("There is no report.json", output_dir / REPORT_NAME):
            # A refused input tells of a file where the folder should be by itself.
            refused = isinstance(self.error, InputError) and is_file(str(output_dir))
            if not report.dry_run and not refused:
                report.files = (write_report(report, output_dir), *tracker.files)
        with self._where_possible("The step has no outputs", environ.get("GITHUB_OUTPUT")):
            write_outputs(report, environ)
        with self._where_possible("There is no job summary", environ.get("GITHUB_STEP_SUMMARY")):
            write_summary(render_summary(report), environ)
        tracker.finish(output_dir / REPORT_NAME)
        if self.error is None:
            self._close(report)
        if self.json_stream is not None:
            with self._where_possible("There is no report on stdout", "stdout"):
                self.json_stream.write(report_text(report))
                self.json_stream.flush()
        with self._where_possible("Files in the workspace stay root's", output_dir):
            own_like_workspace([output_dir], environ)

    @contextmanager
    def _where_possible(self, consequence: str, place: Path | str | None) -> Iterator[None]:
        """Warn of a file that cannot be written: the run is over, and its exit code stands."""
        try:
            yield
        except Exception as error:
            why = error_words(error)
            if isinstance(error, OSError) and error.strerror:
                place, why = _place_of(error) or place, error.strerror
            self.console.warning(consequence, f"{place or 'It'} cannot be written to: {why}.")


def explained(error: BaseException) -> BaseException:
    """Put the machine's own refusals in the user's terms; return any other error as it is."""
    if is_out_of_memory(error):
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return MachineError(
                "The GPU ran out of memory.", hint="Use --device cpu, or a GPU with more memory."
            )
        return MachineError("The machine ran out of memory.", hint="Use a runner with more memory.")
    if isinstance(error, OSError) and (next_step := _next_step(error.errno)):
        place = _place_of(error) or "A file"
        return MachineError(f"{place} could not be used: {error.strerror}.", hint=next_step)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):  # Python's words
        return MachineError("This machine lets the run start no more threads.", hint=_TASKS)
    return error


def _next_step(number: int | None) -> str:
    """What to do about an error of a system call; empty where it may be smolquant's own fault."""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            step = f"Make room there: {_PLACES}."
        case errno.EROFS | errno.EACCES | errno.EPERM:
            step = f"Give access there: {_PLACES}."
        case errno.EFBIG:
            step = "Raise the limit on a file's size (`ulimit -f`), or choose a smaller --max-shard-size."
        case errno.EMFILE | errno.ENFILE:
            step = "Raise the limit on open files (`ulimit -n`)."
        case errno.EAGAIN:
            step = _TASKS
        case errno.EIO | errno.ENODEV | errno.ENXIO | errno.ESTALE:
            step = "Look at the disk: it fails, or was taken away."
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY:
            step = f"Look at what lies there, or was taken away while the run went on: {_PLACES}."
        case errno.ELOOP | errno.ENAMETOOLONG | errno.EBUSY | errno.ETXTBSY | errno.EXDEV:
            step = f"Look at what lies there: {_PLACES}."
        case _:
            step = ""
    return step


def _place_of(error: OSError) -> str | None:
    """The file that an error is about; of two, the one that was to be written."""
    place: str | None = error.filename2 or error.filename
    return place
