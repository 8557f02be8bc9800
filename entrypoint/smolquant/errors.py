"""One exception per exit code. Each message tells what happened, why, and the next thing to do."""

from typing import ClassVar


class SmolquantError(Exception):
    """A failure that the user can act on. Anything else that escapes is a bug and exits with 1."""

    exit_code: ClassVar[int] = 1
    title: ClassVar[str] = "smolquant failed"

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        """``message`` says what happened and why; ``hint`` is the next thing to do.

        Each becomes a single line, whatever words of a library's or of a file it repeats. ``code`` is
        lines of Python that do what the hint says.
        """
        super().__init__(message)
        self.message = _one_line(message)
        self.hint = _one_line(hint)
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())


class InputError(SmolquantError):
    """What was asked for makes no sense, or is not allowed."""

    exit_code = 2
    title = "Bad input"


class CheckpointError(SmolquantError):
    """The source checkpoint cannot be used."""

    exit_code = 3
    title = "Unusable checkpoint"


class CannotMeasure(CheckpointError):
    """The model's predictions cannot be computed here; its weights may be good all the same."""


class MachineError(SmolquantError):
    """This machine cannot do it: memory, disk or device."""

    exit_code = 4
    title = "This machine cannot do it"


class HubError(SmolquantError):
    """The Hub refused, or cannot be reached."""

    exit_code = 5
    title = "The Hub refused"


class GateError(SmolquantError):
    """The measured quality is worse than the owner allows."""

    exit_code = 6
    title = "Quality gate failed"


class Unmeasured(GateError):
    """There are no numbers to hold against a limit; what was made may be good all the same."""


class Cancelled(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived.

    Not an ``Exception``, because libraries catch those wherever a failure is no matter to them.
    """

    title = "Cancelled"
    message = "The run was cancelled before it was done; nothing was published after that."
    hint = "Run it again; what is published already is not made again."

    def __init__(self, signal_number: int) -> None:
        super().__init__(self.message)
        self.exit_code = 128 + signal_number
        """POSIX shells' convention."""
