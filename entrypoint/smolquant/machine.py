"""Checks, before the first byte is moved, that this machine has the disk space and memory for a run."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from smolquant.checkpoint.source import Download
from smolquant.errors import MachineError
from smolquant.memory import available_bytes
from smolquant.text import human_size

WORKING_MEMORY = 128 << 20
"""Bytes for the blocks that are being processed, and for the group scales of the largest weight."""


def computing_device(asked: str) -> str:
    """The device that calibrates and measures: ``cuda`` where it may and can be used, else ``cpu``.

    Args:
        asked: ``auto``, ``cpu`` or ``cuda``.
    """
    if asked == "cpu":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_cuda() -> None:
    """Refuse a machine without a GPU where one was demanded.

    Raises:
        MachineError: torch sees none.
    """
    if computing_device("cuda") != "cuda":
        raise MachineError(
            "--device cuda was asked for, and torch sees no CUDA device here.",
            hint="Use --device auto or cpu, or a machine with a GPU and torch's CUDA build.",
        )


@dataclass(frozen=True)
class DiskUse:
    """The ways in which a run saves disk space."""

    stream_source: bool = False
    """Whether the source is read from the Hub without being stored."""
    send_shards: bool = False
    """Whether each shard is sent as soon as it is finished, and then deleted."""


@dataclass(frozen=True)
class OutputBytes:
    """The disk space that the variants of a run take."""

    in_all: int
    """Bytes that are still to be written."""
    at_once: int
    """Bytes on disk at once if each shard is deleted before the next is begun: the sum of every variant's
    largest shard."""


def choose_disk_use(
    asked: str, output_dir: Path, output: OutputBytes, download: Download, possible: DiskUse
) -> DiskUse:
    """Choose how to save disk space; ``auto`` saves it only where the disk would not hold everything.

    Args:
        asked: ``auto``, ``always`` or ``never``.
        possible: the ways in which this run can save disk space.

    Raises:
        MachineError: the run does not fit on the disk even so.
    """
    ways = {
        "never": [DiskUse()],
        "auto": [DiskUse(), replace(possible, send_shards=False), possible],
        "always": [possible],
    }[asked]
    for use in ways[:-1]:
        with suppress(MachineError):
            _require_for(use, output_dir, output, download)
            return use
    _require_for(ways[-1], output_dir, output, download)
    return ways[-1]


def _require_for(use: DiskUse, output_dir: Path, output: OutputBytes, download: Download) -> None:
    require_disk(
        output_dir,
        min(output.in_all, output.at_once) if use.send_shards else output.in_all,
        replace(download, size=0) if use.stream_source else download,
    )


def require_disk(output_dir: Path, variants: int, download: Download) -> None:
    """Refuse a run that would fill a disk hours later.

    Args:
        variants: bytes that are still to be written below ``output_dir``.

    Raises:
        MachineError: they do not fit, or the download does not, or both together on one disk.
    """
    if not download.size:
        _require(output_dir, variants, f"The variants take {human_size(variants)}")
    elif _existing(download.folder).stat().st_dev == _existing(output_dir).stat().st_dev:
        _require(
            output_dir,
            variants + download.size,
            f"The variants take {human_size(variants)}, and the model, which is fetched to the same "
            f"disk, {human_size(download.size)}",
        )
    else:
        _require(output_dir, variants, f"The variants take {human_size(variants)}")
        require_room_for(download)


def require_room_for(download: Download) -> None:
    """Refuse a download that does not fit on its disk.

    Raises:
        MachineError: it does not fit; the message has the numbers.
    """
    size = human_size(download.size)
    _require(download.folder, download.size, f"Fetching the model takes {size}")


def require_writable(folder: Path) -> None:
    """Refuse early a folder, which need not exist yet, that nothing can be written to.

    Raises:
        OSError: naming the folder, or the nearest one above it that exists.
    """
    place = _existing(folder)
    try:
        TemporaryDirectory(dir=place, prefix=".smolquant-").cleanup()
    except OSError as error:
        error.filename = str(place)
        raise


def require_memory() -> None:
    """Refuse to start where the memory that every run takes is not available.

    Raises:
        MachineError: it is not available; the message has the numbers.
    """
    available = available_bytes()
    if available < WORKING_MEMORY:
        raise MachineError(
            f"Quantizing takes {human_size(WORKING_MEMORY)} of memory beyond what is loaded already, "
            f"whatever the model's size, and {human_size(available)} is available.",
            hint="Close other programs, or use a machine with more memory.",
        )


def require_memory_for(doing: str, needed: int, hint: str) -> None:
    """Refuse early a step that would be killed later for the memory it takes.

    Args:
        doing: the step, in a word that a sentence can begin with: ``Measuring``.
        needed: bytes beyond what the process has now.
        hint: what the user can do about it.

    Raises:
        MachineError: the memory is not available; the message has the numbers.
    """
    available = available_bytes()
    if needed > available:
        raise MachineError(
            f"{doing} needs {human_size(needed)} of memory, and {human_size(available)} is available.",
            hint=hint,
        )


def _require(folder: Path, needed: int, need: str) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise MachineError(
            f"{need}, and {folder} has {human_size(free)} free.",
            hint="Variants are written to --output-dir, and downloads to HF_HOME: choose a disk with more "
            "space, or fewer quantization types. With --evaluate never, --low-disk auto sends each shard "
            "and then deletes it.",
        )


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
