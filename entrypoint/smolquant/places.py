"""Folders that users name, refused before any work where they cannot be what they are for."""

import errno
import os
import stat
from pathlib import Path

from smolquant.errors import InputError
from smolquant.text import quoted

_NO_PLACE = {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}

_DEEPEST = 200
"""Folders in a path; Python makes them by recursion, one in the other."""


def output_folder(text: str) -> Path:
    """The folder that is written to; it need not exist yet.

    Raises:
        InputError: no folder can be made there; it says why.
        OSError: it cannot be looked at.
    """
    path = Path(text)
    if len(path.parts) > _DEEPEST:
        raise _no_folder(text, f"it lies more than {_DEEPEST} folders deep")
    try:
        text.encode()
        if not stat.S_ISDIR(os.stat(text).st_mode):  # noqa: PTH116 - pathlib recurses into long paths
            raise _no_folder(text, "it is not a folder")
    except UnicodeEncodeError as error:
        raise _no_folder(text, "its name is not UTF-8") from error
    except FileNotFoundError as error:
        for place in (path, *path.parents):
            if place.exists():
                break
            if place.is_symlink():
                raise _no_folder(text, f"{place} is a link to nothing") from error
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise _no_folder(text, os.strerror(error.errno).lower()) from error
        raise
    return path


def is_folder(text: str) -> bool:
    """Whether a text, whatever it is, names a folder that is there."""
    return os.path.isdir(text)  # noqa: PTH112 - pathlib raises where a name is too long for any file


def is_file(text: str) -> bool:
    """Whether a text, whatever it is, names a file that is there."""
    return os.path.isfile(text)  # noqa: PTH113 - as above


def _no_folder(text: str, why: str) -> InputError:
    return InputError(
        f"--output-dir {quoted(text)} cannot be written to: {quoted(why)}.",
        hint="Move away what lies there, or choose another --output-dir.",
    )
