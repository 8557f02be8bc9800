"""Records every run in Trackio and links it, without ever holding up or failing the run.

The recorder writes each event to events.jsonl and hands the same line to a child process, the only
process that uses Trackio. The child may hang, crash or be refused: it has deadlines, and the events that
it did not deliver stay in the file, from which :func:`sync` sends them later.
"""

from smolquant.tracking.destination import Destination, make_destination
from smolquant.tracking.events import EVENTS_NAME
from smolquant.tracking.recorder import Recorder, start
from smolquant.tracking.sync import TrackioError, sync
from smolquant.tracking.tracker import Tracker

__all__ = [
    "EVENTS_NAME",
    "Destination",
    "Recorder",
    "Tracker",
    "TrackioError",
    "make_destination",
    "start",
    "sync",
]
