"""What a run has come to so far, and how it is told at the end, whichever way it ends.

The pipeline fills it in as it goes; on success, failure and cancellation alike it becomes report.json,
step outputs, a job summary and one annotation. It decides nothing.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from smolquant.errors import MachineError
from smolquant.memory import is_out_of_memory
from smolquant.record import SourceRecord
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
from smolquant.report.run_report import PlannedVariant, RunResult, VariantResult
from smolquant.report.summary import render_summary
from smolquant.tracking.tracker import Tracker

_MACHINE_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass
class Story:
    """The facts of one run, in the order in which they become known."""

    model: str
    output_dir: Path
    repo_id: str | None = None
    command: str = ""
    dry_run: bool = False
    save_only: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    source: SourceRecord | None = None
    planned: dict[str, PlannedVariant] = field(default_factory=dict)
    variants: dict[str, VariantResult] = field(default_factory=dict)
    repo_url: str | None = None
    commit_sha: str | None = None
    pull_request_url: str | None = None
    changed: bool = False
    verdict: str = ""
    unmeasured: str = ""
    """Why nothing was measured, where it was to be."""
    error: BaseException | None = None
    passed_on: int | None = None
    """Exit code of another process that did the run and has told its story."""
    tracker: Tracker = field(default_factory=Tracker)

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return Failure.of(self.error).exit_code
        return self.passed_on or 0

    @contextmanager
    def told(self, console: Console, environ: Mapping[str, str]) -> Iterator[None]:
        """Run the story in this context; its end is told and no exception leaves it."""
        try:
            yield
        except BaseException as error:
            self.error = _explained(error)
            console.error(self.error)
        if self.passed_on is None:
            self._tell(console, environ)

    def _tell(self, console: Console, environ: Mapping[str, str]) -> None:
        self.tracker.ended(self.error)
        result = self._result()
        try:
            if not self.dry_run:
                self._write_report(result, console)
            elif self.planned:
                console.info(render_dry_run(self.planned))
            write_outputs(result, environ, redact=console.redact)
            write_summary(render_summary(result), environ, redact=console.redact)
        finally:
            self.tracker.finish(self.output_dir / REPORT_NAME)
        own_like_workspace([self.output_dir], environ)

    def _write_report(self, result: RunResult, console: Console) -> None:
        try:
            write_report(result, self.output_dir, redact=console.redact)
        except OSError as error:
            console.warning("No report.json", f"{self.output_dir} cannot be written to: {error}")

    def _result(self) -> RunResult:
        return RunResult(
            model=self.model,
            repo_id=self.repo_id,
            source=self.source,
            variants=self.variants,
            repo_url=self.repo_url,
            commit_sha=self.commit_sha,
            pull_request_url=self.pull_request_url,
            trackio_url=self.tracker.url,
            changed=self.changed,
            error=self.error,
            output_dir=self.output_dir,
            dry_run=self.dry_run,
            save_only=self.save_only,
            command=self.command,
            versions=self.versions,
            verdict=self.verdict,
            unmeasured=self.unmeasured,
            planned=self.planned,
            trackio_command=self.tracker.local_command,
        )


def _explained(error: BaseException) -> BaseException:
    """The machine's own refusals in the user's terms; anything else as it is."""
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
