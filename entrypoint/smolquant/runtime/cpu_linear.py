"""Linear layers on a CPU, from int8 and int4 weights as they are stored.

Nothing is packed, copied or dequantized when a model is loaded: cpu_linear.c reads the published bytes.
One token or a few are bounded by how fast memory gives the weights, so they are multiplied on their way
from there. Many tokens are bounded by arithmetic, which torch's matrix product does best: there the weights
are widened a block at a time, and each block is used for all tokens.

What this computes with is plain tensors; it knows neither torchao's classes nor models.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_COMPILED = Path(__file__).with_name("_cpu_linear.so")
"""cpu_linear.c, where smolquant was installed with its compiled code."""

_BLOCK_ELEMENTS = 1 << 20
"""The weights that are widened at a time for many tokens: 4 MB in float32, which caches hold."""

_INT8, _INT8_DYNAMIC, _INT4 = range(3)
"""Kinds of layers, as cpu_linear.c counts them."""

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The dtypes that cpu_linear.c reads and writes, and what it calls them."""

_HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and (
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)
"""Whether this CPU multiplies bfloat16 by instructions of its own."""

FEW_TOKENS = 16 if _HAS_BFLOAT16 else 48
"""Up to how many tokens weights are multiplied where they are read. On AVX2 both ways take as long at 32
to more than 64 tokens, see docs/runtime.md; the 16 of CPUs with a faster product are not measured."""

_LEVELS = {"AVX512": 2, "AVX2": 1}
"""torch's name for what this CPU can do -> the loops of cpu_linear_level.h; else the portable ones run."""


@dataclass(frozen=True)
class Stored:
    """A layer's weight (N, K) as it is stored, all of it contiguous and on the CPU."""

    levels: torch.Tensor
    """int8: (N, K). int4: (N, K / 2) int8, see :func:`smolquant.schemes.int4_packing.pack_int4`."""
    scale: torch.Tensor
    """int8: N values, one a row. int4: (N, K / group size), a group being 32, 64, 128, ... 2048 columns.
    bfloat16, float16 or float32."""
    zero_point: torch.Tensor | None = None
    """int4 alone: like ``scale``, in its dtype; the weight is levels * scale + zero_point."""
    dynamic: bool = False
    """int8 alone: quantize each token to int8 first, as torchao's ``Int8Tensor.from_hp`` does by row."""

    @property
    def outputs(self) -> int:
        """N."""
        return self.levels.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        return self.levels.shape[1] * (1 if self.zero_point is None else 2)

    @property
    def kind(self) -> int:
        """What cpu_linear.c calls it."""
        if self.zero_point is not None:
            return _INT4
        return _INT8_DYNAMIC if self.dynamic else _INT8

    @property
    def group(self) -> int:
        """The columns that share a scale."""
        return self.columns if self.zero_point is None else self.columns // self.scale.shape[1]


class Linears:
    """Linear layers with the same inputs, computed in one call.

    The sums are float32's. int4 takes up to :data:`FEW_TOKENS` tokens as whole numbers of 16 bits, 32
    columns in a unit of their own: an error of 2^-16 of the largest of them, where bfloat16 rounds each by
    up to 2^-9 of itself.
    """

    def __init__(self, layers: Sequence[tuple[Stored, torch.Tensor | None]]) -> None:
        """``layers`` are weights and biases (N,), of one kind, group size and number of columns."""
        self._layers = tuple(layers)
        first = self._layers[0][0]
        self._shape = (first.columns, first.group)
        assert all((w.kind, w.columns, w.group) == (first.kind, *self._shape) for w, _ in layers)
        self._outputs = tuple(weight.outputs for weight, _ in layers)
        self._kind = first.kind
        self._described = (_Layer * len(self._layers))(*(_described(*layer) for layer in layers))

    def __call__(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Each layer's outputs (..., N), in the dtype of ``inputs`` (..., K)."""
        if inputs.numel() > FEW_TOKENS * self._shape[0]:
            return [_many(inputs, weight, bias) for weight, bias in self._layers]
        inputs = inputs.contiguous()
        batch, dtype = inputs.shape[:-1], inputs.dtype
        results = [torch.empty((*batch, n), dtype=dtype) for n in self._outputs]
        pointers = (ctypes.c_void_p * len(results))(*(result.data_ptr() for result in results))
        library = _required()
        failed = library.linear(
            library.level,
            library.parallel,
            torch.get_num_threads(),
            self._kind,
            self._described,
            len(results),
            inputs.data_ptr(),
            _DTYPES[dtype],
            inputs.numel() // self._shape[0],
            *self._shape,
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
    return inputs.is_cpu and inputs.dtype in _DTYPES


def is_compiled() -> bool:
    """Whether smolquant was installed with its compiled code."""
    return _library() is not None


def has_threads() -> bool:
    """Whether the compiled code can use as many threads as torch does."""
    return _required().parallel is not None or torch.get_num_threads() == 1


def in_blocks(
    inputs: torch.Tensor,
    outputs: int,
    widen: Callable[[int, int, torch.Tensor], object],
    bias: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A layer's outputs for many tokens, some of its rows at a time.

    Args:
        inputs: (n, K).
        outputs: N.
        widen: given the first row, the one after the last, and an empty (rows, K) tensor, fills it.
        scale: (N,) that the outputs are multiplied with, if any.
        token_scale: (n, 1) that they are multiplied with, too.
        dtype: of the result; by default that of ``inputs``.

    Returns:
        (n, N).
    """
    columns, dtype = inputs.shape[1], dtype or inputs.dtype
    product = matmul_dtype(dtype)
    result = torch.empty(len(inputs), outputs, dtype=dtype)
    rows = max(1, min(_BLOCK_ELEMENTS // columns, outputs))
    block = torch.empty(rows, columns, dtype=product)
    inputs = inputs.to(product)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        wide = block[: stop - start]
        widen(start, stop, wide)
        some = torch.mm(inputs, wide.t())
        if scale is not None:
            some.mul_(scale[start:stop])
        if token_scale is not None:
            some.mul_(token_scale)
        if bias is not None:
            some.add_(bias[start:stop])
        result[:, start:stop] = some
    return result


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what this CPU multiplies matrices of ``dtype`` fastest.

    A CPU without instructions for bfloat16 takes several times as long for it as for float32.
    """
    if dtype == torch.bfloat16 and _HAS_BFLOAT16:
        return torch.bfloat16
    return torch.float32


def _many(inputs: torch.Tensor, weight: Stored, bias: torch.Tensor | None) -> torch.Tensor:
    """As :func:`linear`. int8's scales go on the outputs, so that its levels are exact in any dtype."""
    flat, token_scale = inputs.reshape(-1, inputs.shape[-1]), None
    if weight.dynamic:
        flat, token_scale = _quantized_tokens(flat)
    result = in_blocks(
        flat,
        weight.outputs,
        lambda start, stop, out: _widen(_rows(weight, start, stop), out),
        bias,
        scale=weight.scale.flatten() if weight.zero_point is None else None,
        token_scale=token_scale,
        dtype=inputs.dtype,
    )
    return result.view(*inputs.shape[:-1], -1)


def _quantized_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, K) whole numbers in float32, and (n, 1) scales, float32: what quantize_tokens does in C."""
    scale = (inputs.abs().amax(1, keepdim=True) / 127.5).float().clamp_(min=2.0**-23)
    return (inputs.float() * (1 / scale)).round_().clamp_(-128, 127), scale


def _rows(weight: Stored, start: int, stop: int) -> Stored:
    zero_point = None if weight.zero_point is None else weight.zero_point[start:stop]
    return Stored(weight.levels[start:stop], weight.scale[start:stop], zero_point)


def _widen(weight: Stored, out: torch.Tensor) -> None:
    """``out``, (N, K) in bfloat16 or float32, becomes the weight; of int8 its levels, without the scale."""
    library = _required()
    library.widen(
        library.level,
        library.parallel,
        torch.get_num_threads(),
        weight.kind,
        _described(weight, None),
        weight.columns,
        weight.group,
        _DTYPES[out.dtype],
        out.data_ptr(),
    )


class _Layer(ctypes.Structure):
    """``layer`` of cpu_linear.c."""

    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
    )


def _described(weight: Stored, bias: torch.Tensor | None) -> _Layer:
    """What C is told of a layer, whose tensors have to outlive it."""
    return _Layer(
        weight.levels.data_ptr(),
        weight.scale.data_ptr(),
        None if weight.zero_point is None else weight.zero_point.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.outputs,
        _DTYPES[weight.scale.dtype],
        0 if bias is None else _DTYPES[bias.dtype],
    )


@dataclass(frozen=True)
class _Library:
    """The compiled code, ready to be called."""

    linear: Callable[..., int]
    widen: Callable[..., None]
    parallel: int | None
    """The address of OpenMP's ``GOMP_parallel`` in torch's own runtime; None where it has none."""
    level: int


@cache
def _library() -> _Library | None:
    try:
        loaded = ctypes.CDLL(str(_COMPILED))
        linear, widen = loaded.smolquant_linear, loaded.smolquant_widen
    except (OSError, AttributeError):
        return None  # never compiled, or from another version's source
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    start = (number, pointer, ctypes.c_uint, number, ctypes.POINTER(_Layer))
    linear.argtypes = (*start, size, pointer, number, size, size, size, pointer)
    widen.argtypes = (*start, size, size, number, pointer)
    widen.restype = None
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return _Library(linear, widen, _torch_parallel(), level)


def _required() -> _Library:
    library = _library()
    assert library is not None, "ask is_compiled() first"
    return library


def _torch_parallel() -> int | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch has loaded, whichever it is.

    Looked for among what torch's library depends on: another runtime's threads would compete with torch's.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@torch.library.custom_op("smolquant::linear", mutates_args=())
def _op(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    dynamic: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return Linears([(Stored(levels, scale, zero_point, dynamic), bias)])(inputs)[0]


@_op.register_fake
def _(inputs: torch.Tensor, levels: torch.Tensor, *_: object) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], levels.shape[0]))
