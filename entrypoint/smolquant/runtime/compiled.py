"""cpu_linear.c as Python calls it: layers of stored weights, and the library.

What it is told of are plain tensors; it knows neither torchao's classes nor models.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_COMPILED = Path(__file__).with_name("_cpu_linear.so")
"""cpu_linear.c, where smolquant was installed with its compiled code."""

INT8, INT8_DYNAMIC, INT4 = range(3)
"""Kinds of layers, as cpu_linear.c counts them."""

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3}
"""The dtypes that cpu_linear.c reads, and all but the last writes, and what it calls them."""

_LEVELS = {"AVX512": 2, "AVX2": 1}
"""torch's name for what this CPU can do -> the loops of cpu_linear_level.h; else the portable ones run."""

_WITH_BFLOAT16 = 3
"""What AVX512 becomes on a CPU that multiplies bfloat16 by an instruction of its own, too."""


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
            return INT4
        return INT8_DYNAMIC if self.dynamic else INT8

    @property
    def group(self) -> int:
        """The columns that share a scale."""
        return self.columns if self.zero_point is None else self.columns // self.scale.shape[1]


class Layer(ctypes.Structure):
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


def described_layer(weight: Stored, bias: torch.Tensor | None) -> Layer:
    """What C is told of a layer with its weight and bias (N,), which have to outlive it."""
    return described(
        weight.outputs,
        scale=weight.scale,
        bias=bias,
        levels=weight.levels,
        zero_point=weight.zero_point,
    )


def described(
    outputs: int, *, scale: torch.Tensor | None, bias: torch.Tensor | None, **others: Any
) -> Layer:
    """What C is told of a layer: its scale and bias, (N,) each, and ``others`` by the name of their field.

    The tensors have to outlive it.
    """
    parts = {**others, "scale": scale, "bias": bias}
    addresses = {name: part.data_ptr() for name, part in parts.items() if part is not None}
    dtypes = {
        f"{name}_dtype": DTYPES[part.dtype]
        for name, part in (("scale", scale), ("bias", bias))
        if part is not None
    }
    return Layer(outputs=outputs, **addresses, **dtypes)


@dataclass(frozen=True)
class Library:
    """The compiled code, ready to be called."""

    linear: Callable[..., int]
    widen: Callable[..., None]
    quantize: Callable[..., None]
    finish: Callable[..., None]
    parallel: int | None
    """The address of OpenMP's ``GOMP_parallel`` in torch's own runtime; None where it has none."""
    level: int


@cache
def library() -> Library | None:
    """The compiled code; None where smolquant was installed without it, or with another version's."""
    try:
        loaded = ctypes.CDLL(str(_COMPILED))
        names = ("linear", "widen_layers", "quantize", "finish")
        linear, widen, quantize, finish = (loaded[f"smolquant_{name}"] for name in names)
    except (OSError, AttributeError):
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    start, layers = (number, pointer, ctypes.c_uint), ctypes.POINTER(Layer)
    linear.argtypes = (
        *(*start, number, layers, size),
        *(pointer, number, size, size, size, pointer),
    )
    widen.argtypes = (*start, number, layers, size, size, size, number, pointer)
    quantize.argtypes = (*start, pointer, number, size, size, pointer, pointer)
    finish.argtypes = (
        *(*start, layers, pointer, number, pointer, size, size),
        *(pointer, number, size),
    )
    widen.restype = quantize.restype = finish.restype = None
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), 0)
    if level == _LEVELS["AVX512"] and torch.cpu._is_avx512_bf16_supported():
        level = _WITH_BFLOAT16
    return Library(linear, widen, quantize, finish, _torch_parallel(), level)


def required() -> Library:
    """The compiled code, where :func:`library` has said that it is there."""
    loaded = library()
    assert loaded is not None
    return loaded


def _torch_parallel() -> int | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch has loaded, whichever it is.

    Looked for among what torch's library depends on: another runtime's threads would compete with torch's.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
