"""The tensors of a checkpoint as its weight files store them: names, dtypes, shapes and row ranges."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from smolquant.errors import CheckpointError

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
"""The dtypes of an unquantized checkpoint, by their names in safetensors."""

STORED_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
"""The dtypes that a variant may have, by the same names."""

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

_ROWS_AT_A_TIME = 16
"""The number of rows that vectorized quantization takes at a time; a block that is no multiple of it leaves
the last step partly idle."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a weight file stores it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SourceTensor(StoredTensor):
    """A tensor of the source, which is read by ranges of rows.

    A row runs along the last axis, so a stack of matrices has the rows of all of them, one matrix after
    another. A vector is read by values, and a scalar is one row.
    """

    @property
    def rows(self) -> int:
        """The number of rows."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else prod(self.shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.shape[-1:] if len(self.shape) > 1 else ()

    @property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class JoinedTensor(SourceTensor):
    """Several tensors of the source whose rows, one tensor after another, are those of a parameter."""

    pieces: tuple[SourceTensor, ...]

    def pieces_of(self, start: int, stop: int) -> Iterator[tuple[SourceTensor, int, int]]:
        """The pieces that hold rows [start, stop), each with the range of its own rows."""
        first = 0
        for piece in self.pieces:
            begin, end = max(start - first, 0), min(stop - first, piece.rows)
            if begin < end:
                yield piece, begin, end
            first += piece.rows
            if first >= stop:
                return


@dataclass(frozen=True)
class ConvertedTensor(SourceTensor):
    """A parameter that is computed from whole tensors of the source, and so is read whole."""

    pieces: tuple[SourceTensor, ...]
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """From the pieces, in their order, to the parameter."""


def pieces_of(tensor: SourceTensor) -> tuple[SourceTensor, ...]:
    """The tensors in the files that ``tensor`` is made of; itself where it is one of them."""
    return tensor.pieces if isinstance(tensor, JoinedTensor | ConvertedTensor) else (tensor,)


def prevalent_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of most bytes of ``tensors``, of which there is at least one."""
    sizes = Counter[torch.dtype]()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    return sizes.most_common(1)[0][0]


def source_tensor(
    file: str,
    name: str,
    dtype: str,
    shape: Sequence[int],
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> SourceTensor:
    """The tensor that an entry of the header of ``file`` describes.

    Raises:
        CheckpointError: the dtype is not one of ``dtypes``.
    """
    if dtype not in dtypes:
        raise not_plain(file, name, dtype)
    return SourceTensor(name, dtypes[dtype], tuple(shape))


_MOST_AXES = 64
"""PyTorch's own limit."""
_LONGEST_AXIS = 2**63


def require_shape(file: str, name: str, shape: Any) -> None:
    """Make sure that an entry of the header of ``file`` has a shape that a tensor can have.

    Raises:
        CheckpointError: naming the tensor.
    """
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_AXES
        or any(type(length) is not int or not 0 <= length < _LONGEST_AXIS for length in shape)
    ):
        raise CheckpointError(
            f"{file} is truncated or corrupt: {name!r} has a shape that no tensor has.",
            hint="Fetch or save the file again.",
        )


def not_plain(file: str, name: str, dtype: str) -> CheckpointError:
    """The error for a tensor whose dtype, here by its name, only quantized weights have."""
    return CheckpointError(
        f"{file} stores {name!r} as {dtype}, which unquantized weights never have.",
        hint="Start from the unquantized checkpoint.",
    )


WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and data parallelism put in front of a weight's name."""


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


@dataclass(frozen=True)
class Layout:
    """What the headers of a checkpoint say, in file order, which is all that a plan needs."""

    tensors: Mapping[str, SourceTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> the one whose memory it shares; only a pickle can say so."""
    wrapper: str = ""
    """What stood in front of every name in the files, and is left out of the names here."""

    @classmethod
    def unwrapped(
        cls, tensors: Mapping[str, SourceTensor], aliases: Mapping[str, str] | None = None
    ) -> "Layout":
        """The layout of these tensors, with the names that the model inside a wrapper gives them.

        ``torch.compile`` and data parallelism hold the model as an attribute, whose name then begins the
        name of every weight of a state dict that was taken of the wrapper.
        """
        wrapper = ""
        while prefix := next((one for one in WRAPPERS if _all_begin(tensors, wrapper + one)), ""):
            wrapper += prefix
        inner = {
            name.removeprefix(wrapper): replace(tensor, name=name.removeprefix(wrapper))
            for name, tensor in tensors.items()
        }
        shared = {
            name.removeprefix(wrapper): first.removeprefix(wrapper)
            for name, first in (aliases or {}).items()
        }
        return cls(inner, shared, wrapper)

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors, where tensors that share memory count once."""
        return sum(
            tensor.size_bytes for name, tensor in self.tensors.items() if name not in self.aliases
        )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def row_blocks(
    tensor: SourceTensor, block_bytes: int, *, within: int | None = None
) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``block_bytes`` that cover ``tensor`` once; none for an empty tensor.

    Args:
        within: the number of rows of each matrix of a stack, where no range may be part of two.
    """
    matrix = within or max(1, tensor.rows)
    step = min(matrix, max(1, block_bytes // max(1, tensor.row_bytes)))
    if _ROWS_AT_A_TIME < step < matrix:
        step -= step % _ROWS_AT_A_TIME
    for first in range(0, tensor.rows, matrix):
        last = min(first + matrix, tensor.rows)
        for start in range(first, last, step):
            yield start, min(start + step, last)
