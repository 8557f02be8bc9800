"""What ``torch.save`` has written, looked through before anything in it is unpickled.

A pickle is a program: a few bytes of it make gigabytes, and its zip file may hold what no one has summed.
So its instructions are counted and its names compared with those of tensors, without running any, and the
zip file has to be the plain one that PyTorch writes: every record once, and none compressed.
"""

import os
import pickletools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from smolquant.errors import CheckpointError

_MOST_INSTRUCTIONS = 3_000_000
"""A tensor takes about 30. Each makes at most some hundred bytes in memory."""

_LONGEST_PICKLE = 100_000_000
"""Bytes of names and shapes without data; as many as a header in safetensors may have."""

_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch \w+|torch\.(?:_utils _rebuild|storage )\w+"
    r"|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.serialization _get_layout"
)
"""The names that a pickle of tensors refers to, of all kinds of tensors."""

_LEGACY_PICKLES = 5
"""Magic number, protocol, system, tensors, and the keys of their data, one after another."""

_LOCAL_HEADER = 30
"""Bytes of a zip record before its name; the last four are the lengths of the name and the extra field."""

_READ_AT_ONCE = 1 << 23

SAVE_PLAIN = "Save the model again with `save_pretrained`, which writes its weights as safetensors."


class Record(NamedTuple):
    """The data of one storage, as bytes of the file."""

    name: str
    offset: int
    size: int
    crc: int


def is_zip(path: Path) -> bool:
    """Whether ``path`` is in the zip format, and not in the older one, which is pickles alone."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def records_of(path: Path) -> list[Record]:
    """The data of the storages in a file of the zip format, in the file's order.

    Raises:
        CheckpointError: the file is no such archive of weights, is damaged, or its pickle is not one of
            tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _require_plain(path.name, entries)
            described = [one for one in entries if one.filename.endswith("/data.pkl")]
            if len(described) != 1 or described[0].file_size > _LONGEST_PICKLE:
                raise _unreadable(path.name, "it has not one data.pkl, of a size that tensors need")
            _require_tensors(path.name, [archive.read(described[0])])  # compares the CRC, too
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise _unreadable(path.name, str(error)) from error
    folder = described[0].filename.removesuffix("data.pkl")
    stored = [one for one in entries if one.filename.startswith(f"{folder}data/")]
    return sorted(_records(path, stored), key=lambda record: record.offset)


def check_legacy(path: Path) -> None:
    """Look through a file of the older format, whose data follows its pickles.

    Raises:
        CheckpointError: its pickles are not those of tensors.
    """
    with path.open("rb") as file:
        _require_tensors(path.name, [_Bounded(file)] * _LEGACY_PICKLES)


class _Bounded:
    """A file of pickles, of which no instruction gets more than there is: ``read`` makes room first."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(_LONGEST_PICKLE)


def verify_records(path: Path, records: Iterable[Record]) -> None:
    """Compare the data of all storages with their checksums, which are read once for it.

    Raises:
        CheckpointError: naming the file and the record that differs.
    """
    with path.open("rb") as file:
        for record in records:
            file.seek(record.offset)
            crc, left = 0, record.size
            while left and (block := file.read(min(left, _READ_AT_ONCE))):
                crc = zlib.crc32(block, crc)
                left -= len(block)
            if left or crc != record.crc:
                raise _unreadable(path.name, f"the checksum of its record {record.name} is wrong")


def _require_plain(name: str, entries: Sequence[zipfile.ZipInfo]) -> None:
    names = Counter(entry.filename for entry in entries)
    twice = next((one for one, count in names.items() if count > 1), None)
    if twice is not None:
        raise _unreadable(name, f"it has two records {twice!r}, and nobody can tell which counts")
    if any(one.endswith("/constants.pkl") for one in names):
        raise CheckpointError(
            f"{name} is a program in TorchScript, and no file of plain weights.", hint=SAVE_PLAIN
        )
    packed = next((one for one in entries if one.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise _unreadable(
            name, f"its record {packed.filename!r} is compressed, which PyTorch never does"
        )


def _require_tensors(name: str, pickles: Iterable[object]) -> None:
    """Count the instructions of pickles, and compare the names in them with those of tensors."""
    count, others = 0, set[str]()
    try:
        for one in pickles:
            for instruction, argument, _ in pickletools.genops(one):  # type: ignore[arg-type]
                count += 1
                if count > _MOST_INSTRUCTIONS:
                    raise _unreadable(name, "its pickle has more instructions than tensors need")
                if instruction.name == "GLOBAL" and not _OF_TENSORS.fullmatch(str(argument)):
                    others.add(str(argument).replace(" ", "."))
    except (ValueError, IndexError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(name, f"its pickle is damaged ({error})") from error
    if others:
        raise CheckpointError(
            f"{name} holds more than plain weights, and unpickling the rest would run code: "
            f"{', '.join(sorted(others)[:3])}.",
            hint=SAVE_PLAIN,
        )


def _records(path: Path, entries: Iterable[zipfile.ZipInfo]) -> Iterable[Record]:
    with path.open("rb") as file:
        for entry in entries:
            header = os.pread(file.fileno(), _LOCAL_HEADER, entry.header_offset)
            lengths = int.from_bytes(header[-4:-2], "little") + int.from_bytes(
                header[-2:], "little"
            )
            start = entry.header_offset + _LOCAL_HEADER + lengths
            yield Record(entry.filename, start, entry.file_size, entry.CRC)


def _unreadable(name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be read as plain weights: {why.rstrip('.')}.",
        hint=f"Fetch the file again. {SAVE_PLAIN}",
    )
