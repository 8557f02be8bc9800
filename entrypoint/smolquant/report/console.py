"""The only writer to the terminal: groups and annotations in GitHub Actions, else plain lines.

Whatever is written is freed of secrets, terminal escapes and workflow commands first. That holds
outside Actions too: a ``docker run`` inside a workflow does not know that the runner reads it. A log that
nobody can write to any more goes on where it can, and never ends a run.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from textwrap import indent
from typing import TextIO

from smolquant.report.commands import MAX_ANNOTATION, defuse, workflow_command
from smolquant.report.failure import Failure
from smolquant.report.progress import BarProgress, LineProgress, Progress
from smolquant.secrecy import redact, remember
from smolquant.text import error_words, visible


class Console:
    """Speaks to the person, or to the runner, at the other end of ``stream``; thread-safe."""

    def __init__(
        self,
        environ: Mapping[str, str],
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``environ`` tells whether GitHub Actions is listening; ``clock`` counts seconds."""
        self.in_actions = environ.get("GITHUB_ACTIONS") == "true"
        self._stream = stream
        self._open_streams = [("stdout", stream), ("stderr", sys.stderr)]
        """Where lines go: the first that can be written to."""
        self._clock = clock
        self._masked: set[str] = set()
        self._lock = threading.RLock()
        self._group_open = False
        self._bar: BarProgress | None = None
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
        if not self.in_actions or self._group_open:  # the runner does not nest groups
            self.info(f"== {title}")
            yield
            return
        self._write(workflow_command("group", " ".join(self._clean(title))))
        self._group_open = True
        try:
            yield
        finally:
            self._group_open = False
            self._write(workflow_command("endgroup"))

    def info(self, text: str) -> None:
        """Plain lines."""
        for line in self._clean(text):
            self._write(defuse(line))

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
                self.info("".join(traceback.format_exception(error)))
        plain = f"error: {failure.message}"
        if failure.hint:
            plain += f"\nwhat to do: {failure.hint}"
        if failure.code:
            plain += f"\n\n{indent(failure.code, '    ')}\n"
        text = f"{failure.message}\n{failure.hint}\n{failure.code}".strip()
        self._annotate("error", failure.title, text, plain=plain)

    @contextmanager
    def progress(self, label: str, total_bytes: int) -> Iterator[Progress]:
        """Show how work over ``total_bytes`` advances; totals come last, if it completes."""
        name = " ".join(self._clean(label))
        if self.in_actions or not self._stream.isatty():
            lines = LineProgress(name, total_bytes, self.info, self._clock)
            yield lines
            lines.finish()
            return
        bar = self._bar = BarProgress(name, total_bytes, self._stream)
        try:
            yield bar
        finally:
            bar.close()
            self._bar = None

    def _annotate(self, kind: str, title: str, text: str, *, plain: str) -> None:
        if not self.in_actions:
            self.info(plain)
            return
        message = "\n".join(self._clean(text))
        if len(message) > MAX_ANNOTATION:
            message = message[: MAX_ANNOTATION - 1] + "…"
        self._write(workflow_command(kind, message, title=" ".join(self._clean(title))))

    def _clean(self, text: str) -> list[str]:
        # Before, as a secret may be broken over lines; and last, as what is taken out may part one.
        lines = redact(text).expandtabs(4).splitlines() or [""]
        return [redact(visible(line)) for line in lines]

    def _write(self, line: str, end: str = "\n") -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
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
