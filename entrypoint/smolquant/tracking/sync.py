"""``smolquant sync-trackio``: sends the events of a finished job that Trackio did not take then."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from smolquant.errors import InputError, SmolquantError
from smolquant.report.console import Console
from smolquant.report.files import REPORT_NAME
from smolquant.tracking.destination import Destination, make_destination
from smolquant.tracking.events import EVENTS_NAME, Event, read_events
from smolquant.tracking.process import TrackioProcess

_SECONDS_TO_START = 60.0
_SECONDS_TO_FINISH = 60.0


class TrackioError(SmolquantError):
    """Trackio refused, or cannot be reached; only ``sync-trackio`` fails with it."""

    exit_code = 5
    title = "Trackio refused"


def sync(
    report_dir: Path,
    destination: Destination | None,
    *,
    console: Console,
    environ: Mapping[str, str],
    hub_token: str | None = None,
) -> str | None:
    """Send every event in a folder to Trackio; sending what is there already changes nothing.

    Args:
        report_dir: an output folder, with events.jsonl.
        destination: the dashboard, with its write token; None where the user named none, which is refused.
        environ: the process's environment.
        hub_token: the token for a Space that has none of its own.

    Returns:
        The dashboard's address with the newest job's runs; None when no run was recorded.

    Raises:
        InputError: there are no events, or no address to send them to was given.
        TrackioError: Trackio did not accept all of them.
    """
    events = _read(report_dir)
    job = [event for _, event in events if event["event"] == "job"][-1]
    if destination is None:
        raise _no_address(job.get("address"), report_dir)
    for secret in destination.secrets:
        console.mask(secret)
    runs = _runs_of_newest_job(event for _, event in events)
    process = TrackioProcess(
        destination,
        environ=environ,
        local_dir=report_dir,
        hub_token=hub_token,
        seconds_to_start=_SECONDS_TO_START,
        seconds_to_finish=_SECONDS_TO_FINISH,
    )
    try:
        for line, _ in events:
            process.send(line)
        report = report_dir / REPORT_NAME
        if not runs or process.started():
            process.finish(report if report.is_file() else None)
    finally:
        process.kill()
    if process.failure is not None:
        raise TrackioError(
            process.failure, hint="Nothing is lost: run this again when Trackio answers."
        )
    return destination.project_url(job["project"], runs) if runs else None


def _read(report_dir: Path) -> list[tuple[str, Event]]:
    """The events in a folder, each with its line; a job is among them."""
    path = report_dir / EVENTS_NAME
    try:
        events = list(read_events(path))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.",
            hint="Name the --output-dir of a run: events.jsonl lies there beside report.json.",
        ) from error
    if not any(event["event"] == "job" for _, event in events):
        raise InputError(f"{path} holds no events.", hint="Name the --output-dir of a run.")
    return events


def _runs_of_newest_job(events: Iterable[Event]) -> list[str]:
    """The ids of the runs that the last job opened."""
    runs: list[str] = []
    for event in events:
        if event["event"] == "job":
            runs = []
        elif event["event"] == "run":
            runs.append(event["run"])
    return runs


def _no_address(recorded: object, report_dir: Path) -> InputError:
    """What to say where no address was given.

    The one that the events name is shown and not used: whoever wrote that file would get the token.
    """
    try:
        named = make_destination(recorded) if isinstance(recorded, str) else None
    except InputError:  # none that a run of ours has written
        named = None
    address = named.address if named else "URL"
    command = ["smolquant", "sync-trackio", str(report_dir), "--trackio-url", address]
    return InputError(
        "No Trackio dashboard was named, and a token goes only where you send it. "
        f"{EVENTS_NAME} names {address if named else 'none'}.",
        hint=f"Name yours: `{shlex.join(command)}`.",
    )
