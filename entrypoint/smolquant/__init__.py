"""Quantize Hugging Face language models with torchao and publish the variants.

Importing this package imports no torch; its functions bring it in when they are first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolquant.runtime.kernels import dequantize as dequantize
    from smolquant.runtime.kernels import kernels as kernels
    from smolquant.runtime.load import load as load

try:
    __version__ = version("smolquant")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"

__all__ = ["__version__", "dequantize", "kernels", "load"]

_FROM = {"load": "load", "kernels": "kernels", "dequantize": "kernels"}
"""Name -> the module of ``smolquant.runtime`` that it is in."""


def __getattr__(name: str) -> Any:
    if name in _FROM:
        from smolquant.remarks import leave_out_remarks

        leave_out_remarks()
        return getattr(import_module(f"smolquant.runtime.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
