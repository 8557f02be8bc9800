"""Linear layers on a CPU, from int8 and int4 weights as they are stored.

Nothing is packed, copied or dequantized when a model is loaded: cpu_linear.c reads the published bytes. One
token or a few are bounded by how fast memory gives the weights, so they are multiplied on their way from there.
Many tokens are bounded by arithmetic, which torch's matrix product does best: there the weights are widened a
block at a time, and each block is used for all tokens.

What this computes with is plain tensors; it knows neither torchao's classes nor models.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

FEW_TOKENS = 16
"""Up to how many tokens weights are multiplied where they are read. `make bench-runtime` prints the times
around it: on AVX2 both ways take as long at 12 to 24 tokens, depending on the shape."""

_BLOCK_ELEMENTS = 1 << 20
"""The weights that are widened at a time for many tokens: 4 MB in float32, which caches hold."""

_UNIT_COLUMNS = 32
"""The columns that the C code takes at a time of int4: UNIT of cpu_linear.c."""

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The dtypes that cpu_linear.c reads and writes, and what it calls them."""

_LEVELS = {"AVX512": 2, "AVX2": 1}
"""torch's name for what this CPU can do -> the loops of cpu_linear_level.h; others run the portable ones."""


@dataclass(frozen=True)
class _Library:
    """The compiled code, ready to be called."""

    int8_linear: Callable[..., int]
    int4_linear: Callable[..., int]
    int8_widen: Callable[..., None]
    int4_dequantize: Callable[..., None]
    parallel: int | None
    """The address of OpenMP's ``GOMP_parallel`` in torch's own runtime; None where it has none."""
    level: int


def is_compiled() -> bool:
    """Whether smolquant was installed with its compiled code."""
    return _library() is not None


def has_threads() -> bool:
    """Whether the compiled code can use as many threads as torch does."""
    return _required().parallel is not None or torch.get_num_threads() == 1


def takes(inputs: torch.Tensor) -> bool:
    """Whether inputs of this dtype, on this device, can be computed with."""
    return inputs.device.type == "cpu" and inputs.dtype in _DTYPES


def int8_linear(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    dynamic: bool = False,
) -> torch.Tensor:
    """``inputs @ (levels * scale).T + bias``, summed in float32.

    Args:
        inputs: (..., K) bfloat16, float16 or float32.
        levels: (N, K) int8, contiguous.
        scale: N values, one a row, contiguous.
        dynamic: quantize each token to int8 first, as torchao's ``Int8Tensor.from_hp`` does row by row.

    Returns:
        (..., N) in the dtype of ``inputs``.
    """
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = torch.ops.smolquant.int8_linear(
            inputs, levels, scale, bias, dynamic
        )
        return compiled
    return _int8_linear(inputs, levels, scale, bias, dynamic)


def int4_linear(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``inputs @ (levels * scale + zero_point).T + bias``, summed in float32.

    Up to :data:`FEW_TOKENS` tokens are computed with as whole numbers of 16 bits, 32 columns in a unit of
    their own: an error of 2^-16 of the largest of them, where bfloat16 rounds each by up to 2^-9 of itself.

    Args:
        inputs: (..., K) bfloat16, float16 or float32.
        levels: (N, K / 2) int8, the layout of :func:`smolquant.schemes.int4_packing.pack_int4`, contiguous.
        scale: (N, K / group size), a group being 32, 64, 128, 256, ... columns; contiguous.
        zero_point: like ``scale``, in the same dtype.

    Returns:
        (..., N) in the dtype of ``inputs``.
    """
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = torch.ops.smolquant.int4_linear(
            inputs, levels, scale, zero_point, bias
        )
        return compiled
    return _int4_linear(inputs, levels, scale, zero_point, bias)


def _int8_linear(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dynamic: bool,
) -> torch.Tensor:
    outputs, columns = levels.shape
    tokens = inputs.numel() // columns
    if tokens > FEW_TOKENS:
        return _many_int8(inputs, levels, scale, bias, dynamic)
    inputs = inputs.contiguous()
    result = torch.empty((*inputs.shape[:-1], outputs), dtype=inputs.dtype)
    library = _required()
    _check(
        library.int8_linear(
            library.level,
            library.parallel,
            torch.get_num_threads(),
            dynamic,
            inputs.data_ptr(),
            _DTYPES[inputs.dtype],
            levels.data_ptr(),
            scale.data_ptr(),
            _DTYPES[scale.dtype],
            *_bias(bias),
            result.data_ptr(),
            tokens,
            outputs,
            columns,
        )
    )
    return result


def _int4_linear(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    outputs, columns = levels.shape[0], 2 * levels.shape[1]
    tokens = inputs.numel() // columns
    if tokens > FEW_TOKENS:
        return _many_int4(inputs, levels, scale, zero_point, bias)
    inputs = inputs.contiguous()
    result = torch.empty((*inputs.shape[:-1], outputs), dtype=inputs.dtype)
    library = _required()
    _check(
        library.int4_linear(
            library.level,
            library.parallel,
            torch.get_num_threads(),
            inputs.data_ptr(),
            _DTYPES[inputs.dtype],
            levels.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr(),
            _DTYPES[scale.dtype],
            columns // scale.shape[1],
            *_bias(bias),
            result.data_ptr(),
            tokens,
            outputs,
            columns,
        )
    )
    return result


def dequantize_int4(
    levels: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, out: torch.Tensor
) -> None:
    """``out = levels * scale + zero_point`` of whole rows; arguments as for :func:`int4_linear`.

    Args:
        out: (n, K), bfloat16 or float32, contiguous.
    """
    library = _required()
    library.int4_dequantize(
        library.level,
        library.parallel,
        torch.get_num_threads(),
        levels.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        _DTYPES[scale.dtype],
        out.shape[1] // scale.shape[1],
        out.data_ptr(),
        _DTYPES[out.dtype],
        *out.shape,
    )


def _widen_int8(levels: torch.Tensor, out: torch.Tensor) -> None:
    library = _required()
    library.int8_widen(
        library.level,
        library.parallel,
        torch.get_num_threads(),
        levels.data_ptr(),
        out.data_ptr(),
        _DTYPES[out.dtype],
        *out.shape,
    )


def _many_int8(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dynamic: bool,
) -> torch.Tensor:
    """The scales go on the outputs, so that levels are exact in whatever they are widened to."""
    token_scale = None
    flat = inputs.reshape(-1, inputs.shape[-1])
    dtype = inputs.dtype
    if dynamic:
        flat, token_scale = _quantized_tokens(flat)

    def widen(start: int, stop: int, out: torch.Tensor) -> None:
        _widen_int8(levels[start:stop], out)

    result = in_blocks(
        flat, len(levels), widen, bias, dtype, scale=scale.flatten(), token_scale=token_scale
    )
    return result.view(*inputs.shape[:-1], -1)


def _many_int4(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    def dequantize(start: int, stop: int, out: torch.Tensor) -> None:
        dequantize_int4(levels[start:stop], scale[start:stop], zero_point[start:stop], out)

    flat = inputs.reshape(-1, inputs.shape[-1])
    result = in_blocks(flat, len(levels), dequantize, bias, inputs.dtype)
    return result.view(*inputs.shape[:-1], -1)


def _quantized_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, K) whole numbers in float32, and (n, 1) scales, float32: what quantize_tokens does in C."""
    scale = (inputs.abs().amax(1, keepdim=True) / 127.5).float().clamp_(min=2.0**-23)
    return (inputs.float() * (1 / scale)).round_().clamp_(-128, 127), scale


def in_blocks(
    inputs: torch.Tensor,
    outputs: int,
    widen: Callable[[int, int, torch.Tensor], None],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    scale: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """A layer's outputs, some of its rows at a time.

    Args:
        inputs: (n, K).
        widen: given the first row, the one after the last, and an empty (rows, K) tensor, fills it.
        scale: (N,) that the outputs are multiplied with, if any.
        token_scale: (n, 1) that they are multiplied with, too.

    Returns:
        (n, N) in ``dtype``.
    """
    columns = inputs.shape[1]
    product = matmul_dtype(dtype)
    result = torch.empty(len(inputs), outputs, dtype=dtype)
    rows = max(1, min(_BLOCK_ELEMENTS // columns, outputs))
    block = torch.empty(rows, columns, dtype=product)
    sums = torch.empty(len(inputs), rows, dtype=product)
    inputs = inputs.to(product)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        widen(start, stop, block[: stop - start])
        wide = block[: stop - start].t()
        some = torch.mm(inputs, wide, out=sums) if stop - start == rows else torch.mm(inputs, wide)
        if scale is not None:
            some = some.mul_(scale[start:stop])
        if token_scale is not None:
            some = some.mul_(token_scale)
        if bias is not None:
            some = some.add_(bias[start:stop])
        result[:, start:stop] = some
    return result


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what this CPU multiplies matrices of ``dtype`` fastest.

    A CPU without instructions for bfloat16 takes five times as long for it as for float32.
    """
    if dtype == torch.bfloat16 and _has_bfloat16():
        return torch.bfloat16
    return torch.float32


@cache
def _has_bfloat16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _bias(bias: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), _DTYPES[bias.dtype])


def _check(failed: int) -> None:
    if failed:
        raise MemoryError


def _required() -> _Library:
    library = _library()
    assert library is not None, "ask is_compiled() first"
    return library


@cache
def _library() -> _Library | None:
    spec = find_spec("smolquant.runtime._cpu_linear")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    threads = (number, pointer, ctypes.c_uint)
    ending = (pointer, number, pointer, size, size, size)  # bias, result, and the shape
    signatures = {
        "int8_linear": (number, pointer, number, pointer, pointer, number, *ending),
        "int4_linear": (pointer, number, pointer, pointer, pointer, number, size, *ending),
        "int8_widen": (pointer, pointer, number, size, size),
        "int4_dequantize": (pointer, pointer, pointer, number, size, pointer, number, size, size),
    }
    functions = {}
    for name, arguments in signatures.items():
        function = getattr(loaded, f"smolquant_{name}", None)
        if function is None:
            return None  # from another version's source
        function.argtypes = (*threads, *arguments)
        function.restype = number if name.endswith("linear") else None
        functions[name] = function
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return _Library(**functions, parallel=_torch_parallel(), level=level)


def _torch_parallel() -> int | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch has loaded, whichever it is.

    Looked for among what torch's library depends on: another runtime's threads would compete with torch's.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@torch.library.custom_op("smolquant::int8_linear", mutates_args=())
def _int8_op(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dynamic: bool,
) -> torch.Tensor:
    return _int8_linear(inputs, levels, scale, bias, dynamic)


@torch.library.custom_op("smolquant::int4_linear", mutates_args=())
def _int4_op(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _int4_linear(inputs, levels, scale, zero_point, bias)


@_int8_op.register_fake
def _(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dynamic: bool,
) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], levels.shape[0]))


@_int4_op.register_fake
def _(
    inputs: torch.Tensor,
    levels: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], levels.shape[0]))
