"""Safetensors shards whose every byte has its place before the first is written.

The writer is handed names, dtypes and shapes, lays out the files, writes the headers, and then takes
the data in any order from any thread. It knows nothing of quantization.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from smolquant.checkpoint.disk import DiskFile
from smolquant.checkpoint.tensors import DTYPE_NAMES, StoredTensor, bytes_of


@dataclass(frozen=True)
class Shard:
    """One output file: its name, what it holds, and the metadata that its header repeats."""

    name: str
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """Length prefix and JSON header, padded with spaces so that the data starts 8-aligned."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)}
        for tensor in self.tensors:
            begin = self._begin[tensor.name]
            entries[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, begin + tensor.size_bytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def _begin(self) -> dict[str, int]:
        """Offset of each tensor in the data; wide dtypes first, so that every one is aligned."""
        begin, position = {}, 0
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize):
            begin[tensor.name] = position
            position += tensor.size_bytes
        return begin

    def offset(self, name: str) -> int:
        """The offset in bytes at which the data of ``name`` begins in the file."""
        return len(self.header) + self._begin[name]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """The bytes of the whole file."""
        return len(self.header) + self.data_bytes


def lay_out(
    tensors: Sequence[Sequence[StoredTensor]], metadata: Mapping[str, str], max_shard_size: int
) -> tuple[Shard, ...]:
    """Distribute tensors over files named as transformers names them.

    Args:
        tensors: one sequence per source tensor, the parts that must stay together.
        metadata: the entries that every header repeats, because transformers merges the headers of all
            shards and lets the last one win.
        max_shard_size: bytes of data in a file; a single tensor may exceed it.
    """
    bins: list[list[StoredTensor]] = [[]]
    filled = 0
    for parts in tensors:
        size = sum(part.size_bytes for part in parts)
        if bins[-1] and filled + size > max_shard_size:
            bins.append([])
            filled = 0
        bins[-1].extend(parts)
        filled += size
    names = (
        ["model.safetensors"]
        if len(bins) == 1
        else [f"model-{i:05d}-of-{len(bins):05d}.safetensors" for i in range(1, len(bins) + 1)]
    )
    return tuple(Shard(name, tuple(held), metadata) for name, held in zip(names, bins, strict=True))


def index_text(shards: Sequence[Shard]) -> str | None:
    """``model.safetensors.index.json``, or None where one file holds everything."""
    if len(shards) == 1:
        return None
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """Writes one shard; :meth:`write` may be called from any thread, each byte once."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        """Create the file, reserve its space and write its header.

        Raises:
            OSError: ENOSPC when the disk is too small, before any work was spent.
        """
        self.shard = shard
        self.path = folder / shard.name
        self._missing_bytes, self._lock = shard.data_bytes, threading.Lock()
        self._file = DiskFile(self.path, shard.size_bytes)
        self._file.write(memoryview(shard.header), 0)

    def write(self, name: str, data: torch.Tensor, skip_bytes: int = 0) -> None:
        """Store contiguous ``data`` at ``skip_bytes`` from the beginning of tensor ``name``."""
        if data.numel() == 0:
            return
        self._file.write(bytes_of(data.contiguous()), self.shard.offset(name) + skip_bytes)
        with self._lock:
            self._missing_bytes -= data.numel() * data.element_size()

    def digest(self) -> str:
        """sha256 of the finished file.

        Raises:
            RuntimeError: not every byte was written once; a file with holes reads as zeros.
        """
        if self._missing_bytes:
            raise RuntimeError(
                f"{self.path.name}: {self._missing_bytes} bytes were not written as planned"
            )
        return self._file.sha256()

    def close(self) -> None:
        """Close the file, if it is open."""
        self._file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
