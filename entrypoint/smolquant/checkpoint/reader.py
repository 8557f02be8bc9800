"""A checkpoint's weights as byte ranges in file order.

Nothing above needs a whole tensor, let alone a whole file, in memory: it asks for rows. The reader
knows file formats and nothing of quantization.
"""

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from smolquant.errors import CheckpointError, MachineError
from smolquant.memory import available_bytes
from smolquant.text import human_size

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that an unquantized checkpoint has."""

STORED_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
"""And of those that a variant may have."""

_LIBC = ctypes.CDLL(None)

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""

_ROWS_AT_A_TIME = 16
"""What quantizes several rows at a time takes so many, and is idle in what a block leaves over."""

_SAVE_AGAIN = "Save the model again with `save_pretrained`."

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as the checkpoint stores it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // self.rows if self.rows else 0


def source_tensor(
    file: str,
    name: str,
    dtype: str,
    shape: Sequence[int],
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> SourceTensor:
    """A header's entry.

    Raises:
        CheckpointError: the dtype is not one of ``dtypes``.
    """
    if dtype not in dtypes:
        raise _not_plain(file, name, dtype)
    return SourceTensor(name, dtypes[dtype], tuple(shape))


def _not_plain(file: str, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{file} stores {name!r} as {dtype}, which unquantized weights never have.",
        hint="Start from the unquantized checkpoint.",
    )


@dataclass(frozen=True)
class Layout:
    """What the headers of a checkpoint say, in file order; all that a plan needs."""

    tensors: Mapping[str, SourceTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> the one whose memory it shares; only a pickle can say so."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, those that share memory counted once."""
        return sum(
            tensor.size_bytes for name, tensor in self.tensors.items() if name not in self.aliases
        )


class FileBytes(Protocol):
    """The bytes of a weight file, wherever it lies; read from several threads at once."""

    name: str
    size: int

    def read_into(self, view: memoryview, offset: int, *, sequential: bool = True) -> int:
        """Fill ``view`` from ``offset`` on and return how many bytes there were.

        Args:
            sequential: whether what lies behind will be wanted next; a hint.
        """

    def verify(self) -> None:
        """Make sure that all of it is as it should be, as far as that is not known already."""

    def close(self) -> None:
        """Let go of it."""


class LocalBytes:
    """A file on this machine, read with ``pread``: mapped pages would count as this process's memory."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            OSError: it cannot be.
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
        """Nothing to do: a folder's files are compared by the source they belong to."""

    def close(self) -> None:
        os.close(self._file)


class SafetensorsFile:
    """Reads ranges of rows.

    Format: 8 bytes little-endian header length, a JSON header, the data
    (https://github.com/huggingface/safetensors#format).
    """

    aliases: Mapping[str, str] = {}

    def __init__(self, data: FileBytes, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        """Read the header.

        Raises:
            CheckpointError: when the file is truncated, corrupt, or holds another dtype than ``dtypes``.
        """
        self.name = data.name
        self.verify, self.close = data.verify, data.close
        self._data = data
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
        """
        try:
            with safe_open(path, framework="pt"):
                pass  # checks the header against the file's length
            return cls(LocalBytes(path), dtypes)
        except (SafetensorError, OSError) as error:
            raise _corrupt(path.name, error) from error

    def read_rows(
        self, tensor: SourceTensor, start: int, stop: int, *, sequential: bool = True
    ) -> torch.Tensor:
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
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
        if length > min(self._data.size - 8, _LONGEST_HEADER):
            raise _corrupt(self.name, "its header is too long")
        try:
            header: dict[str, dict[str, Any]] = json.loads(self._bytes(8, length))
            header.pop("__metadata__", None)
            spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
            sizes = {
                name: prod(entry["shape"]) * _itemsize(entry["dtype"])
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _corrupt(self.name, "its header cannot be read") from error
        ends = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != self._data.size - 8 - length:
            raise _corrupt(self.name, "its tensors do not cover it")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = entry["shape"]
            if min(shape, default=0) < 0 or (sizes[name] and end - begin != sizes[name]):
                raise _corrupt(self.name, f"{name!r} has another size than its shape")
        return header, 8 + length

    def _bytes(self, offset: int, count: int) -> bytearray:
        content = bytearray(count)
        if self._data.read_into(memoryview(content), offset) < count:
            raise _corrupt(self.name, "its header is cut off")
        return content


def _itemsize(dtype: str) -> int:
    """Bytes; 0 for a dtype that is refused later, by the tensor's name."""
    return STORED_DTYPES[dtype].itemsize if dtype in STORED_DTYPES else 0


def _corrupt(name: str, why: object) -> CheckpointError:
    return CheckpointError(
        f"{name} is truncated or corrupt: {why}.", hint="Fetch or save the file again."
    )


class PickleFile:
    """``pytorch_model.bin``: unpickled without running code.

    The zip format is mapped, and what was read of it is given back at once, since mapped pages count
    as this process's memory. The older format can only be loaded whole, see :class:`_OneLoaded`.
    """

    def __init__(self, path: Path, loaded: "_OneLoaded") -> None:
        """Open ``path``.

        Raises:
            CheckpointError: when it holds anything but tensors, or is truncated.
            MachineError: it has to be loaded whole, and that does not fit in memory.
        """
        self.name, self._path = path.name, path
        self._loaded = loaded
        self._mapped = _unpickle(path, mapped=True) if _is_zip(path) else None
        state = self._state()
        self.tensors: Sequence[SourceTensor] = [
            SourceTensor(name, value.dtype, tuple(value.shape)) for name, value in state.items()
        ]
        self.aliases = _aliases(state)

    def read_rows(
        self, tensor: SourceTensor, start: int, stop: int, *, sequential: bool = True
    ) -> torch.Tensor:
        whole = self._state()[tensor.name]
        rows = whole[start:stop] if tensor.shape else whole
        copy = rows.clone(memory_format=torch.contiguous_format)
        if self._mapped is not None:
            _give_back_pages(rows)
        return copy

    def verify(self) -> None:
        """Nothing to do: a folder's files are compared by the source they belong to."""

    def close(self) -> None:
        self._mapped = {}

    def _state(self) -> dict[str, torch.Tensor]:
        return self._loaded.state(self._path) if self._mapped is None else self._mapped


class _OneLoaded:
    """The one legacy pickle that is in memory; a checkpoint is read in file order, so one is enough."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def state(self, path: Path) -> dict[str, torch.Tensor]:
        with self._lock:
            if path != self._path:
                self._path, self._state = None, {}
                _require_memory(path)
                self._state = _unpickle(path, mapped=False)
                self._path = path
            return self._state


def _require_memory(path: Path) -> None:
    size, available = path.stat().st_size, available_bytes()
    if size > available:
        raise MachineError(
            f"{path.name} is a pickle of the old format, which can only be loaded whole: that takes "
            f"{human_size(size)} of memory, and {human_size(available)} can be had.",
            hint="Convert it to safetensors on a larger machine: load it and `save_pretrained`.",
        )


def _unpickle(path: Path, *, mapped: bool) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever a bad file makes it raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{path.name} cannot be read as plain weights: {reason}",
            hint="Convert it to safetensors where you trust it: load it and `save_pretrained`.",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"{path.name} holds something other than a mapping of names to tensors.",
            hint="Save the model's own state with `save_pretrained`.",
        )
    for name, value in state.items():
        if value.dtype not in DTYPES.values():
            raise _not_plain(path.name, name, str(value.dtype))
    return state


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensors that share all their memory with an earlier one, as tied weights do."""
    first: dict[object, str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


def _give_back_pages(mapped: torch.Tensor) -> None:
    """Let go of the pages of a file's private mapping that ``mapped`` lies in; nothing is lost.

    They were never written to, so whoever touches them next reads the file again (madvise(2)).
    """
    if mapped.numel() == 0:
        return
    strides = zip(mapped.shape, mapped.stride(), strict=True)
    span = (1 + sum((size - 1) * stride for size, stride in strides)) * mapped.element_size()
    begin = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = mapped.data_ptr() + span - begin
    _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


class Checkpoint:
    """All weight files of a model, open for reading rows from several threads at once."""

    def __init__(
        self,
        files: Sequence[Path | FileBytes],
        dtypes: Mapping[str, torch.dtype] = DTYPES,
    ) -> None:
        """Open every file.

        Args:
            files: in order; what is not a path is in the safetensors format.
            dtypes: what safetensors may hold; :data:`STORED_DTYPES` for a variant's files.

        Raises:
            CheckpointError: when one cannot be read, or two hold the same tensor.
            MachineError: one has to be loaded whole, and does not fit in memory.
        """
        self._home: dict[str, SafetensorsFile | PickleFile] = {}
        loaded = _OneLoaded()
        tensors: dict[str, SourceTensor] = {}
        aliases: dict[str, str] = {}
        with ExitStack() as stack:
            for given in files:
                file = _open(given, loaded, dtypes)
                stack.callback(file.close)
                for tensor in file.tensors:
                    if tensor.name in tensors:
                        raise CheckpointError(
                            f"{tensor.name!r} stands in {self._home[tensor.name].name} and again in "
                            f"{file.name}.",
                            hint="Remove the shards of an older save and try again.",
                        )
                    tensors[tensor.name] = tensor
                    self._home[tensor.name] = file
                aliases |= file.aliases
            self._stack = stack.pop_all()
        if not tensors:
            raise CheckpointError("The weight files hold no tensors.", hint=_SAVE_AGAIN)
        self.layout = Layout(tensors, aliases)

    def verify(self) -> None:
        """Make sure, after the last row, that every file was what it should be.

        Raises:
            CheckpointError: one was not.
        """
        for file in dict.fromkeys(self._home.values()):
            file.verify()

    def read_rows(
        self, tensor: SourceTensor, start: int, stop: int, *, sequential: bool = True
    ) -> torch.Tensor:
        """Rows [start, stop) along the first axis, in the stored dtype, as memory of the caller's.

        Args:
            sequential: whether this goes through the file in its order; a hint for what is far away.
        """
        return self._home[tensor.name].read_rows(tensor, start, stop, sequential=sequential)

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(
    given: Path | FileBytes, loaded: _OneLoaded, dtypes: Mapping[str, torch.dtype]
) -> SafetensorsFile | PickleFile:
    if not isinstance(given, Path):
        return SafetensorsFile(given, dtypes)
    if given.suffix == ".safetensors":
        return SafetensorsFile.at(given, dtypes)
    return PickleFile(given, loaded)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def row_blocks(tensor: SourceTensor, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``block_bytes`` that cover ``tensor`` once; none for an empty tensor."""
    step = max(1, block_bytes // max(1, tensor.row_bytes))
    step -= step % _ROWS_AT_A_TIME if step > _ROWS_AT_A_TIME else 0
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)
