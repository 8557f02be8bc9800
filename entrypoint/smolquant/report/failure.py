"""What is told of an exception: the same words in the log, the summary and report.json."""

from dataclasses import dataclass
from typing import Self

from smolquant.errors import Cancelled, CheckpointError, GateError, InputError, SmolquantError


@dataclass(frozen=True)
class Failure:
    """An exception as users see it."""

    type: str
    title: str
    message: str
    hint: str
    exit_code: int
    expected: bool
    """Whether the user can act on it; otherwise it is a bug, and its traceback matters."""
    code: str = ""
    """Lines of Python that do what the hint says."""

    @property
    def ends_before_publishing(self) -> bool:
        """Whether it is of a kind that is found out before anything goes to the Hub.

        After the others, a commit may have arrived whose answer did not.
        """
        kinds = (InputError, CheckpointError, GateError)
        return self.exit_code in {kind.exit_code for kind in kinds}

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Describe any exception; one that is not a :class:`SmolquantError` is called a bug."""
        if isinstance(error, SmolquantError | Cancelled):
            return cls(
                type=type(error).__name__,
                title=error.title,
                message=error.message,
                hint=error.hint,
                exit_code=error.exit_code,
                expected=True,
                code=getattr(error, "code", ""),
            )
        return cls(
            type=type(error).__name__,
            title="Unexpected error",
            message=f"This is a bug in smolquant. {type(error).__name__}: {error}".rstrip(": "),
            hint="Please report it. The log has the traceback; attach error-details.txt from the output "
            "folder, if it is there.",
            exit_code=SmolquantError.exit_code,
            expected=False,
        )
