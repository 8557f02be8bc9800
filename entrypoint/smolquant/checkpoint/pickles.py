"""``pytorch_model.bin``, PyTorch's own format, for checkpoints that have no safetensors files."""

import ctypes
import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from smolquant.checkpoint.tensors import DTYPES, SourceTensor, not_plain
from smolquant.errors import CheckpointError, MachineError
from smolquant.memory import available_bytes
from smolquant.text import human_size

_LIBC = ctypes.CDLL(None)


class PickleFile:
    """``pytorch_model.bin``, unpickled without running code.

    The zip format is mapped, and pages that have been read are released at once, since mapped pages count
    as this process's memory. The older format can only be loaded whole, see :class:`LoadedPickle`.
    """

    def __init__(self, path: Path, loaded: "LoadedPickle") -> None:
        """Open ``path``.

        Raises:
            CheckpointError: it holds anything but tensors, or is truncated.
            MachineError: it has to be loaded whole, and does not fit in memory.
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
        rows = whole.reshape(tensor.rows, *tensor.row_shape)[start:stop] if tensor.shape else whole
        copy = rows.clone(memory_format=torch.contiguous_format)
        if self._mapped is not None:
            _release_pages(rows)
        return copy

    def verify(self) -> None:
        """Do nothing, because the source compares a folder's files itself."""

    def close(self) -> None:
        self._mapped = {}

    def _state(self) -> dict[str, torch.Tensor]:
        return self._loaded.state(self._path) if self._mapped is None else self._mapped


class LoadedPickle:
    """The one pickle of the older format that is in memory; checkpoints are read in file order, so that one
    is enough.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def state(self, path: Path) -> dict[str, torch.Tensor]:
        """The tensors in ``path``, which replaces the file that was in memory before.

        Raises:
            CheckpointError: it holds anything but tensors, or is truncated.
            MachineError: it does not fit in memory.
        """
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
            f"{human_size(size)} of memory, and {human_size(available)} is available.",
            hint="Convert it to safetensors on a larger machine: load it and `save_pretrained`.",
        )


def _unpickle(path: Path, *, mapped: bool) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever a bad file makes it raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{path.name} cannot be read as plain weights: {reason}",
            hint="If you trust it, convert it to safetensors: load it and `save_pretrained`.",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"{path.name} holds something other than a mapping of names to tensors.",
            hint="Save the model's own state with `save_pretrained`.",
        )
    for name, value in state.items():
        if value.layout is not torch.strided or value.is_meta:
            raise not_plain(path.name, name, "meta" if value.is_meta else str(value.layout))
        if value.dtype not in DTYPES.values():
            raise not_plain(path.name, name, str(value.dtype))
    return {name: value.detach() for name, value in state.items()}  # parameters want gradients


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensors that share all their memory with an earlier one, as tied weights do."""
    first: dict[object, str] = {}
    aliases = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


def _release_pages(mapped: torch.Tensor) -> None:
    """Release the pages of a file's private mapping that ``mapped`` lies in; nothing is lost.

    They were never written to, so the next access reads the file again (madvise(2)).
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
