"""What a run needs of the machine, refused with the numbers before the first byte is moved."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from smolquant.checkpoint.source import Download
from smolquant.errors import MachineError
from smolquant.memory import available_bytes
from smolquant.text import human_size

WORKING_MEMORY = 128 << 20
"""Bytes: the blocks in work, and the group scales of the largest weight."""


@dataclass(frozen=True)
class DiskUse:
    """How a run spares the disk."""

    stream_source: bool = False
    """The source is read from the Hub and not stored."""
    send_shards: bool = False
    """Each shard is sent as soon as it is finished, and deleted."""


@dataclass(frozen=True)
class OutputBytes:
    """What the variants of a run take on disk."""

    in_all: int
    """That are still to be written."""
    at_once: int
    """Where each shard is gone before the next is begun: the largest of every variant, together."""


def choose_disk_use(
    asked: str, output_dir: Path, output: OutputBytes, download: Download, possible: DiskUse
) -> DiskUse:
    """Spare the disk as asked; ``auto``: where it would not hold everything.

    Args:
        asked: ``auto``, ``always`` or ``never``.
        possible: in which ways this run could.

    Raises:
        MachineError: not even that fits.
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
    """Refuse what would fill a disk hours later.

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
    """Refuse to fetch what does not fit.

    Raises:
        MachineError: with the numbers.
    """
    size = human_size(download.size)
    _require(download.folder, download.size, f"Fetching the model takes {size}")


def require_memory() -> None:
    """Refuse to start where even a constant little does not fit.

    Raises:
        MachineError: with the numbers.
    """
    available = available_bytes()
    if available < WORKING_MEMORY:
        raise MachineError(
            f"Quantizing takes {human_size(WORKING_MEMORY)} of memory beside what is loaded already, "
            f"whatever the model's size, and {human_size(available)} can be had.",
            hint="End other programs, or use a machine with more memory.",
        )


def require_memory_for(doing: str, needed: int, hint: str) -> None:
    """Refuse early what the kernel would kill later.

    Args:
        doing: what takes the memory, to begin a sentence with: ``Measuring``.
        needed: bytes beyond what the process has now.

    Raises:
        MachineError: with the numbers, and ``hint``.
    """
    available = available_bytes()
    if needed > available:
        raise MachineError(
            f"{doing} needs {human_size(needed)} of memory, and {human_size(available)} are left here.",
            hint=hint,
        )


def _require(folder: Path, needed: int, need: str) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise MachineError(
            f"{need}, and {folder} has {human_size(free)} free.",
            hint="Variants go to --output-dir, and what is fetched to HF_HOME: choose a disk with more "
            "room, or fewer quantization types. With --evaluate never, --low-disk auto sends each shard "
            "and deletes it.",
        )


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
