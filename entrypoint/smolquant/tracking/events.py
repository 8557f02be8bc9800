"""events.jsonl lists, beside report.json, what happened in a run, one event per line.

Trackio shows what the file says: the child process, which reads the lines as they are written, and a later
sync both turn them into the same entries with the same keys.

Every line is a JSON object with ``event`` and ``id``. ``job`` opens a job (project, group and address),
``run`` opens one of its runs; the others are about the run that their ``run`` names.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolquant.report.files import append_lines
from smolquant.text import human_duration, human_size, percent

EVENTS_NAME = "events.jsonl"

Event = Mapping[str, Any]


class EventLog:
    """Appends events to the file; what was appended survives a kill at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: str) -> None:
        """Write one line to disk; ``line`` has no line end.

        Raises:
            OSError: the file cannot be written, or is a link.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.path, line + "\n", follow_links=False)


def read_events(path: Path) -> Iterator[tuple[str, Event]]:
    """The lines that hold an event, each with the event; a line cut short is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            event = parse_event(line)
            if event is not None:
                yield line.rstrip("\n"), event


def parse_event(line: str) -> Event | None:
    """The event in a line; None if the line has none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    if not isinstance(event.get("event"), str) or not isinstance(event.get("id"), str):
        return None
    return event


@dataclass(frozen=True)
class Run:
    """A run as Trackio knows it."""

    id: str
    name: str
    project: str
    group: str


@dataclass(frozen=True)
class Alert:
    """An event for people to see in the dashboard."""

    title: str
    text: str
    level: str
    """``info`` or ``error``."""


@dataclass(frozen=True)
class Entry:
    """The values that Trackio stores at one step of a run."""

    run: Run
    key: str
    """The entry's own key: a server that has it stores no second entry."""
    step: int
    metrics: Mapping[str, Any]
    time: str
    config: Mapping[str, Any] | None = None
    alert: Alert | None = None


@dataclass
class Entries:
    """Translates events, in their order, into the entries that Trackio stores."""

    runs: dict[str, Run] = field(default_factory=dict)
    """The runs that are open so far, by id."""
    _project: str = ""
    _group: str = ""

    def of(self, event: Event) -> list[Entry]:
        """The entries of one event.

        Raises:
            KeyError, TypeError, ValueError: the event is not one that this version writes.
        """
        if event["event"] == "job":
            self._project, self._group = event["project"], event["group"]
            self.runs.clear()  # the jobs of a folder follow one another
            return []
        if event["event"] == "run":
            run = Run(event["run"], event["name"], self._project, self._group)
            self.runs[run.id] = run
            return []
        return _ENTRIES[event["event"]](event, self.runs[event["run"]])


def _started(event: Event, run: Run) -> list[Entry]:
    text = f"{event['config']['quant_type']} on {event['config']['device']}"
    return [_entry(event, run, {}, alert=text)]


def _progress(event: Event, run: Run) -> list[Entry]:
    done, seconds = event["done_bytes"], event["seconds"]
    metrics = {"progress/bytes": done, "progress/seconds": seconds}
    if seconds > 0:
        metrics["progress/bytes_per_second"] = done / seconds
    step = math.ceil(round(seconds, 1))  # the dashboard's axis: bytes against seconds
    return [Entry(run, event["id"], step, metrics, event["time"])]


def _completed(event: Event, run: Run) -> list[Entry]:
    metrics = {name: value for name, value in event["metrics"].items() if value is not None}
    sizes = f"{human_size(metrics['size/source_bytes'])} to {human_size(metrics['size/bytes'])}"
    reduction = percent(metrics["size/reduction_percent"] / 100)
    text = f"{sizes} ({reduction} less)"
    if "seconds/total" in metrics:  # not where an earlier run made it
        text += f" in {human_duration(metrics['seconds/total'])}"
    layers = [
        Entry(run, f"{event['id']}-{layer}", layer, {"layers/relative_error": value}, event["time"])
        for layer, value in event["layer_errors"]
    ]
    return [_entry(event, run, metrics, alert=text), *layers]


def _pushed(event: Event, run: Run) -> list[Entry]:
    facts = {"upload/url": event["url"], "upload/commit": event["commit"]}
    return [_entry(event, run, facts, alert=event["url"])]


def _succeeded(event: Event, run: Run) -> list[Entry]:
    return [_entry(event, run, {"success": 1})]


def _failed(event: Event, run: Run) -> list[Entry]:
    metrics = {"success": 0, "exit_code": event["exit_code"], "error": event["error"]}
    return [_entry(event, run, metrics, alert=event["error"], level="error")]


_ENTRIES = {
    "quantization_started": _started,
    "progress": _progress,
    "quantization_completed": _completed,
    "quantized_model_pushed": _pushed,
    "run_succeeded": _succeeded,
    "quantization_failed": _failed,
}


def _entry(
    event: Event,
    run: Run,
    metrics: Mapping[str, Any],
    *,
    alert: str | None = None,
    level: str = "info",
) -> Entry:
    config = event.get("config")
    if config is not None:  # the underscored are Trackio's own
        config = {**config, "_Group": run.group, "_Created": event["time"], "_Username": None}
    return Entry(
        run,
        event["id"],
        0,
        {"event": event["event"], **metrics},
        event["time"],
        config,
        None if alert is None else Alert(event["event"], alert, level),
    )
