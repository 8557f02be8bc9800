"""The process that talks to Trackio: it reads lines of events on stdin and writes short answers to stdout.

``started`` means that Trackio has the first entries, so that a link to them opens; ``trying REASON`` that
it does not have them yet; ``failed REASON`` that the child gives up; ``finished`` that everything is
delivered. The end of stdin is the end of the events. Trackio may print, prompt and wait as it likes; see
:mod:`smolquant.tracking.process`.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from smolquant.tracking.events import Entries, Entry, Run, parse_event

_SECONDS_BETWEEN_TRIES = 1.0
_ORPHAN_SECONDS = 120
"""The seconds after which a child ends even if its parent was killed."""


class MissingTokenError(Exception):
    """Trackio cannot be written to; the message says which token to set."""


class Store(Protocol):
    """A place that entries are stored in."""

    def take(self, entries: Iterable[Entry]) -> None:
        """Store entries; entries that are stored already stay as they are."""

    def attach(self, run: Run, file: Path) -> None:
        """Store a file as an artifact of a run."""

    def close(self) -> None:
        """Return when everything is stored."""


class LocalStore:
    """A project in TRACKIO_DIR."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    def take(self, entries: Iterable[Entry]) -> None:
        """Log through Trackio's own runs."""
        import trackio

        for entry in entries:
            run = self._run(entry.run)
            if entry.config is not None:
                run.config = dict(entry.config)
            run.log(dict(entry.metrics), step=entry.step)
            if entry.alert is not None:
                level = trackio.AlertLevel(entry.alert.level)
                run.alert(entry.alert.title, entry.alert.text, level=level, step=entry.step)

    def attach(self, run: Run, file: Path) -> None:
        """Copy the file into the project."""
        self._run(run).log_artifact(file, name=file.name, type="report")

    def close(self) -> None:
        """Flush the runs."""
        for run in self._runs.values():
            run.finish()

    def _run(self, run: Run) -> Any:
        if run.id not in self._runs:
            self._runs[run.id] = _trackio_run(run)
        return self._runs[run.id]


@dataclass
class RemoteStore:
    """A Trackio server, or a Space.

    Entries go through Trackio's HTTP interface and not through its runs, because those choose their own
    keys, so that sending an entry twice would store it twice, and do not report when nothing arrives.
    """

    source: str
    """A server's or an app's address, or a Space's id."""
    hub_token: str | None = None
    write_token: str | None = None
    _client: Any = field(default=None, init=False)

    def take(self, entries: Iterable[Entry]) -> None:
        """Send entries, and return when the server has them.

        Raises:
            Exception: whatever Trackio's client and httpx raise.
        """
        entries = list(entries)
        self._call("/bulk_log", logs=[_log_entry(entry) for entry in entries])
        alerts = [_alert_entry(entry) for entry in entries if entry.alert is not None]
        if alerts:
            self._call("/bulk_alert", alerts=alerts)

    def attach(self, run: Run, file: Path) -> None:
        """Upload the file, unless the server has the same."""
        where = (
            {"space_id": self.source}
            if self.hub_token
            else {"server_base_url": self.source, "write_token": self.write_token}
        )
        made = _trackio_run(run, url=self.source, client=self._connected(), **where)
        made.log_artifact(file, name=file.name, type="report")

    def close(self) -> None:
        """Do nothing, because every entry is sent at once."""

    def _call(self, api_name: str, **arguments: Any) -> None:
        self._connected().predict(api_name=api_name, hf_token=self.hub_token, **arguments)

    def _connected(self) -> Any:
        if self._client is None:
            import trackio

            self._client = trackio.RemoteClient(
                self.source, hf_token=self.hub_token, write_token=self.write_token
            )
        return self._client


def open_store(connection: dict[str, Any] | None) -> Store:
    """The store that the first line names.

    Raises:
        MissingTokenError: a token is missing.
        Exception: whatever Trackio raises for a Space that it cannot create or use.
    """
    if connection is None:
        return LocalStore()
    if not connection["is_space"]:
        write_token = os.environ.get("TRACKIO_WRITE_TOKEN")
        if not write_token:
            raise MissingTokenError(
                "The Trackio server accepts nothing without its write token: set TRACKIO_WRITE_TOKEN."
            )
        return RemoteStore(connection["url"], write_token=write_token)
    import huggingface_hub

    hub_token = huggingface_hub.get_token()
    if not hub_token:
        raise MissingTokenError(
            "A Trackio Space needs a Hugging Face token with write rights to it; keyless login works "
            "for the published repository only. Set TRACKIO_WRITE_TOKEN to such a token."
        )
    if connection["space"]:
        _prepare_space(connection)
    return RemoteStore(connection["space"] or connection["url"], hub_token=hub_token)


def _prepare_space(connection: dict[str, Any]) -> None:
    """Have Trackio create the Space if needed, and find its bucket. The run that this opens stays empty."""
    import trackio

    trackio.init(
        project="smolquant",
        space_id=connection["space"],
        bucket_id=connection["bucket"],
        private=connection["private"] or None,
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )


def _trackio_run(run: Run, url: str | None = None, client: Any = None, **where: Any) -> Any:
    import trackio

    return trackio.Run(
        url=url,
        project=run.project,
        client=client,
        name=run.name,
        run_id=run.id,
        group=run.group,
        existing_runs=[],
        **where,
    )


def _log_entry(entry: Entry) -> dict[str, Any]:
    return {
        "project": entry.run.project,
        "run": entry.run.name,
        "run_id": entry.run.id,
        "metrics": entry.metrics,
        "step": entry.step,
        "config": entry.config,
        "log_id": entry.key,
    }


def _alert_entry(entry: Entry) -> dict[str, Any]:
    assert entry.alert is not None
    return {
        "project": entry.run.project,
        "run": entry.run.name,
        "run_id": entry.run.id,
        "title": entry.alert.title,
        "text": entry.alert.text,
        "level": entry.alert.level,
        "step": entry.step,
        "timestamp": entry.time,
        "alert_id": entry.key,
    }


class Child:
    """Reads lines, stores their entries, and answers."""

    def __init__(self, lines: TextIO, answers: TextIO) -> None:
        self._lines = lines
        self._answers = answers
        self._inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._entries = Entries()
        self._pending: list[Entry] = []
        self._report: Path | None = None
        self._ended = False

    def run(self) -> None:
        """Serve until the lines end or Trackio refuses."""
        try:
            self._serve()
        except Exception as error:
            self._answer(f"failed {reason(error)}")
        else:
            self._answer("finished")

    def _serve(self) -> None:
        connection = json.loads(self._lines.readline())
        # Lines are read whatever Trackio does, so that the end of them is noticed.
        threading.Thread(target=self._read, daemon=True).start()
        store = open_store(connection)
        # A Space sleeps between releases and needs a minute to wake up: it is worth trying again.
        patient = connection is not None and connection["is_space"]
        while not self._ended:
            self._collect()
            if not self._pending:
                continue
            try:
                store.take(self._pending)
            except Exception as error:
                if self._ended or not patient:
                    raise
                self._answer(f"trying {reason(error)}")
            else:
                self._pending.clear()
                self._answer("started")
                patient = True
        for run in self._entries.runs.values():
            if self._report is not None:
                store.attach(run, self._report)
        store.close()

    def _read(self) -> None:
        for line in self._lines:
            self._inbox.put(line)
        self._inbox.put(None)
        signal.alarm(_ORPHAN_SECONDS)

    def _collect(self) -> None:
        """Move what has come in to the pending entries; with none pending, wait for some."""
        try:
            line = self._inbox.get(timeout=_SECONDS_BETWEEN_TRIES if self._pending else None)
            while line is not None:
                self._parse(line)
                line = self._inbox.get_nowait()
            self._ended = True
        except queue.Empty:
            pass

    def _parse(self, line: str) -> None:
        event = parse_event(line)
        if event is not None:
            self._pending += self._entries.of(event)
            return
        self._report = Path(json.loads(line)["report"])

    def _answer(self, text: str) -> None:
        self._answers.write(text + "\n")
        self._answers.flush()


def reason(error: BaseException) -> str:
    """An exception in one line, with the server's explanation if there is one."""
    if isinstance(error, MissingTokenError):
        return str(error)
    explanation = ""
    response = getattr(error, "response", None)
    if response is not None:
        try:
            explanation = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            explanation = ""
    text = explanation or str(error) or type(error).__name__
    return " ".join(text.split())


def main() -> None:
    """Serve the protocol on the pipes; whatever Trackio prints or prompts for is discarded."""
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - for the whole process
    Child(lines, answers).run()
    os._exit(0)  # Trackio's own exit handlers would wait for its threads


if __name__ == "__main__":
    main()
