"""Access tokens as users give them: what may travel in the header of a request, and what is refused."""

import re
from collections.abc import Callable

from smolquant.errors import InputError
from smolquant.secrecy import remember

HUB_TOKEN = "The Hugging Face token (HF_TOKEN, hf-token or --token)"  # noqa: S105 - its name
WRITE_TOKEN = "TRACKIO_WRITE_TOKEN"  # noqa: S105 - its name

_TOKEN = re.compile(r"[!#-&(-_a-~]*")
"""What ASCII has between the space and DEL, without the three quotation marks."""


def clean_token(token: str | None, name: str) -> str | None:
    """A token without the white space around it, which files and stores of secrets often end it with.

    From now on it is kept out of whatever is told or published.

    Args:
        name: how a user gives it; the message holds this and never the token.

    Returns:
        None for an empty one.

    Raises:
        InputError: it holds what no token has and no header carries.
    """
    text = (token or "").strip()
    remember(text)
    if not _TOKEN.fullmatch(text):
        raise InputError(
            f"{name} holds white space, a quotation mark or a character that is not ASCII, which no "
            "token has.",
            hint="Copy the token again, by itself: without quotes, and without its name before it.",
        )
    return text or None


def masked_token(token: str | None, mask: Callable[[str], None]) -> str | None:
    """The Hub's token of a command, as :func:`clean_token`, once ``mask`` has it kept out of the log."""
    if token:
        mask(token)
    return clean_token(token, HUB_TOKEN)
