"""Linear layers for many tokens, from int8 and int4 weights as they are stored.

Many tokens are bounded by arithmetic, which torch's matrix products do best: the weights are widened a
block at a time, and each block is used for all tokens. Where a CPU multiplies whole numbers faster still,
what is quantized to int8 is multiplied as it is.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch

from smolquant.runtime.compiled import (
    DTYPES,
    Layer,
    Stored,
    described,
    described_layer,
    library,
    required,
)

_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

HAS_AMX = _AVX512 and torch.cpu._is_amx_tile_supported()
"""Whether this CPU multiplies tiles, of bfloat16 among others."""

HAS_BFLOAT16 = _AVX512 and (torch.cpu._is_avx512_bf16_supported() or HAS_AMX)
"""Whether it multiplies bfloat16 by instructions of its own."""

HAS_INT8 = HAS_BFLOAT16 and torch.cpu._is_vnni_supported()
"""Whether it multiplies whole numbers of 8 bits faster still."""

_BLOCK_BYTES = (32 if HAS_BFLOAT16 else 4) << 20
"""What is widened of a layer's weights at a time for many tokens. With instructions for bfloat16, products
of fewer rows take up to twice as long; without, caches hold what was widened."""


class _Room(threading.local):
    """Each thread's room for what is widened.

    The system takes as long to give new pages as it takes to fill them, and right after a product of many
    tokens, which leaves nothing else in the caches, each of Python's steps takes several times as long as
    otherwise: what a layer's shape needs is kept, too.
    """

    _MOST_KNOWN = 256

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._known: dict[tuple[int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor, int]] = {}

    def block(
        self, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(rows, columns) of it, with any values; the same transposed; and its address."""
        known = self._known.get((rows, columns, dtype))
        if known is None:
            known = self._known[rows, columns, dtype] = self._made(rows, columns, dtype)
        return known

    def _made(
        self, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        size = rows * columns * dtype.itemsize
        if len(self._bytes) < size or len(self._known) == self._MOST_KNOWN:
            self._known.clear()
        with torch.inference_mode(False):  # what is made there may not be written to elsewhere
            if len(self._bytes) < size:
                self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
            block = self._bytes[:size].view(dtype).view(rows, columns)
            return block, block.t(), block.data_ptr()


_room = _Room()


def in_blocks(
    inputs: torch.Tensor,
    outputs: int,
    widen: Callable[[int, int, torch.Tensor], object],
    bias: torch.Tensor | None,
    *,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A layer's outputs for many tokens, some of its rows at a time.

    Args:
        inputs: (n, K).
        outputs: N.
        widen: given the first row, the one after the last, and an empty (rows, K) tensor, fills it.
        token_scale: (n,) float32 that the outputs are multiplied with, if any.
        dtype: of the result; by default that of ``inputs``.

    Returns:
        (n, N).
    """
    columns, dtype = inputs.shape[1], dtype or inputs.dtype
    product = matmul_dtype(dtype)
    rows = min(max(1, _BLOCK_BYTES // (columns * product.itemsize)), outputs)
    block, _, _ = _room.block(rows, columns, product)
    inputs = inputs.to(product)

    def sums(start: int, stop: int) -> torch.Tensor:
        wide = block[: stop - start]
        widen(start, stop, wide)
        return torch.mm(inputs, wide.t())

    return _joined(sums, (len(inputs), outputs), rows, None, token_scale, bias, dtype)


def _joined(
    sums: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    rows: int,
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Outputs of ``shape`` from ``sums``, of which each call gives those of up to ``rows`` rows."""
    outputs = shape[1]
    as_they_are = scale is None and token_scale is None and bias is None
    result: torch.Tensor | None = None
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        some = sums(start, stop)
        whole = stop - start == outputs and some.dtype == dtype
        if result is None:
            result = some if whole else some.new_empty(shape, dtype=dtype)
        if not (whole and as_they_are):
            parts = [None if of is None else of[start:stop] for of in (scale, bias)]
            _finish(some, parts, token_scale, result[:, start:stop])
    assert result is not None
    return result


def _finish(
    sums: torch.Tensor,
    parts: Sequence[torch.Tensor | None],
    token_scale: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """``result`` (n, N) becomes the ``sums`` times both scales, with the bias; rows may lie apart.

    Args:
        parts: scale and bias, (N,) each.
    """
    scale, bias = parts
    compiled = library()
    if compiled is None:
        for factor in (scale, None if token_scale is None else token_scale.unsqueeze(1)):
            sums = sums if factor is None else sums * factor
        result.copy_(sums if bias is None else sums + bias)
        return
    compiled.finish(
        compiled.level,
        compiled.parallel,
        torch.get_num_threads(),
        described(sums.shape[1], scale=scale, bias=bias),
        sums.data_ptr(),
        DTYPES[sums.dtype],
        None if token_scale is None else token_scale.data_ptr(),
        len(sums),
        sums.stride(0),
        result.data_ptr(),
        DTYPES[result.dtype],
        result.stride(0),
    )


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what this CPU multiplies matrices of ``dtype`` fastest.

    A CPU without instructions for bfloat16 takes several times as long for it as for float32.
    """
    if dtype == torch.bfloat16 and HAS_BFLOAT16:
        return torch.bfloat16
    return torch.float32


def many(
    inputs: torch.Tensor,
    layers: Sequence[tuple[Stored, torch.Tensor | None]],
    told: "ctypes.Array[Layer]",
) -> list[torch.Tensor]:
    """The outputs (..., N) of layers with the same inputs (..., K), in their dtype.

    Those of several layers can be views of one tensor.

    Args:
        layers: weights and biases (N,), of one kind, group size and number of columns.
        told: what C is told of them.
    """
    flat, token_scale, dtype = inputs.reshape(-1, inputs.shape[-1]), None, inputs.dtype
    dynamic = layers[0][0].dynamic
    if dynamic:
        flat, token_scale = _quantized_tokens(flat)
    if dynamic and HAS_INT8:
        results = [_by_levels(flat, token_scale, *layer, dtype) for layer in layers]
    elif _bytes(layers, dtype) <= _BLOCK_BYTES:
        results = _in_one_block(flat, token_scale, layers, told, dtype)
    else:
        results = [
            in_blocks(
                flat,
                weight.outputs,
                _widened(weight),
                bias,
                token_scale=token_scale,
                dtype=dtype,
            )
            for weight, bias in layers
        ]
    return [result.view(*inputs.shape[:-1], -1) for result in results]


def _bytes(layers: Sequence[tuple[Stored, torch.Tensor | None]], dtype: torch.dtype) -> int:
    """How large the layers' weights are when they are widened."""
    weights = sum(weight.outputs * weight.columns for weight, _ in layers)
    return weights * matmul_dtype(dtype).itemsize


def _by_levels(
    levels: torch.Tensor,
    token_scale: torch.Tensor | None,
    weight: Stored,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(n, N) outputs from products of whole numbers, ``levels`` (n, K) int8 being the inputs."""
    by_column = weight.levels.t()
    return _joined(
        lambda start, stop: torch._int_mm(levels, by_column[:, start:stop]),
        (len(levels), weight.outputs),
        max(1, _BLOCK_BYTES // (4 * len(levels))),
        weight.scale.flatten(),
        token_scale,
        bias,
        dtype,
    )


def _in_one_block(
    inputs: torch.Tensor,
    token_scale: torch.Tensor | None,
    layers: Sequence[tuple[Stored, torch.Tensor | None]],
    told: "ctypes.Array[Layer]",
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Each layer's (n, N) outputs, of one product."""
    product, sizes = matmul_dtype(dtype), [weight.outputs for weight, _ in layers]
    _, by_column, address = _room.block(sum(sizes), inputs.shape[1], product)
    _widen(layers[0][0], told, product, address)
    sums = torch.mm(inputs if inputs.dtype == product else inputs.to(product), by_column)
    results = []
    parts = [sums] if len(sizes) == 1 else torch.split(sums, sizes, dim=1)
    for (_, bias), some in zip(layers, parts, strict=True):
        result = some
        if some.dtype != dtype or bias is not None or token_scale is not None:
            result = some.new_empty(some.shape, dtype=dtype)
            _finish(some, (None, bias), token_scale, result)
        results.append(result)
    return results


def _quantized_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, K) int8 levels, and (n,) scales in float32, of inputs (n, K)."""
    levels = inputs.new_empty(inputs.shape, dtype=torch.int8)
    scale = inputs.new_empty(len(inputs), dtype=torch.float32)
    compiled, inputs = required(), inputs.contiguous()
    compiled.quantize(
        compiled.level,
        compiled.parallel,
        torch.get_num_threads(),
        inputs.data_ptr(),
        DTYPES[inputs.dtype],
        *inputs.shape,
        levels.data_ptr(),
        scale.data_ptr(),
    )
    return levels, scale


def _widened(weight: Stored) -> Callable[[int, int, torch.Tensor], None]:
    """What :func:`in_blocks` widens with."""

    def widen(start: int, stop: int, out: torch.Tensor) -> None:
        some = _rows(weight, start, stop)
        _widen(some, (Layer * 1)(described_layer(some, None)), out.dtype, out.data_ptr())

    return widen


def _rows(weight: Stored, start: int, stop: int) -> Stored:
    zero_point = None if weight.zero_point is None else weight.zero_point[start:stop]
    return Stored(weight.levels[start:stop], weight.scale[start:stop], zero_point)


def _widen(first: Stored, layers: "ctypes.Array[Layer]", dtype: torch.dtype, address: int) -> None:
    """What lies at ``address``, bfloat16 or float32, becomes the weights of ``layers``, like ``first``."""
    compiled = required()
    compiled.widen(
        compiled.level,
        compiled.parallel,
        torch.get_num_threads(),
        first.kind,
        layers,
        len(layers),
        first.columns,
        first.group,
        DTYPES[dtype],
        address,
    )
