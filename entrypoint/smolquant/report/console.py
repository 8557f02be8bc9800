"""The only writer to the terminal: groups and annotations in GitHub Actions, else plain lines.

Whatever is written is freed of secrets, terminal escapes and workflow commands first. That holds
outside Actions too: a ``docker run`` inside a workflow does not know that the runner reads it. A log that
nobody can write to any more goes on where it can, and never ends a run.

Nothing that takes long is silent: what goes on is shown in place on a terminal, and elsewhere told in a
line whenever nothing else has been written for a while.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from textwrap import indent
from typing import TextIO

from smolquant.pace import Part
from smolquant.report.commands import MAX_ANNOTATION, defuse, workflow_command
from smolquant.report.failure import Failure
from smolquant.report.progress import BYTES, Activity, Progress, Unit, Waiting, drawn
from smolquant.secrecy import redact, remember
from smolquant.text import error_words, visible

SECONDS_OF_SILENCE = 9.0
"""After so long without a line, what goes on is told; with the time that it takes to notice, ten."""
_SECONDS_BETWEEN_LOOKS = 0.5
WATCH = "smolquant-console"
"""The name of the thread that looks."""
_ERASE = "\r\x1b[K"


class Console:
    """Speaks to the person, or to the runner, at the other end of ``stream``; thread-safe."""

    def __init__(
        self,
        environ: Mapping[str, str],
        stream: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``environ`` tells whether GitHub Actions is listening; ``clock`` counts seconds.

        ``quiet``: write errors only.
        """
        self.in_actions = environ.get("GITHUB_ACTIONS") == "true"
        self.quiet = quiet
        self._stream = stream
        own = [] if stream is sys.stderr else [("stdout", stream)]
        self._open_streams = [*own, ("stderr", sys.stderr)]
        """Where lines go: the first that can be written to."""
        self._clock = clock
        self._masked: set[str] = set()
        self._lock = threading.RLock()
        self._group_open = False
        self._activities: list[Activity] = []
        """What goes on, the innermost last."""
        self._last_line = clock()
        self._may_draw = not self.in_actions and environ.get("TERM") != "dumb"
        self._drawn = False
        """Whether the terminal's last line is one that will be drawn again."""
        self._begun = ""
        """A line that :meth:`piece` has not yet got the end of."""

    def mask(self, secret: str) -> None:
        """Keep ``secret`` out of everything written from now on, and have the runner do so too."""
        remember(secret)
        for line in secret.split("\n"):  # the runner sees one line at a time
            part = line.strip()
            if part and part not in self._masked and self.in_actions:
                self._write(workflow_command("add-mask", part))
            self._masked.add(part)

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """A foldable group in the log of GitHub Actions, a heading elsewhere and inside a group."""
        with self.doing(title):
            if not self.in_actions or self._group_open:  # the runner does not nest groups
                self.info(f"== {title}")
                yield
                return
            if not self.quiet:
                self._write(workflow_command("group", " ".join(self._clean(title))))
            self._group_open = True
            try:
                yield
            finally:
                self._group_open = False
                if not self.quiet:
                    self._write(workflow_command("endgroup"))

    def info(self, text: str) -> None:
        """Plain lines."""
        if not self.quiet:
            self._write_lines(text)

    def piece(self, text: str) -> None:
        """A piece of a text that comes in pieces: at once on a terminal, elsewhere by whole lines."""
        if self.in_actions or not self._stream.isatty():
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self.info(line)
            return
        # Each character that could begin an escape goes, so that none can be put together from pieces.
        shown = "\n".join(visible(line) for line in redact(text).expandtabs(4).split("\n"))
        self._write(shown, end="")

    def notice(self, title: str, text: str) -> None:
        """Something good to know."""
        self._annotate("notice", title, text, plain=f"{title}: {text}")

    def warning(self, title: str, text: str) -> None:
        """Something that may not be as the user wants it."""
        self._annotate("warning", title, text, plain=f"warning: {title}: {text}")

    def error(self, error: BaseException) -> None:
        """What went wrong and what to do; a bug's traceback too."""
        failure = Failure.of(error)
        if not failure.expected:
            with self.group("Traceback"):
                self._write_lines("".join(traceback.format_exception(error)))
        plain = f"error: {failure.message}"
        if failure.hint:
            plain += f"\nwhat to do: {failure.hint}"
        if failure.code:
            plain += f"\n\n{indent(failure.code, '    ')}\n"
        text = f"{failure.message}\n{failure.hint}\n{failure.code}".strip()
        self._annotate("error", failure.title, text, plain=plain)

    @contextmanager
    def doing(self, label: str) -> Iterator[Callable[[str, float | None], None]]:
        """Say what goes on until this is left, if it lasts: a library is imported, the Hub is awaited.

        Yields:
            what can be told which part of it has begun, and the seconds that are left of all of it, or
            None where nobody knows.
        """
        waiting = Waiting(" ".join(self._clean(label)), self._clock)
        with self._going_on(waiting):
            yield waiting.tell

    @contextmanager
    def progress(
        self, label: str, work: int | Sequence[Part], unit: Unit = BYTES
    ) -> Iterator[Progress]:
        """Show how work advances that is counted in ``unit``; totals come last, if it completes and any was
        done.

        Args:
            work: how much there is; in parts where they differ in pace.
        """
        parts = [Part(work)] if isinstance(work, int) else work
        progress = Progress(" ".join(self._clean(label)), parts, unit, self._clock)
        with self._going_on(progress):
            yield progress
        if progress.done:
            self.info(progress.totals())

    @contextmanager
    def _going_on(self, activity: Activity) -> Iterator[None]:
        """Have somebody look after ``activity`` until this is left; the outermost brings its own thread."""
        over = threading.Event()
        watch = None
        with self._lock:
            self._activities.append(activity)
            if len(self._activities) == 1 and not self.quiet:
                watch = threading.Thread(target=self._watch, args=(over,), name=WATCH, daemon=True)
        try:
            if watch is not None:
                with suppress(RuntimeError):  # that no thread is left is told elsewhere
                    watch.start()
            yield
        finally:
            over.set()
            with self._lock:
                self._activities.remove(activity)
                self._erase()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()

    def look(self) -> None:
        """Show what goes on: in place on a terminal, and in a line where there has been none for long."""
        with self._lock:
            if not self._activities or self.quiet:
                return
            activity = self._activities[-1]
            if self._may_draw and self._draw(activity):
                return
            if self._clock() - self._last_line >= SECONDS_OF_SILENCE:
                self.info(activity.line())

    def _draw(self, activity: Activity) -> bool:
        """Whether ``activity`` could be shown in place, on a terminal."""
        try:
            if not self._stream.isatty():
                return False
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            line = drawn(activity, width, self._stream.encoding or "utf-8")
            self._stream.write(_ERASE + line)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal has gone; the next line finds out where to go
            return False
        self._drawn = True
        return True

    def _erase(self) -> None:
        """Take away what was drawn in place."""
        if self._drawn:
            self._drawn = False
            with suppress(OSError, ValueError):
                self._stream.write(_ERASE)
                self._stream.flush()

    def _annotate(self, kind: str, title: str, text: str, *, plain: str) -> None:
        if self.quiet and kind != "error":
            return
        if not self.in_actions:
            self._write_lines(plain)
            return
        message = "\n".join(self._clean(text))
        if len(message) > MAX_ANNOTATION:
            message = message[: MAX_ANNOTATION - 1] + "…"
        self._write(workflow_command(kind, message, title=" ".join(self._clean(title))))

    def _clean(self, text: str) -> list[str]:
        # Before, as a secret may be broken over lines; and last, as what is taken out may part one.
        lines = redact(text).expandtabs(4).splitlines() or [""]
        return [redact(visible(line)) for line in lines]

    def _write_lines(self, text: str) -> None:
        for line in self._clean(text):
            self._write(defuse(line))

    def _write(self, line: str, end: str = "\n") -> None:
        with self._lock:
            self._erase()
            self._last_line = self._clock()
            while self._open_streams:
                name, stream = self._open_streams[0]
                try:
                    _write_text(stream, line + end)
                    return
                except (OSError, ValueError) as error:  # it is full or closed, or nobody reads it
                    del self._open_streams[0]
                    why = getattr(error, "strerror", None) or error_words(error)
                    line = f"warning: {name} cannot be written to: {why}.\n{line}"


def _write_text(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
