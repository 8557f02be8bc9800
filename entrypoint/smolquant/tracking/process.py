"""Runs the child process that sends events to Trackio: feeds it, and kills it when it is late.

Everything that can hang, print or crash is in the child, on the other side of two pipes. Nothing here
raises for what the child does, and only :meth:`TrackioProcess.started` and :meth:`TrackioProcess.finish`
wait.
"""

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import smolquant
from smolquant.environment import child_environment
from smolquant.text import quoted
from smolquant.tracking.destination import Destination

SECONDS_TO_START = 10.0
SECONDS_TO_FINISH = 10.0

_LOGIN = re.compile(r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|HF_TOKEN_PATH|HF_STORED_TOKENS_PATH")
"""The ways to log in to the Hub that a Space may need. Keyless login is none of them: it works for the
published repository only, and Trackio's client would try it first."""


class TrackioProcess:
    """One child process and its deadlines."""

    def __init__(
        self,
        destination: Destination | None,
        *,
        environ: Mapping[str, str],
        local_dir: Path,
        hub_token: str | None = None,
        private: bool = False,
        seconds_to_start: float = SECONDS_TO_START,
        seconds_to_finish: float = SECONDS_TO_FINISH,
    ) -> None:
        """Start the child, and return at once.

        Args:
            destination: None for a local project.
            environ: the environment that the child's is derived from.
            local_dir: the folder of the local project.
            hub_token: the token for a Space that has none of its own.
            private: whether a Space that does not exist yet becomes private.

        Raises:
            OSError: no process can be started.
        """
        self._start_by = time.monotonic() + seconds_to_start
        self._to_start = seconds_to_start
        self._to_finish = seconds_to_finish
        self._changed = threading.Condition()
        self._has_started = self._has_finished = False
        self._failure: str | None = None
        self._problem = ""  # what still keeps the child from delivering
        # What Trackio's client buffers for a server is of no use: events.jsonl holds it.
        self._buffer = tempfile.TemporaryDirectory(
            prefix="smolquant-trackio-", ignore_cleanup_errors=True
        )
        folder = local_dir.absolute() if destination is None else Path(self._buffer.name)
        self._process = subprocess.Popen(
            # -P: the working folder is somebody's repository, and must not shadow a module.
            [sys.executable, "-P", "-m", "smolquant.tracking.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=trackio_environment(environ, destination, folder, hub_token),
            start_new_session=True,  # Ctrl-C must not end the child, which still has to report it
            text=True,
            encoding="utf-8",
        )
        self._outbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for work in (self._write, self._read):
            threading.Thread(target=work, daemon=True).start()
        self.send(json.dumps(_connection(destination, private)))

    @property
    def failure(self) -> str | None:
        """Why the child will not deliver, in words for people; None as long as it may."""
        with self._changed:
            return self._failure

    def send(self, line: str) -> None:
        """Hand over an event's line; this never blocks, even when the child does not read."""
        self._outbox.put(line)

    def started(self) -> bool:
        """Whether Trackio has the first event; waits for that until the child's time is up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_started or self._failure is not None,
                timeout=max(0.0, self._start_by - time.monotonic()),
            )
            if not self._has_started and self._failure is None:
                self._failure = self._late(f"did not start within {self._to_start:.0f} s")
            has_started = self._has_started and self._failure is None
        if not has_started:
            self.kill()
        return has_started

    def finish(self, report: Path | None) -> None:
        """Have the child deliver the rest, and ``report`` as an artifact; then end it."""
        if report is not None:
            self.send(json.dumps({"report": str(report.absolute())}))
        self._outbox.put(None)
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_finished or self._failure is not None, timeout=self._to_finish
            )
            if not self._has_finished and self._failure is None:
                self._failure = self._late(f"did not finish within {self._to_finish:.0f} s")
        self.kill()

    def shorten_deadlines(self, seconds: float) -> None:
        """From now on wait at most ``seconds`` for the start, and as long for the end."""
        self._start_by = min(self._start_by, time.monotonic() + seconds)
        self._to_start = min(self._to_start, seconds)
        self._to_finish = min(self._to_finish, seconds)

    def kill(self) -> None:
        """End the child now."""
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        self._buffer.cleanup()

    def _parse(self, line: str) -> None:
        answer, _, text = line.strip().partition(" ")
        reason = quoted(text)
        with self._changed:
            self._has_started |= answer == "started"
            self._has_finished |= answer == "finished"
            if answer == "trying":
                self._problem = reason
            if answer == "failed":
                self._failure = self._failure or reason
            self._changed.notify_all()

    def _late(self, what: str) -> str:
        return f"Trackio {what}. {self._problem}".strip()

    def _write(self) -> None:
        assert self._process.stdin is not None
        # An OSError means that the child is gone, which _read notices.
        with contextlib.suppress(OSError), self._process.stdin as lines:
            for line in iter(self._outbox.get, None):
                lines.write(line + "\n")
                lines.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._parse(line)
        with self._changed:
            if not self._has_finished and self._failure is None:
                self._failure = "The process that talks to Trackio ended early."
            self._changed.notify_all()


def trackio_environment(
    environ: Mapping[str, str],
    destination: Destination | None,
    folder: Path,
    hub_token: str | None = None,
) -> dict[str, str]:
    """The child's environment: no TRACKIO_ settings but ours, and only the token for where it writes to.

    Args:
        folder: the folder that Trackio may write to.
        hub_token: the token for a Space that has none of its own.
    """
    to_space = destination is not None and destination.is_space
    kept = child_environment(environ, *([_LOGIN] if to_space else []))
    ours = Path(smolquant.__file__).parent.parent  # not installed when it runs from a checkout
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ours), environ.get("PYTHONPATH"))))
    kept["TRACKIO_DIR"] = str(folder)
    kept["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if destination is not None and to_space:
        token = destination.write_token or hub_token
        return {**kept, "HF_TOKEN": token} if token else kept
    kept["HF_HUB_OFFLINE"] = "1"  # Trackio asks the Hub for the user's name
    if destination is not None and destination.write_token:
        kept["TRACKIO_WRITE_TOKEN"] = destination.write_token
    return kept


def _connection(destination: Destination | None, private: bool) -> dict[str, Any] | None:
    """The first line that the child reads."""
    if destination is None:
        return None
    return {
        "url": destination.url,
        "space": destination.space,
        "is_space": destination.is_space,
        "bucket": destination.bucket,
        "private": private,
    }
