"""Linear layers on a CPU, from int8 and int4 weights as they are stored.

Nothing is packed, copied or dequantized when a model is loaded: cpu_linear.c reads the published bytes.
One token or a few are bounded by how fast memory gives the weights, so they are multiplied on their way
from there; many tokens are left to :mod:`smolquant.runtime.many_tokens`.

What this computes with is plain tensors; it knows neither torchao's classes nor models.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from smolquant.runtime.compiled import (
    DTYPES,
    INT8_DYNAMIC,
    Layer,
    Stored,
    described_layer,
    library,
    required,
)
from smolquant.runtime.many_tokens import HAS_AMX, HAS_BFLOAT16, HAS_INT8, many

FEW_TOKENS = 16 if HAS_BFLOAT16 else 48
"""Up to how many tokens torch's own products of one row at a time are taken, where there is the choice."""

_FEW = 16 if HAS_AMX else 32 if HAS_BFLOAT16 else 48
"""Up to how many tokens weights are multiplied where they are read. With AVX512's bfloat16 both ways
took as long at 16 to more than 64 tokens (docs/runtime.md); with slower loops than these it was 32 to
more than 64 on older CPUs, and 8 to 16 with AMX."""

_FEW_DYNAMIC = 8 if HAS_INT8 else _FEW
"""The same of dynamic int8, which torch multiplies as whole numbers."""


class Linears:
    """Linear layers with the same inputs, computed in one call.

    Inputs are taken as whole numbers of 16 bits, 32 columns (int4) or 64 (int8) in a unit of their own: an
    error of 2^-16 of the largest of them, where bfloat16 rounds each by up to 2^-9 of itself. Products
    within a unit are added up as whole numbers, and the units' sums in float32. From several tokens on
    (``INT8_IN_BFLOAT16`` and ``INT4_IN_BFLOAT16`` of cpu_linear.c), inputs in bfloat16 stay as they are on
    a CPU that multiplies these, and int4 weights are rounded to bfloat16, as for many tokens.
    """

    def __init__(self, layers: Sequence[tuple[Stored, torch.Tensor | None]]) -> None:
        """``layers`` are weights and biases (N,), of one kind, group size and number of columns."""
        self._layers = tuple(layers)
        first = self._layers[0][0]
        self._shape = (first.columns, first.group)
        assert all((w.kind, w.columns, w.group) == (first.kind, *self._shape) for w, _ in layers)
        self._outputs = tuple(weight.outputs for weight, _ in layers)
        self._kind = first.kind
        self._described = (Layer * len(self._layers))(
            *(described_layer(*layer) for layer in layers)
        )

    def __call__(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's outputs (..., N), in the dtype of ``inputs`` (..., K)."""
        _check(inputs, self._shape[0])
        if inputs.numel() > few_tokens(self._kind) * self._shape[0]:
            return many(inputs, self._layers, self._described)
        return _few(inputs, self._kind, self._shape, self._outputs, self._described)


def few_tokens(kind: int) -> int:
    """Up to how many tokens are few, for a kind of layer."""
    return _FEW_DYNAMIC if kind == INT8_DYNAMIC else _FEW


def _check(inputs: torch.Tensor, columns: int) -> None:
    """Refuse inputs of another layer, of which C would read, or write, beyond the end."""
    if inputs.shape[-1] != columns:
        raise ValueError(
            f"The inputs have {inputs.shape[-1]} columns ({tuple(inputs.shape)}), and the weight has "
            f"{columns}. Give inputs whose last dimension is {columns}."
        )


def _few(
    inputs: torch.Tensor,
    kind: int,
    shape: tuple[int, int],
    outputs: tuple[int, ...],
    layers: "ctypes.Array[Layer]",
) -> list[torch.Tensor]:
    """What :class:`Linears` computes for few tokens: of ``layers`` of ``kind``, (columns, group size)."""
    inputs = inputs.contiguous()
    batch = inputs.shape[:-1]
    results = [inputs.new_empty((*batch, n)) for n in outputs]
    pointers = (ctypes.c_void_p * len(results))(*(result.data_ptr() for result in results))
    compiled = required()
    failed = compiled.linear(
        compiled.level,
        compiled.parallel,
        torch.get_num_threads(),
        kind,
        layers,
        len(results),
        inputs.data_ptr(),
        DTYPES[inputs.dtype],
        inputs.numel() // shape[0],
        *shape,
        pointers,
    )
    if failed:
        raise MemoryError
    return results


def linear(inputs: torch.Tensor, weight: Stored, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs @ weight.T + bias``: one layer, which ``torch.compile`` can compile around.

    Args:
        inputs: (..., K) bfloat16, float16 or float32.
        bias: (N,) of one of these dtypes.

    Returns:
        (..., N) in the dtype of ``inputs``.
    """
    output: torch.Tensor = torch.ops.smolquant.linear(
        inputs, weight.levels, weight.scale, weight.zero_point, weight.dynamic, bias
    )
    return output


def takes(inputs: torch.Tensor) -> bool:
    """Whether inputs of this dtype, on this device, can be computed with."""
    return inputs.is_cpu and inputs.is_floating_point() and inputs.dtype in DTYPES


def is_compiled() -> bool:
    """Whether smolquant was installed with its compiled code."""
    return library() is not None


def has_threads() -> bool:
    """Whether the compiled code can use as many threads as torch does."""
    return required().parallel is not None or torch.get_num_threads() == 1


_OPERATIONS: Any = torch.library.Library("smolquant", "DEF")  # type: ignore[no-untyped-call]
_OPERATIONS.define(
    "linear(Tensor inputs, Tensor levels, Tensor scale, Tensor? zero_point, bool dynamic, Tensor? bias) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
"""What compiled models call for each layer and token, without what ``torch.library.custom_op`` puts
around each call, which a small model's token feels."""

_MOST_KNOWN = 1 << 14
_known: "dict[tuple[object, ...], ctypes.Array[Layer]]" = {}
"""What C was told of a layer, by all that it was told; nothing in it keeps a weight."""


def _op(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dynamic: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    weight = Stored(levels, scale, zero_point, dynamic)
    kind, columns, outputs = weight.kind, weight.columns, weight.outputs
    _check(inputs, columns)
    parts = (levels, scale, zero_point, bias)
    told = tuple(None if one is None else (one.data_ptr(), one.dtype) for one in parts)
    key = (outputs, *told)
    described = _known.get(key)
    if described is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        described = _known[key] = (Layer * 1)(described_layer(weight, bias))
    if inputs.numel() > few_tokens(kind) * columns:
        return many(inputs, [(weight, bias)], described)[0]
    return _few(inputs, kind, (columns, weight.group), (outputs,), described)[0]


def _without_values(inputs: torch.Tensor, levels: torch.Tensor, *_: object) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], levels.shape[0]))


_OPERATIONS.impl("linear", _op, "CPU")
torch.library.register_fake("smolquant::linear", _without_values, lib=_OPERATIONS)
