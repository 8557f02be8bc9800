"""Places on this machine: folders that users name, and files that are written whole or not at all."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

from smolquant.errors import InputError
from smolquant.text import quoted

_NO_PLACE = {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}

_OCTAL = re.compile(r"\\([0-7]{3})")

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


def nearby(text: str) -> list[str]:
    """Paths that are there, and differ from ``text``, which is not, in one misspelt part."""
    path = Path(text)
    try:
        missing = next(one for one in reversed((path, *path.parents)) if not os.path.lexists(one))
        beside = os.listdir(missing.parent)  # noqa: PTH208 - names are compared
    except (StopIteration, OSError, ValueError):
        return []
    rest = path.relative_to(missing)
    alike = get_close_matches(missing.name, beside, n=3, cutoff=0.7)
    found = [str(missing.with_name(name) / rest) for name in alike]
    return [place for place in found if os.path.exists(place)]  # noqa: PTH110 - as above


def nearby_folders(text: str) -> list[str]:
    """Those of :func:`nearby` that are folders."""
    return list(filter(is_folder, nearby(text)))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk name ``path`` where the system names no file, as in writing an open one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all: on a full disk, what was there stays.

    A link in its place is replaced, and never followed.

    Raises:
        OSError: naming ``path``.
    """
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            unfinished = Path(folder) / path.name
            unfinished.write_bytes(content)
            unfinished.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def is_docker_run() -> bool:
    """Whether this is what a container was started for, or the child of it that does the work."""
    in_container = any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
    return in_container and 1 in (os.getpid(), os.getppid())


def is_on_mount(path: Path, mountinfo: str) -> bool:
    """Whether a path, which need not exist yet, lies on another file system than the root's.

    Args:
        mountinfo: text of ``/proc/self/mountinfo``; proc(5) gives its fields. It writes white space and
            backslashes in octal.
    """
    place = Path(os.path.realpath(path))
    points = (line.split(" ")[4] for line in mountinfo.splitlines() if line.count(" ") > 4)
    mounts = {_OCTAL.sub(lambda found: chr(int(found[1], 8)), point) for point in points}
    return any(str(folder) in mounts for folder in (place, *place.parents) if folder != Path("/"))


def _no_folder(text: str, why: str) -> InputError:
    return InputError(
        f"--output-dir {quoted(text)} cannot be written to: {quoted(why)}.",
        hint="Move away what lies there, or choose another --output-dir.",
    )
