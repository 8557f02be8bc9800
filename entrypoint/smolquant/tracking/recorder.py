"""Records the events of a run: writes them to events.jsonl and hands them to the process for Trackio."""

import functools
import importlib.util
import json
import math
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from smolquant.errors import Cancelled
from smolquant.names import layer_number
from smolquant.record import Metrics, Options, VariantRecord
from smolquant.report.console import Console
from smolquant.report.failure import Failure
from smolquant.secrecy import redact
from smolquant.text import one_line
from smolquant.tracking.destination import Destination
from smolquant.tracking.events import EVENTS_NAME, EventLog
from smolquant.tracking.naming import job_name, project_name, run_name
from smolquant.tracking.process import TrackioProcess
from smolquant.tracking.tracker import Tracker

LOCAL_PROJECT = "trackio"
"""The folder of the local project, in the output folder."""

_SECONDS_BETWEEN_POINTS = 1.0
_SECONDS_WHEN_CANCELLED = 2.5
"""GitHub kills a step ten seconds after it asked it to stop, and the job summary matters more."""
_NOT_INSTALLED = "Trackio is not installed: `pip install smolquant[action]`."

P = ParamSpec("P")
R = TypeVar("R", bound="Recorder")


def start(
    destination: Destination | None,
    *,
    output_dir: Path,
    console: Console,
    environ: Mapping[str, str],
    repo: str,
    revision: str | None,
    quant_types: Mapping[str, str],
    experiment_name: str | None = None,
    hub_token: str | None = None,
    private: bool = False,
    local: bool = False,
) -> Tracker:
    """Begin to record a job, and return at once.

    Args:
        destination: the dashboard; None where there is none, and events are kept in their file only.
        environ: the process's environment.
        repo: the Hub id or folder that the project is named after.
        revision: the revision of the source, if it is known.
        quant_types: the quantization types that were asked for, by variant.
        experiment_name: the name of the run; with several variants the variant's name is appended.
        hub_token: the token for a Space that has none of its own.
        private: whether a Space that does not exist yet becomes private.
        local: whether a project is kept in the output folder, where no dashboard is named.
    """
    for secret in destination.secrets if destination else ():
        console.mask(secret)
    if destination is not None and destination.bucket is not None:
        console.notice(
            "--dataset-repo is a bucket now",
            "Trackio no longer keeps its data in a dataset: the Space uses the Hub bucket "
            f"{destination.bucket}, which is created if it does not exist.",
        )
    recorder = Recorder(
        output_dir,
        console,
        destination=destination,
        project=project_name(repo),
        title=experiment_name,
        revision=revision,
        quant_types=quant_types,
        local=local,
    )
    recorder.open(environ, hub_token=hub_token, private=private)
    return recorder


def _harmless(method: Callable[Concatenate[R, P], None]) -> Callable[Concatenate[R, P], None]:
    """Keep a failure of tracking from failing the job."""

    @functools.wraps(method)
    def guarded(self: R, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.give_up(f"Recording the run failed: {type(error).__name__}: {error}")

    return cast("Callable[Concatenate[R, P], None]", guarded)


class Recorder(Tracker):
    """Writes events.jsonl and hands every line to the process."""

    def __init__(
        self,
        output_dir: Path,
        console: Console,
        *,
        destination: Destination | None,
        project: str,
        title: str | None,
        revision: str | None,
        quant_types: Mapping[str, str],
        local: bool = False,
    ) -> None:
        """See :func:`start`; ``title`` is the experiment's name."""
        self._local = local and destination is None
        self._output_dir = output_dir
        self._console = console
        self._destination = destination
        self._project = project
        self._title = title
        self._revision = revision
        self._quant_types = quant_types
        self._wanted = dict.fromkeys(quant_types)
        self._log = EventLog(output_dir / EVENTS_NAME)
        self._process: TrackioProcess | None = None
        self._started = False  # Trackio has something of this job
        self._keeps_project = False
        self._runs: dict[str, str] = {}  # ids by variant
        self._lock = threading.RLock()
        self._at_work: set[str] = set()  # variants between started and completed
        self._working_since = self._last_point = time.monotonic()
        self._done_bytes = 0
        self._warned = self._log_broken = False

    @_harmless
    def open(self, environ: Mapping[str, str], *, hub_token: str | None, private: bool) -> None:
        """Start the child process and the job's record."""
        wanted = self._local or self._destination is not None
        if self._local and (self._output_dir / LOCAL_PROJECT).is_symlink():
            self._warn(f"{self._output_dir / LOCAL_PROJECT} is a link.")
        elif wanted and importlib.util.find_spec("trackio") is not None:
            try:
                self._process = TrackioProcess(
                    self._destination,
                    environ=environ,
                    local_dir=self._output_dir / LOCAL_PROJECT,
                    hub_token=hub_token,
                    private=private,
                )
                self._keeps_project = self._local
            except OSError as error:
                self._warn(f"The process that talks to Trackio did not start: {error}.")
        elif wanted:
            self._warn(_NOT_INSTALLED)
        self._record(
            "job",
            project=self._project,
            group=job_name(environ),
            address=self._destination.address if self._destination else None,
            bucket=self._destination.bucket if self._destination else None,
        )

    @property
    def url(self) -> str | None:
        """See :attr:`Tracker.url`; the first to ask may wait until Trackio has started."""
        if self._destination is None or not self._linkable():
            return None
        return self._destination.project_url(self._project, list(self._runs.values()))

    def run_url(self, variant: str) -> str | None:
        """See :meth:`Tracker.run_url`; the first to ask may wait until Trackio has started."""
        if self._destination is None or variant not in self._runs or not self._linkable():
            return None
        return self._destination.run_url(self._project, self._runs[variant])

    @property
    def files(self) -> Sequence[Path]:
        """See :attr:`Tracker.files`."""
        kept = [] if self._log_broken else [self._log.path]
        return [*kept, self._output_dir / LOCAL_PROJECT] if self._keeps_project else kept

    @property
    def local_command(self) -> str | None:
        """See :attr:`Tracker.local_command`."""
        if not self._keeps_project or not self._runs:
            return None
        folder = shlex.quote(str(self._output_dir / LOCAL_PROJECT))
        return f"TRACKIO_DIR={folder} trackio show --project {self._project}"

    def up_to_date(self, variant: str) -> None:
        """See :meth:`Tracker.up_to_date`."""
        self._wanted.pop(variant, None)

    @_harmless
    def started(
        self, variant: str, repo: str | None, revision: str | None, options: Options, device: str
    ) -> None:
        """See :meth:`Tracker.started`."""
        self._revision = revision
        self._record(
            "quantization_started",
            run=self._open_run(variant),
            config={
                **self._config(variant),
                "options": options,
                "device": device,
                "source": repo,
                "source_revision": revision,
            },
        )
        with self._lock:
            if not self._at_work:
                self._working_since, self._done_bytes = time.monotonic(), 0
            self._at_work.add(variant)
            self._point(variant)

    @_harmless
    def advance(self, n_bytes: int) -> None:
        """See :meth:`Tracker.advance`."""
        with self._lock:
            self._done_bytes += n_bytes
            now = time.monotonic()
            if now - self._last_point >= _SECONDS_BETWEEN_POINTS:
                self._last_point = now
                self._point(*self._at_work)

    @_harmless
    def completed(
        self, record: VariantRecord, *, seconds: Mapping[str, float], peak_memory_bytes: int | None
    ) -> None:
        """See :meth:`Tracker.completed`."""
        with self._lock:
            if record.variant in self._at_work:
                self._point(record.variant)
                self._at_work.remove(record.variant)
        self._record(
            "quantization_completed",
            run=self._open_run(record.variant),
            metrics=_metrics(record, seconds, peak_memory_bytes),
            layer_errors=layer_errors(record),
        )

    @_harmless
    def pushed(self, urls: Mapping[str, str], commit: str) -> None:
        """See :meth:`Tracker.pushed`."""
        for variant, url in urls.items():
            if variant in self._runs:
                run = self._runs[variant]
                self._record("quantized_model_pushed", run=run, url=url, commit=commit)

    @_harmless
    def ended(self, error: BaseException | None) -> None:
        """See :meth:`Tracker.ended`."""
        if error is None:
            for run in self._runs.values():
                self._record("run_succeeded", run=run)
            return
        if self._process is not None and isinstance(error, Cancelled):
            self._process.shorten_deadlines(_SECONDS_WHEN_CANCELLED)
        failure = Failure.of(error)
        for variant in self._wanted:
            known = {} if variant in self._runs else {"config": self._config(variant)}
            self._record(
                "quantization_failed",
                run=self._open_run(variant),
                **known,
                error=f"{failure.title}: {failure.message}",
                exit_code=failure.exit_code,
            )

    def finish(self, report: Path | None) -> None:
        """See :meth:`Tracker.finish`; whatever happens here, the job's outcome stands."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if self._runs and process.failure is None:
                process.finish(report if report is not None and report.is_file() else None)
            if self._runs and process.failure is not None:
                self._warn(process.failure)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")
        finally:
            process.kill()

    def give_up(self, why: str) -> None:
        """Warn, and leave Trackio alone from now on."""
        self._warn(why)
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _linkable(self) -> bool:
        """Whether Trackio has this job's runs, so that a link opens."""
        if self._process is not None and self._runs and not self._started:
            self._started = self._process.started()
            if not self._started:
                self.give_up(self._process.failure or "Trackio did not start.")
        return self._started

    def _open_run(self, variant: str) -> str:
        """The run's id, which is chosen here so that cards can name it before anything is sent."""
        if variant not in self._runs:
            self._runs[variant] = uuid.uuid4().hex
            self._record("run", run=self._runs[variant], variant=variant, name=self._name(variant))
        return self._runs[variant]

    def _config(self, variant: str) -> dict[str, str]:
        return {"variant": variant, "quant_type": self._quant_types[variant]}

    def _name(self, variant: str) -> str:
        if self._title is not None:
            return run_name(
                f"{self._title}-{variant}" if len(self._quant_types) > 1 else self._title
            )
        revision = f"@{self._revision[:8]}" if self._revision else ""
        return run_name(f"{self._project}{revision}-{variant}")

    def _point(self, *variants: str) -> None:
        """Record a point of the curve of bytes against seconds; the caller holds the lock."""
        seconds = time.monotonic() - self._working_since
        for variant in variants:
            run = self._runs[variant]
            self._record("progress", run=run, done_bytes=self._done_bytes, seconds=seconds)

    def _record(self, event: str, **facts: Any) -> None:
        """Keep an event and pass it on."""
        record = {
            "event": event,
            "id": uuid.uuid4().hex,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **_portable(facts),
        }
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        with self._lock:
            try:
                self._log.append(line)
            except OSError as error:
                self._log_broken = True
                self._warn(f"{self._log.path} cannot be written: {error.strerror}.")
            if self._process is not None:
                self._process.send(line)

    def _warn(self, why: str) -> None:
        """The job's one warning about Trackio."""
        if self._warned:
            return
        self._warned = True
        self._keeps_project = False
        kept = "" if self._log_broken else f" The events are kept in {self._log.path}"
        if kept and self._destination is not None:
            command = ["smolquant", "sync-trackio", str(self._output_dir)]
            command += ["--trackio-url", self._destination.address]
            kept += f"; `{shlex.join(command)}` sends them later"
        kept += "." if kept else ""
        self._console.warning("The run is not recorded in Trackio", f"{why.rstrip('.')}.{kept}")


def layer_errors(record: VariantRecord) -> list[tuple[int, float]]:
    """Mean relative error of each layer's quantized tensors, in the layers' order."""
    layers: dict[int, list[float]] = {}
    for name, tensor in record.tensors.items():
        layer = layer_number(name)
        if layer is not None and tensor.relative_error is not None:
            layers.setdefault(layer, []).append(tensor.relative_error)
    return [(layer, sum(errors) / len(errors)) for layer, errors in sorted(layers.items())]


def _metrics(
    record: VariantRecord, seconds: Mapping[str, float], peak_memory_bytes: int | None
) -> dict[str, float | str | None]:
    working = seconds.get("quantize", 0.0)
    measured = record.metrics or Metrics()
    return {
        "source/identity": record.source.identity,
        "size/source_bytes": record.source.size_bytes,
        "size/bytes": record.size_bytes,
        "size/reduction_percent": 100 * (1 - record.ratio),
        "tensors/quantized": record.counts.quantized,
        "tensors/kept": record.counts.kept,
        **{f"seconds/{phase}": duration for phase, duration in seconds.items()},
        "seconds/total": sum(seconds.values()) if seconds else None,
        "speed/bytes_per_second": record.source.size_bytes / working if working else None,
        "memory/peak_bytes": peak_memory_bytes,
        "quality/perplexity": measured.perplexity,
        "quality/source_perplexity": measured.source_perplexity,
        "quality/perplexity_increase_percent": measured.perplexity_increase_percent,
        "quality/mean_kl": measured.mean_kl,
        "quality/top1_agreement": measured.top1_agreement,
        "speed/tokens_per_second": measured.tokens_per_second,
        "speed/source_tokens_per_second": measured.source_tokens_per_second,
    }


def _portable(value: Any) -> Any:
    """``value`` in JSON's own types, without secrets, control characters, NaN and infinity."""
    if isinstance(value, str):
        return redact(one_line(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_portable(item) for item in value]
    return value
