"""docs/trackio.md names every event and every metric that a run records, and no other."""

import re
from dataclasses import fields, replace
from pathlib import Path

from smolquant.errors import HubError
from smolquant.record import Metrics
from smolquant.tracking.events import Entries, read_events
from snippets import ROOT
from unit.test_tracking_events import start, tell, with_errors

MEASURED = Metrics(**{one.name: 1.0 for one in fields(Metrics)})  # type: ignore[arg-type]
PHASES = {"quantize": 2.0, "evaluate": 1.0}
"""What pipeline.py tells the durations of."""


def names(heading: str) -> set[str]:
    """The code in the first column of the table below a heading of the page."""
    page = (ROOT / "docs/trackio.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(.+?)`", cell)}


def test_the_page_names_what_is_recorded(tmp_path: Path) -> None:
    told = tell(tmp_path)
    told.recorder.open({}, hub_token=None, private=False)
    start(told)
    made = replace(with_errors("int8"), metrics=MEASURED)
    told.recorder.completed(made, seconds=PHASES, peak_memory_bytes=1)
    told.recorder.pushed({"int8": "https://example.org"}, "c" * 40)
    told.recorder.ended(None)
    told.recorder.ended(HubError("The Hub is away."))

    events = [event for _, event in read_events(tmp_path / "events.jsonl")]
    entries = Entries()
    assert {event["event"] for event in events} == names("Events")
    metrics = {name for event in events for entry in entries.of(event) for name in entry.metrics}
    assert metrics == names("Metrics")
