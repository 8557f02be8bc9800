"""A checkpoint's weights as byte ranges in file order.

No caller needs a whole tensor, let alone a whole file, in memory: callers ask for rows. The reader
knows file formats and nothing of quantization.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from smolquant.checkpoint.pickles import LoadedPickle, PickleFile
from smolquant.checkpoint.tensors import (
    DTYPES,
    STORED_DTYPES,
    ConvertedTensor,
    JoinedTensor,
    Layout,
    SourceTensor,
    bytes_of,
    require_shape,
    source_tensor,
)
from smolquant.errors import CheckpointError

_LONGEST_HEADER = 25_000_000
"""Bytes, enough for 150,000 tensors; the Hub's own client reads none that is longer."""
_LONGEST_OF_VARIANT = 100_000_000
"""Bytes; safetensors' own limit. Each header of a variant describes all of the variant."""


class FileBytes(Protocol):
    """The bytes of a weight file, on this machine or elsewhere, which several threads read at once."""

    name: str
    size: int

    def read_into(self, view: memoryview, offset: int, *, sequential: bool = True) -> int:
        """Fill ``view`` from ``offset`` on and return the number of bytes that there were.

        Args:
            sequential: a hint whether the bytes behind these will be read next.
        """

    def verify(self) -> None:
        """Make sure that the whole file is as it should be, unless that is known already."""

    def close(self) -> None:
        """Release the file."""


class LocalBytes:
    """A file on this machine, read with ``pread`` because mapped pages count as this process's memory."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            OSError: it cannot be opened.
        """
        self.name = path.name
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, view: memoryview, offset: int, *, sequential: bool = True) -> int:
        done = 0
        while done < len(view) and (count := os.preadv(self._file, [view[done:]], offset + done)):
            done += count
        return done

    def verify(self) -> None:
        """Do nothing, because the source compares a folder's files itself."""

    def close(self) -> None:
        os.close(self._file)


class SafetensorsFile:
    """A file in the safetensors format, read in ranges of rows.

    Format: 8 bytes little-endian header length, a JSON header, the data
    (https://github.com/huggingface/safetensors#format).
    """

    aliases: Mapping[str, str] = {}

    def __init__(self, data: FileBytes, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        """Read the header.

        Raises:
            CheckpointError: the file is truncated or corrupt, or has another dtype than ``dtypes``.
        """
        self.name = data.name
        self.verify, self.close = data.verify, data.close
        self._data = data
        self._longest = _LONGEST_HEADER if dtypes is DTYPES else _LONGEST_OF_VARIANT
        header, begin = self._header()
        self._offsets: dict[str, int] = {}
        tensors = []
        for name, entry in header.items():
            tensors.append(source_tensor(self.name, name, entry["dtype"], entry["shape"], dtypes))
            self._offsets[name] = begin + entry["data_offsets"][0]
        self.tensors: Sequence[SourceTensor] = sorted(
            tensors, key=lambda tensor: self._offsets[tensor.name]
        )

    @classmethod
    def at(cls, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> "SafetensorsFile":
        """The file at ``path``, validated by the library that defines the format.

        Raises:
            CheckpointError: as for the class itself.
            PermissionError: this user may not read it.
        """
        with ExitStack() as stack:
            try:
                data = LocalBytes(path)
                stack.callback(data.close)
                file = cls(data, dtypes)  # bounds what the library has to read
                with safe_open(path, framework="pt"):
                    stack.pop_all()
                    return file  # the header agrees with the file's length
            except PermissionError:
                raise
            except (SafetensorError, OSError) as error:
                raise _corrupt(path.name, error) from error

    def read_rows(
        self, tensor: SourceTensor, start: int, stop: int, *, sequential: bool = True
    ) -> torch.Tensor:
        shape = (stop - start, *tensor.row_shape) if tensor.shape else ()
        block = torch.empty(shape, dtype=tensor.dtype)
        view = bytes_of(block)
        offset = self._offsets[tensor.name] + start * tensor.row_bytes
        if self._data.read_into(view, offset, sequential=sequential) < len(view):
            raise CheckpointError(
                f"{self.name} ends within {tensor.name!r}: it shrank while it was read.",
                hint="Make sure that nothing writes to the checkpoint during the run.",
            )
        return block

    def _header(self) -> tuple[dict[str, dict[str, Any]], int]:
        """The entries of the tensors, and where their data begins."""
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > min(self._data.size - 8, self._longest):
            raise _corrupt(self.name, "its header is too long")
        try:
            header: dict[str, dict[str, Any]] = json.loads(
                self._bytes(8, length).decode(), object_pairs_hook=self._once
            )
            header.pop("__metadata__", None)
            for name, entry in header.items():
                require_shape(self.name, name, entry["shape"])
            spans = sorted(_span(name, entry) for name, entry in header.items())
            sizes = {
                name: prod(entry["shape"]) * _itemsize(entry["dtype"])
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _corrupt(self.name, "its header cannot be read") from error
        ends = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != self._data.size - 8 - length:
            raise _corrupt(self.name, "its tensors do not cover it")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if sizes[name] and end - begin != sizes[name]:
                raise _corrupt(self.name, f"{name!r} has another size than its shape")
        return header, 8 + length

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of the header, whose keys differ; of two alike, libraries read this one or that."""
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(
                key for key, count in Counter(key for key, _ in pairs).items() if count > 1
            )
            raise _corrupt(self.name, f"its header has {twice!r} twice")
        return entries

    def _bytes(self, offset: int, count: int) -> bytearray:
        content = bytearray(count)
        if self._data.read_into(memoryview(content), offset) < count:
            raise _corrupt(self.name, "its header is cut off")
        return content


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Where the data of a tensor begins and ends.

    Raises:
        ValueError, TypeError, KeyError: the name is no text, or its place is no two whole numbers.
    """
    name.encode()  # JSON can spell half a character
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise TypeError("its place is no two whole numbers")
    return begin, end


def _itemsize(dtype: str) -> int:
    """The bytes of a value; 0 for a dtype that is refused later, in an error that names the tensor."""
    return STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else 0


def _corrupt(name: str, why: object) -> CheckpointError:
    return CheckpointError(
        f"{name} is truncated or corrupt: {why}.", hint="Fetch or save the file again."
    )


class Checkpoint:
    """All weight files of a model, open for reading rows from several threads at once."""

    def __init__(
        self,
        files: Sequence[Path | FileBytes],
        dtypes: Mapping[str, torch.dtype] = DTYPES,
    ) -> None:
        """Open every file.

        Args:
            files: the files in order; what is not a path is in the safetensors format.
            dtypes: the dtypes that safetensors may have; :data:`STORED_DTYPES` for a variant's files.

        Raises:
            CheckpointError: a file cannot be read, or two hold the same tensor.
            MachineError: a file has to be loaded whole, and does not fit in memory.
        """
        self._file_of: dict[str, SafetensorsFile | PickleFile] = {}
        loaded = LoadedPickle()
        tensors: dict[str, SourceTensor] = {}
        aliases: dict[str, str] = {}
        with ExitStack() as stack:
            for given in files:
                file = _open(given, loaded, dtypes)
                stack.callback(file.close)
                for tensor in file.tensors:
                    if tensor.name in tensors:
                        raise CheckpointError(
                            f"{tensor.name!r} is in {self._file_of[tensor.name].name} and again in "
                            f"{file.name}.",
                            hint="Remove the shards of an older save and try again.",
                        )
                    tensors[tensor.name] = tensor
                    self._file_of[tensor.name] = file
                aliases |= file.aliases
            self._stack = stack.pop_all()
        if not tensors:
            raise CheckpointError(
                "The weight files hold no tensors.",
                hint="Save the model again with `save_pretrained`.",
            )
        self.layout = Layout.unwrapped(tensors, aliases)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Tensor -> its number in file order."""
        return {name: place for place, name in enumerate(self.layout.tensors)}

    def verify(self) -> None:
        """Make sure, after the last row was read, that every file was as it should be.

        Raises:
            CheckpointError: a file was not.
        """
        for file in dict.fromkeys(self._file_of.values()):
            file.verify()

    def read_rows(
        self, tensor: SourceTensor, start: int, stop: int, *, sequential: bool = True
    ) -> torch.Tensor:
        """Rows [start, stop) in the stored dtype, in memory of the caller's own.

        Returns:
            (stop - start, columns); (stop - start,) of a vector, and () of a scalar.

        Args:
            sequential: a hint, for files that are far away, whether the caller reads in file order.

        Raises:
            CheckpointError: the tensor does not have these rows; what lies behind it is another's.
        """
        if not 0 <= start <= stop <= tensor.rows:
            raise CheckpointError(
                f"{tensor.name!r} has {tensor.rows} rows, and rows {start} to {stop} were to be read.",
                hint="Make sure that config.json and the tokenizer belong to these weights.",
            )
        if isinstance(tensor, JoinedTensor):
            parts = [
                self.read_rows(piece, *rows, sequential=sequential)
                for piece, *rows in tensor.pieces_of(start, stop)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if isinstance(tensor, ConvertedTensor):
            whole = tensor.convert([self.read_whole(piece) for piece in tensor.pieces])
            return whole.reshape(tensor.rows, *tensor.row_shape)[start:stop]
        stored = replace(tensor, name=self.layout.wrapper + tensor.name)
        return self._file_of[stored.name].read_rows(stored, start, stop, sequential=sequential)

    def read_whole(self, tensor: SourceTensor) -> torch.Tensor:
        """All of a tensor, in its own shape and the stored dtype.

        Raises:
            CheckpointError: as :meth:`read_rows`.
        """
        return self.read_rows(tensor, 0, tensor.rows).view(tensor.shape)

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(
    given: Path | FileBytes, loaded: LoadedPickle, dtypes: Mapping[str, torch.dtype]
) -> SafetensorsFile | PickleFile:
    if not isinstance(given, Path):
        return SafetensorsFile(given, dtypes)
    if given.suffix == ".safetensors":
        return SafetensorsFile.at(given, dtypes)
    return PickleFile(given, loaded)
